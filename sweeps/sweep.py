"""A whole study: what is open is run, what comes of it goes to MLflow, and the answer is drawn from all of it."""

import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import call
from typing import TYPE_CHECKING, Any, Literal

from sweeps.answer import BASELINE_FILE, Answer, StudyState, answer_of, answer_text, read_state
from sweeps.session import study_session
from sweeps.tracking.outbox import patiently
from sweeps.study.estimate import patience_seconds
from sweeps.tracking.pick_edit import PickError, is_registered, register_pick
from sweeps.study.plan import optuna_space, point_of, trial_config
from sweeps.study.plan import PreparedStudy
from sweeps.run.cluster import trials_run_here
from sweeps.study.trial_types import TrialConfig
from sweeps.tracking.registry import edit_address, study_alias
from sweeps.run.runner import Ending, Reporter, alone, run_trials
from sweeps.run.search import OBJECTIVES, TrialSearch
from sweeps.tracking.store import TrackingError
from sweeps.tracking.study_run import Tracker
from sweeps.run.trial import Basis, measure_baseline

if TYPE_CHECKING:
    from locft.workbench import Baseline


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
    the study; TrackingError when the store went away for good. Finished trials are then kept on this machine. In a store
    that answers the study's run is closed, however this ends.
    """
    study, began = prepared.study, time.monotonic()
    ending: Ending = "complete"
    deadline = began + 60 * (study.budget.minutes or math.inf)
    description = f"Layer sweep of {study.model} on {study.edits.source} ({len(prepared.edits.requests)} edits)"
    here = trials_run_here(address, study.resources)
    with study_session(prepared, tracking_uri, description) as session:
        state = read_state(prepared, session.tracker, curves=False)
        if state.affordable or (register and not here and _pick_to_register(state, tracking_uri)):
            room = session.start_ray(address)
        tracker = session.open_run()
        try:
            if state.affordable:
                baseline = _baseline(prepared, tracker, here)
                with show(state) as reporter, session.recorder(reporter) as recorder:
                    ending = run_trials(
                        _open_trials(prepared, state),
                        {prepared.facts.data_fingerprint: Basis(prepared.inputs, baseline)},
                        cpus=study.resources.cpus,
                        gpus=study.resources.gpus,
                        room=room,
                        reporter=recorder,
                        deadline=deadline,
                        patience=partial(patience_seconds, facts=prepared.facts, resources=study.resources),
                    )
        except TrackingError:  # nothing can be written now
            raise
        except BaseException:  # the study's run shall show what is finished
            with suppress(TrackingError):
                _conclude(prepared, tracker, ending, call)
            raise
        try:
            done = _conclude(prepared, tracker, ending, patiently)
        except TrackingError as error:
            raise TrackingError(f"{error}; all finished trials are recorded, and the same command writes the answer") from None
        if not register or ending != "complete":
            return done
        return _with_registered(done, tracker, tracking_uri, deadline, here)


def _pick_to_register(state: StudyState, tracking_uri: str | None) -> dict[str, Any] | None:
    """The row of the study's pick, unless its edit is registered already or there is none."""
    from analysis.stats.pick import recommend

    pick = recommend(state.results)
    if pick is None:
        return None
    (row,) = state.results[state.results["trial_id"] == pick.trial_id].to_dict("records")
    return None if is_registered(state.prepared.study, row["run_id"], tracking_uri) else row


def _with_registered(done: Sweep, tracker: Tracker, tracking_uri: str | None, deadline: float, here: bool) -> Sweep:
    """Whatever goes wrong here, Ctrl-C included, the study is finished and recorded. deadline: as of `run_trials`; here: as
    of `alone`."""
    from analysis.stats.table import METRICS

    prepared, pick = done.state.prepared, done.answer.recommendation
    study = prepared.study
    if pick is None:
        return done
    address = edit_address(study.model, study_alias(study.name))
    try:
        if row := _pick_to_register(done.state, tracking_uri):
            if time.monotonic() + row["train_seconds"] > deadline:
                raise PickError("training it again would exceed the budget's minutes; the same command makes up for it")
            config = TrialConfig(**{name: row[name] for name in TrialConfig.__dataclass_fields__})
            metrics = {name: row[name] for name in (*METRICS, "delta_norm") if math.isfinite(row.get(name, math.nan))}
            basis = Basis(prepared.inputs, _baseline(prepared, tracker, here))
            register_pick(study, basis, config, row["run_id"], metrics, tracking_uri, here=here)
        use = f"Apply it: `locft apply {address} --model {study.model} --out edited-model`"
        tracker.describe(f"{answer_text(done.answer)}\n\n{use}", {"locft.registered": address})
    except KeyboardInterrupt:
        return replace(done, not_registered="interrupted; the same command makes up for it")
    except Exception as error:  # a worker that dies, a store without a registry
        cause = (str(error).strip() or type(error).__name__).splitlines()[0]
        return replace(done, not_registered=cause)
    return replace(done, registered=address)


def _conclude(
    prepared: PreparedStudy, tracker: Tracker, ending: Ending, asked: Callable[[Callable[[], Any]], Any]
) -> Sweep:
    """Draw the answer from everything that is recorded, and close the study's run with it.

    asked: calls what needs the store, `patiently` or once.
    """
    state = asked(partial(read_state, prepared, tracker))
    answer = asked(partial(answer_of, state, tracker))
    asked(
        partial(
            tracker.finish,
            state.results,
            answer.report_html,
            asdict(answer.recommendation) if answer.recommendation else {},
            _summary(state, answer),
            _status(state, ending),
            answer=answer_text(answer),
        )
    )
    return Sweep(state, answer, ending, tracker.uri)


def _status(state: StudyState, ending: Ending) -> Literal["done", "stopped", "failed"]:
    if state.left == 0:
        return "done"
    return "failed" if ending != "interrupted" and state.failed and not state.done else "stopped"


def _baseline(prepared: PreparedStudy, tracker: Tracker, here: bool) -> "Baseline":
    """The unedited model's measurements: once per study, then from the study's run. here: as of `alone`."""
    from locft.workbench import Baseline

    stored = tracker.read_file(BASELINE_FILE)
    if stored:
        return Baseline.from_dict(json.loads(stored))
    baseline = alone(partial(measure_baseline, prepared.inputs), prepared.study.resources, here=here)
    tracker.write_file(BASELINE_FILE, json.dumps(baseline.to_dict()))
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
