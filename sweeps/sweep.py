"""A whole study: what is open is run, what comes of it goes to MLflow, and the answer is drawn from all of it."""

import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, Literal

from locft.errors import InputError
from sweeps.ray_session import ray_session
from sweeps.plan import optuna_space, point_of, trial_config
from sweeps.prepare import PreparedStudy
from sweeps.records import TrialConfig, TrialResult
from sweeps.runner import Ending, Reporter, compute_baseline, run_trials
from sweeps.search import OBJECTIVES, TrialSearch
from sweeps.study import study_to_yaml
from sweeps.tracking import DatasetRecord, ModelRecord, Tracker
from sweeps.tracking_store import connect
from sweeps.tracking_uri import check_reachable, resolve_uri, sqlite_path
from sweeps.trial import Basis

if TYPE_CHECKING:
    import pandas as pd

    from analysis.pareto import ParetoFront, Recommendation
    from locft.workbench import Baseline

BASELINE_FILE = "baseline.json"
PACKAGES = ("locft-sweeps", "torch", "transformers", "ray", "optuna", "mlflow", "numpy", "pandas")


@dataclass(frozen=True)
class StudyState:
    """What the tracking store holds of a study, measured against its plan."""

    prepared: PreparedStudy
    results: "pd.DataFrame"
    """Finished and failed trials that belong to the study as it is planned now."""
    baseline: dict[str, float]
    """Metrics of the unedited model; empty before anything ran."""

    @property
    def done(self) -> int:
        return int((self.results["status"] == "done").sum())

    @property
    def failed(self) -> int:
        return int((self.results["status"] == "failed").sum())

    @property
    def left(self) -> int:
        """Planned trials that are not done (failed ones are tried again)."""
        return max(0, self.prepared.plan.count - self.done)


@dataclass(frozen=True)
class Answer:
    """What a study says."""

    front: "ParetoFront"
    recommendation: "Recommendation | None"
    report_html: str = field(repr=False)


@dataclass(frozen=True)
class Sweep:
    """What a run of a study leaves."""

    state: StudyState
    answer: Answer
    ending: Ending
    tracking_uri: str
    """Of the store, without a password."""


def find_tracker(prepared: PreparedStudy, uri: str | None) -> Tracker | None:
    """The study's tracking store; None when nothing of the study is in it yet. Asking creates neither.

    Raises InputError when the store cannot be reached or written.
    """
    resolved = resolve_uri(uri)
    path = sqlite_path(resolved)
    if path is not None and not path.exists():
        check_reachable(resolved)
        return None
    connect(uri)
    try:
        return Tracker.open(uri, prepared.study.name, create=False)
    except InputError:  # the store answers, so it is the study that is not there
        return None


def read_state(prepared: PreparedStudy, tracker: Tracker | None) -> StudyState:
    """Everything finished so far, from the tracking store; None where nothing is yet."""
    from analysis.table import results_frame

    if tracker is None:
        return StudyState(prepared, results_frame([]), {})
    results = tracker.load_results(prepared.id)
    if prepared.plan.trials:
        planned = {trial.id for trial in prepared.plan.trials}
        results = results[results["trial_id"].isin(planned)].reset_index(drop=True)
    stored = tracker.study_file(prepared.id, BASELINE_FILE)
    return StudyState(prepared, results, json.loads(stored)["metrics"] if stored else {})


def run_sweep(
    prepared: PreparedStudy,
    tracking_uri: str | None,
    *,
    address: str | None = None,
    show: Callable[[StudyState], AbstractContextManager[Reporter]],
) -> Sweep:
    """Run what is open of a study and return everything it knows then. The same call again runs only what is not done.

    show: given the state at the start, a context manager whose value hears of every trial. Raises InputError before
    anything is written when the store or the cluster cannot be had, or its resources do not suffice.
    """
    study = prepared.study
    tracker = find_tracker(prepared, tracking_uri)
    state = read_state(prepared, tracker)
    ending: Ending = "complete"
    with ExitStack() as stack:
        if state.left:
            concurrent = stack.enter_context(ray_session(address, study.resources))
        tracker = tracker or Tracker.open(tracking_uri, study.name)
        description = f"Layer sweep of {study.model} on {study.edits.source} ({len(prepared.edits.requests)} edits)"
        tracker.open_study(
            prepared.id,
            study.name,
            study_yaml=study_to_yaml(study),
            description=description,
            environment=environment(),
        )
        try:
            if state.left:
                baseline = _baseline(prepared, tracker)
                with show(state) as reporter:
                    ending = run_trials(
                        _open_trials(prepared, state),
                        {prepared.facts.data_fingerprint: Basis(prepared.inputs, baseline)},
                        cpus=study.resources.cpus,
                        gpus=study.resources.gpus,
                        concurrent=concurrent,
                        reporter=Logged(reporter, prepared, tracker, prepared.id),
                    )
        finally:  # also when it breaks off: the study's run shall show what is finished
            state = read_state(prepared, tracker)
            answer = answer_of(state, tracker)
            tracker.finish_study(
                prepared.id,
                state.results,
                answer.report_html,
                asdict(answer.recommendation) if answer.recommendation else {},
                _summary(state, answer),
                _status(state, ending),
                answer=answer_text(answer),
            )
    return Sweep(state, answer, ending, tracker.uri)


def _status(state: StudyState, ending: Ending) -> Literal["done", "stopped", "failed"]:
    if state.left == 0:
        return "done"
    return "failed" if ending != "interrupted" and state.failed and not state.done else "stopped"


def answer_of(state: StudyState, tracker: Tracker) -> Answer:
    """Front, pick and report of what is finished so far."""
    import pandas as pd

    from analysis.pareto import DEFAULT_OBJECTIVES, pareto_front, recommend
    from analysis.report import render_report
    from analysis.table import by_setting

    prepared, study, results = state.prepared, state.prepared.study, state.results
    pick = recommend(results)
    outcomes = None
    if pick:
        run_ids = results.set_index("trial_id")["run_id"]
        parts = [tracker.load_outcomes(run_ids[trial]).assign(trial_id=trial) for trial in pick.trial_ids]
        outcomes = pd.concat(parts, ignore_index=True)
    about = {
        "name": study.name,
        "model": study.model,
        "edits_source": study.edits.source,
        "n_edits": len(prepared.edits.requests),
        "findings": list(prepared.edits.findings.sentences()),
        "capability_source": prepared.capability_source,
        "n_items": prepared.n_items,
        "trials_planned": prepared.plan.count,
        "trials_done": state.done,
        "trials_failed": state.failed,
        "finished": datetime.now(UTC),
        "environment": environment(),
        "settings_yaml": study_to_yaml(study),
    }
    html = render_report(about, results, baseline=state.baseline, outcomes=outcomes)
    return Answer(pareto_front(by_setting(results), DEFAULT_OBJECTIVES), pick, html)


def answer_text(answer: Answer) -> str:
    """The pick in markdown, for the description of the study's run."""
    pick = answer.recommendation
    if not pick:
        return "No trial succeeded yet."
    return f"**Edit at {pick.position}.** {pick.rule}\n\n" + "\n".join(f"- {reason}" for reason in pick.reasons)


def environment() -> dict[str, Any]:
    """Versions and machine, for the record of a study."""
    import os

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count(), **versions}


class Logged:
    """Passes trials on to a reporter, and finished ones to MLflow first, as runs of a study that is open there."""

    def __init__(self, reporter: Reporter, prepared: PreparedStudy, tracker: Tracker, study_id: str):
        self.reporter, self.study_id, self.tracker = reporter, study_id, tracker
        study, facts = prepared.study, prepared.facts
        model = ModelRecord(study.model, facts.model_fingerprint, {"layers": facts.n_layers, "dtype": study.dtype})
        found = {"edits": len(prepared.edits.requests), **asdict(prepared.edits.findings)}
        data = [DatasetRecord(study.edits.source, prepared.edits.fingerprint, study.edits.source, "edits", found)]
        if prepared.suite:
            items = {task.name: len(task.items) for task in prepared.suite.tasks}
            name = study.capability.suite or "capability"
            source = prepared.capability_source
            data.append(DatasetRecord(name, prepared.suite.fingerprint, source, "capability", items))
        self.inputs = tracker.create_inputs(study_id, model, data)

    def started(self, running: int) -> None:
        self.reporter.started(running)

    def retried(self, config: TrialConfig, cause: str) -> None:
        self.reporter.retried(config, cause)

    def finished(self, result: TrialResult, running: int) -> None:
        self.tracker.log_trial(self.study_id, result, self.inputs)
        self.reporter.finished(result, running)


def _baseline(prepared: PreparedStudy, tracker: Tracker) -> "Baseline":
    """The unedited model's measurements: once per study, then from the study's run."""
    from locft.workbench import Baseline

    stored = tracker.study_file(prepared.id, BASELINE_FILE)
    if stored:
        return Baseline.from_dict(json.loads(stored))
    baseline = compute_baseline(prepared.inputs, prepared.study.resources.cpus, prepared.study.resources.gpus)
    tracker.put_study_file(prepared.id, BASELINE_FILE, json.dumps(baseline.to_dict()))
    return baseline


def _open_trials(prepared: PreparedStudy, state: StudyState) -> list[TrialConfig] | TrialSearch:
    study, facts = prepared.study, prepared.facts
    if study.search.method != "optuna":
        finished = set(state.results.loc[state.results["status"] == "done", "trial_id"])
        return [trial for trial in prepared.plan.trials if trial.id not in finished]
    earlier = {}
    for row in state.results[state.results["status"] == "done"].to_dict("records"):
        config = TrialConfig(**{name: row[name] for name in TrialConfig.__dataclass_fields__})
        if point := point_of(study, facts, config):
            values = tuple(row[name] if row[name] == row[name] else 0.0 for name in OBJECTIVES)
            earlier[config.id] = (point, values)
    return TrialSearch(
        optuna_space(study, facts),
        lambda point: trial_config(study, facts, point),
        state.left,
        study.search.seed,
        earlier,
    )


def _summary(state: StudyState, answer: Answer) -> dict[str, float]:
    metrics = {"trials_done": state.done, "trials_failed": state.failed, "front_size": len(answer.front.trial_ids)}
    metrics["hypervolume"] = answer.front.hypervolume
    if answer.recommendation:
        wanted = ("reliability", "generalization", "locality", "capability", "capability_change", "drift_kl")
        found = answer.recommendation.metrics
        metrics |= {f"pick_{name}": found[name] for name in wanted if name in found}
    return metrics
