"""A whole study: what is open is run, what comes of it goes to MLflow, and the answer is drawn from all of it."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from locft.errors import InputError
from sweeps.answer import Answer, answer_of, answer_text, environment
from sweeps.delivery import Delivery, Outbox, open_outbox
from sweeps.driver import driver_folder, only_driver
from sweeps.estimate import memory_bytes, patience_seconds
from sweeps.forecast import machine
from sweeps.heartbeat import Heartbeat, at_work, refuse_second_driver
from sweeps.pick_edit import is_registered, register_pick
from sweeps.plan import optuna_space, point_of, trial_config
from sweeps.prepare import PreparedStudy
from sweeps.ray_session import ray_session, trials_run_here
from sweeps.records import TrialConfig, TrialResult
from sweeps.registry import edit_address, study_alias
from sweeps.runner import Ending, Reporter, alone, run_trials
from sweeps.search import OBJECTIVES, TrialSearch
from sweeps.study import study_to_yaml
from sweeps.tracking import DatasetRecord, ModelRecord, StudyInputs, Tracker, TrackingError
from sweeps.tracking_store import connect
from sweeps.tracking_uri import check_reachable, resolve_uri, sqlite_path
from sweeps.trial import Basis, measure_baseline

if TYPE_CHECKING:
    import pandas as pd

    from locft.workbench import Baseline

BASELINE_FILE = "baseline.json"


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

    @property
    def affordable(self) -> int:
        """Of these as many as the study's budget of trials allows."""
        limit = self.prepared.study.budget.trials
        return self.left if limit is None else max(0, min(self.left, limit - self.done))


@dataclass(frozen=True)
class Sweep:
    """What a run of a study leaves."""

    state: StudyState
    answer: Answer
    ending: Ending
    tracking_uri: str
    """Of the store, without a password."""
    registered: str | None = None
    """The address of the pick's edit in the model registry, models:/NAME@ALIAS."""
    not_registered: str | None = None
    """Why there is none, where it was asked for."""


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
    register: bool = False,
) -> Sweep:
    """Run what is open of a study and return everything it knows then. The same call again runs only what is not done.

    show: given the state at the start, a context manager whose value hears of every trial. register: at the end train the
    pick once more and put its delta into the model registry, unless it is there. Raises InputError before
    anything is written when the store or the cluster cannot be had, its resources do not suffice, or another driver runs
    the study; TrackingError when the store went away for good. Finished trials are then kept on this machine.
    """
    study, outbox, began = prepared.study, open_outbox(prepared.id, tracking_uri), time.monotonic()
    ending: Ending = "complete"
    with ExitStack() as stack:
        stack.enter_context(only_driver(driver_folder(prepared.id, tracking_uri), study.name))
        tracker = find_tracker(prepared, tracking_uri)
        refuse_second_driver(tracker, prepared.id, study.name)
        if len(outbox):
            tracker = tracker or Tracker.open(tracking_uri, study.name)
            _open_study(prepared, tracker)
            deliver_kept(prepared, tracker, prepared.id, outbox)
        state = read_state(prepared, tracker)
        here = trials_run_here(address, study.resources)
        if state.affordable or (register and not here and _pick_to_register(state, tracking_uri)):
            trial_bytes = max(memory_bytes(trial, prepared.facts) for trial in prepared.plan.sample)
            room = stack.enter_context(ray_session(address, study.resources, trial_bytes, study.model))
        tracker = tracker or Tracker.open(tracking_uri, study.name)
        _open_study(prepared, tracker)
        heartbeat = stack.enter_context(at_work(tracker, prepared.id))
        try:
            if state.affordable:
                baseline = _baseline(prepared, tracker, here)
                with (
                    show(state) as reporter,
                    Recorder(reporter, heartbeat, prepared, tracker, prepared.id, outbox) as recorder,
                ):
                    ending = run_trials(
                        _open_trials(prepared, state),
                        {prepared.facts.data_fingerprint: Basis(prepared.inputs, baseline)},
                        cpus=study.resources.cpus,
                        gpus=study.resources.gpus,
                        room=room,
                        reporter=recorder,
                        deadline=began + 60 * (study.budget.minutes or math.inf),
                        patience=partial(patience_seconds, facts=prepared.facts, resources=study.resources),
                    )
        except TrackingError:  # nothing can be written now
            raise
        except BaseException:  # the study's run shall show what is finished
            _conclude(prepared, tracker, ending)
            raise
        done = _conclude(prepared, tracker, ending)
        return _with_registered(done, tracker, tracking_uri, here) if register and ending == "complete" else done


def _pick_to_register(state: StudyState, tracking_uri: str | None) -> dict[str, Any] | None:
    """The row of the study's pick, unless its edit is registered already or there is none."""
    from analysis.pareto import recommend

    pick = recommend(state.results)
    if pick is None:
        return None
    (row,) = state.results[state.results["trial_id"] == pick.trial_id].to_dict("records")
    return None if is_registered(state.prepared.study, row["run_id"], tracking_uri) else row


def _with_registered(done: Sweep, tracker: Tracker, tracking_uri: str | None, here: bool) -> Sweep:
    """Whatever goes wrong here, the study is finished and recorded. here: as of `alone`."""
    from analysis.table import METRICS

    prepared, pick = done.state.prepared, done.answer.recommendation
    study = prepared.study
    if pick is None:
        return done
    address = edit_address(study.model, study_alias(study.name))
    try:
        if row := _pick_to_register(done.state, tracking_uri):
            config = TrialConfig(**{name: row[name] for name in TrialConfig.__dataclass_fields__})
            metrics = {name: row[name] for name in (*METRICS, "delta_norm") if math.isfinite(row.get(name, math.nan))}
            basis = Basis(prepared.inputs, _baseline(prepared, tracker, here))
            register_pick(study, basis, config, row["run_id"], metrics, tracking_uri, here=here)
        use = f"Apply it: `locft apply {address} --model {study.model} --out edited-model`"
        tracker.describe_study(prepared.id, f"{answer_text(done.answer)}\n\n{use}", {"locft.registered": address})
    except Exception as error:  # a worker that dies, a store without a registry
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        return replace(done, not_registered=cause)
    return replace(done, registered=address)


def _open_study(prepared: PreparedStudy, tracker: Tracker) -> None:
    study = prepared.study
    tracker.open_study(
        prepared.id,
        study.name,
        study_yaml=study_to_yaml(study),
        description=f"Layer sweep of {study.model} on {study.edits.source} ({len(prepared.edits.requests)} edits)",
        environment=environment(),
    )


def _conclude(prepared: PreparedStudy, tracker: Tracker, ending: Ending) -> Sweep:
    """Draw the answer from everything that is recorded, and close the study's run with it."""
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


class Recorder:
    """Passes trials on to a reporter, and sends finished ones to MLflow, as runs of a study that is open there.

    A context manager: leaving it waits for what is under way, and raises TrackingError when that does not arrive
    (`sweeps.delivery`).
    """

    def __init__(
        self,
        reporter: Reporter,
        heartbeat: Heartbeat,
        prepared: PreparedStudy,
        tracker: Tracker,
        study_id: str,
        outbox: Outbox,
    ):
        self.reporter, self.heartbeat = reporter, heartbeat
        deliver = partial(tracker.log_trial, study_id, inputs=_inputs(prepared, tracker, study_id))
        self._delivery = Delivery(deliver, outbox, reporter.note)

    def __enter__(self) -> "Recorder":
        self._delivery.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._delivery.__exit__(*error)

    def note(self, text: str) -> None:
        self.reporter.note(text)

    def started(self, running: int) -> None:
        self.heartbeat.heard(running)
        self.reporter.started(running)

    def retried(self, config: TrialConfig, cause: str) -> None:
        self.reporter.retried(config, cause)

    def finished(self, result: TrialResult, running: int) -> None:
        self._delivery.put(result)
        self.heartbeat.heard(running)
        self.reporter.finished(result, running)


def deliver_kept(prepared: PreparedStudy, tracker: Tracker, study_id: str, outbox: Outbox) -> None:
    """Record what an earlier driver could not, in a study that is open in the store. Raises TrackingError."""
    if kept := outbox.kept():
        inputs = _inputs(prepared, tracker, study_id)
        for result in kept:
            tracker.log_trial(study_id, result, inputs)
            outbox.drop(result)


def _inputs(prepared: PreparedStudy, tracker: Tracker, study_id: str) -> StudyInputs:
    """The data sets and the unedited model, for the runs of the trials."""
    study, facts = prepared.study, prepared.facts
    model = ModelRecord(study.model, facts.model_fingerprint, {"layers": facts.n_layers, "dtype": study.dtype})
    found = {"edits": len(prepared.edits.requests), **asdict(prepared.edits.findings)}
    data = [DatasetRecord(study.edits.source, prepared.edits.fingerprint, study.edits.source, "edits", found)]
    if prepared.suite:
        items = {task.name: len(task.items) for task in prepared.suite.tasks}
        name = study.capability.suite or "capability"
        data.append(DatasetRecord(name, prepared.suite.fingerprint, prepared.capability_source, "capability", items))
    return tracker.create_inputs(study_id, model, data, {"locft.machine": machine(study.resources)})


def _baseline(prepared: PreparedStudy, tracker: Tracker, here: bool) -> "Baseline":
    """The unedited model's measurements: once per study, then from the study's run. here: as of `alone`."""
    from locft.workbench import Baseline

    stored = tracker.study_file(prepared.id, BASELINE_FILE)
    if stored:
        return Baseline.from_dict(json.loads(stored))
    baseline = alone(partial(measure_baseline, prepared.inputs), prepared.study.resources, here=here)
    tracker.put_study_file(prepared.id, BASELINE_FILE, json.dumps(baseline.to_dict()))
    return baseline


def _open_trials(prepared: PreparedStudy, state: StudyState) -> list[TrialConfig] | TrialSearch:
    study, facts = prepared.study, prepared.facts
    if study.search.method != "optuna":
        finished = set(state.results.loc[state.results["status"] == "done", "trial_id"])
        return [trial for trial in prepared.plan.trials if trial.id not in finished][: state.affordable]
    earlier = {}
    for row in state.results[state.results["status"] == "done"].to_dict("records"):
        config = TrialConfig(**{name: row[name] for name in TrialConfig.__dataclass_fields__})
        if point := point_of(study, facts, config):
            values = tuple(row[name] if row[name] == row[name] else 0.0 for name in OBJECTIVES)
            earlier[config.id] = (point, values)
    return TrialSearch(
        optuna_space(study, facts),
        lambda point: trial_config(study, facts, point),
        state.affordable,
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
