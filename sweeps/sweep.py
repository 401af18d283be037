"""A whole study: run the open trials, record them, draw the answer from everything recorded, and register the pick's edit.

Ray and Optuna take seconds to import. They are imported where they are needed, so that a study with nothing left to run
answers quickly.
"""

import json
import math
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from operator import call
from pathlib import Path
from typing import TYPE_CHECKING, Any

from analysis.stats.formats import by_format
from analysis.stats.pick import recommend
from analysis.stats.table import METRICS, done
from locft.errors import one_line
from locft.measure.evaluation import locality_prompts
from locft.workbench import Baseline
from sweeps.answer import BASELINE_FILE, StudyAnswer, StudyState, answer_of, answer_text, baseline_file, read_state
from sweeps.run.dispatch import Ending, Reporter
from sweeps.run.trial import measure_baseline, trained_delta
from sweeps.session import StudySession, study_session
from sweeps.study.plan import PreparedStudy, optuna_space, point_of, trial_config
from sweeps.study.trial_types import TrialConfig, config_of_row
from sweeps.tracking.outbox import with_retries
from sweeps.tracking.pages import SHOWN_METRICS
from sweeps.tracking.registry import edit_address, register_edit, registered_edit, study_alias
from sweeps.tracking.store import TrackingError
from sweeps.tracking.study_run import Tracker

if TYPE_CHECKING:
    from sweeps.run.search import OptunaSearch

NORM_TOLERANCE = 1e-3
"""Relative difference allowed between the norms of the pick's delta when trained again and in the trial: other hardware sums
in a different order."""


@dataclass(frozen=True)
class Sweep:
    """The outcome of running a study."""

    state: StudyState
    answer: StudyAnswer
    ending: Ending
    tracking_uri: str
    """Address of the store, without a password."""
    registered: str | None = None
    """Address of the pick's edit in the model registry, models:/NAME@ALIAS."""
    not_registered: str | None = None
    """Why the pick's edit is not in the registry, if registering it was requested."""


def run_sweep(
    prepared: PreparedStudy,
    store: str,
    *,
    address: str | None = None,
    show: Callable[[StudyState], Reporter],
    register: bool = False,
) -> Sweep:
    """Run a study's open trials and return everything known afterwards. The same call again runs only what is not done.

    store: address of the tracking store, resolved. address: of a Ray cluster. show: gets the state at the start and returns
    the reporter. register: train the pick once more at the end and put its delta into the model registry, unless it is there.

    Raises InputError before anything is written when the store or the cluster cannot be used, its resources do not suffice, or
    another driver on this machine runs the study; TrackingError when the store stayed unreachable. Finished trials are then kept
    on this machine. As long as the store answers, the study's run is closed however this ends.
    """
    study = prepared.study
    deadline = time.monotonic() + 60 * (study.budget.minutes or math.inf)
    description = f"Layer sweep of {study.model} on {study.edits.source} ({len(prepared.edits.requests)} edits)"
    with study_session(prepared, store, description, address=address) as session:
        state = read_state(prepared, session.tracker, curves=False)
        if state.affordable or (register and not session.runs_here and _unregistered_pick(state, store)):
            session.start_ray()
        tracker = session.open_run()
        ending: Ending = "complete"
        try:
            if state.affordable:
                baseline = _baseline(session)
                trials, some_done = _open_trials(prepared, state), state.done > 0
                ending = session.run_trials(trials, baseline, show(state), deadline, some_done=some_done)
        except TrackingError:  # nothing can be written now
            raise
        except BaseException:  # the study's run should show what is finished
            with suppress(TrackingError):
                _conclude(prepared, tracker, "complete", call)
            raise
        try:
            found = _conclude(prepared, tracker, ending, with_retries)
        except TrackingError as error:
            raise TrackingError(
                f"{error}; all finished trials are recorded; run the same command again to write the answer"
            ) from None
        return _with_registered(found, session, deadline) if register and ending == "complete" else found


def _open_trials(prepared: PreparedStudy, state: StudyState) -> "list[TrialConfig] | OptunaSearch":
    """The planned trials that are not done, those that failed last, as far as the budget goes; or the search that proposes them."""
    study, facts, finished = prepared.study, prepared.facts, done(state.results)
    if study.search.method != "optuna":
        ended, tried = set(finished["trial_id"]), set(state.results["trial_id"])
        left = [trial for trial in prepared.plan.trials if trial.id not in ended]
        return sorted(left, key=lambda trial: trial.id in tried)[: state.affordable]
    from sweeps.run.search import OptunaSearch, objectives

    earlier = {
        row["trial_id"]: (point, objectives(row))
        for row in finished.to_dict("records")
        if (point := point_of(study, facts, config_of_row(row)))
    }
    return OptunaSearch(
        optuna_space(study, facts), partial(trial_config, study, facts), state.affordable, study.search.seed, earlier
    )


def _baseline(session: StudySession) -> Baseline:
    """The unedited model's measurements: made once for the edits that are asked about, then read from the study's run."""
    prepared, file = session.prepared, baseline_file(session.prepared)
    if stored := session.tracker.read_file(file):
        baseline = Baseline.from_dict(json.loads(stored))
        # under this name an earlier version also stored measurements on some of the edits
        if file != BASELINE_FILE or len(baseline.locality_answers) == len(locality_prompts(prepared.edits.requests)):
            return baseline
    baseline = session.run_alone(partial(measure_baseline, prepared.inputs))
    session.tracker.write_file(file, json.dumps(baseline.to_dict()))
    return baseline


def _conclude(
    prepared: PreparedStudy, tracker: Tracker, ending: Ending, call_store: Callable[[Callable[[], Any]], Any]
) -> Sweep:
    """Draw the answer from everything recorded, and close the study's run with it.

    call_store: runs a function that needs the tracking store, with retries or once.
    """
    state = call_store(partial(read_state, prepared, tracker))
    answer = call_store(partial(answer_of, state, tracker))
    failed = ending != "interrupted" and state.failed and not state.done
    status = "done" if state.left == 0 else "failed" if failed else "stopped"
    pick = asdict(answer.recommendation) if answer.recommendation else {}
    closing = (state.results, answer.report_html, pick, _summary(state, answer), status)
    call_store(partial(tracker.finish, *closing, answer=answer_text(answer)))
    return Sweep(state, answer, ending, tracker.uri)


def _summary(state: StudyState, answer: StudyAnswer) -> dict[str, float]:
    """Metrics of the study's run."""
    metrics = {"trials_done": state.done, "trials_failed": state.failed, "front_size": len(answer.front.trial_ids)}
    metrics["hypervolume"] = answer.front.hypervolume
    if answer.recommendation:
        found = answer.recommendation.metrics
        formats = [f"{name}.{form}" for name in ("reliability", "generalization") for form in by_format(found, name)]
        metrics |= {f"pick_{name}": found[name] for name in (*SHOWN_METRICS, *formats) if name in found}
    return metrics


def _unregistered_pick(state: StudyState, store: str) -> dict[str, Any] | None:
    """The row of the study's pick; None when there is no pick, or when its edit is already the study's registered one."""
    pick, study = recommend(state.results), state.prepared.study
    if pick is None:
        return None
    (row,) = state.results[state.results["trial_id"] == pick.trial_id].to_dict("records")
    return None if registered_edit(study.model, study_alias(study.name), store) == row["run_id"] else row


def _with_registered(found: Sweep, session: StudySession, deadline: float) -> Sweep:
    """The sweep with its pick registered. Whatever goes wrong here, Ctrl-C included, the study is already finished and recorded.

    deadline: on the `time.monotonic()` clock.
    """
    study = session.prepared.study
    if found.answer.recommendation is None:
        return found
    address = edit_address(study.model, study_alias(study.name))
    try:
        if row := _unregistered_pick(found.state, session.store):
            if time.monotonic() + row["train_seconds"] > deadline:
                later = "run the same command again to register it"
                raise RuntimeError(f"training it again would exceed the budget's minutes; {later}")
            _register_pick(session, row)
        use = f"Apply it: `locft apply {address} --model {study.model} --out edited-model`"
        session.tracker.describe(f"{answer_text(found.answer)}\n\n{use}", {"locft.registered": address})
    except KeyboardInterrupt:
        return replace(found, not_registered="interrupted; run the same command again to register it")
    except Exception as error:  # a worker that dies, a store without a registry
        return replace(found, not_registered=one_line(error))
    return replace(found, registered=address)


def _register_pick(session: StudySession, row: dict[str, Any]) -> None:
    """Train a trial once more and register its delta. Trials keep no weights, and the same settings give the same delta.

    row: of the results table. Raises RuntimeError when the delta comes out different, InputError when the store does not take it.
    """
    study, run_id, config = session.prepared.study, row["run_id"], config_of_row(row)
    metrics = {name: row[name] for name in (*METRICS, "delta_norm") if math.isfinite(row.get(name, math.nan))}
    delta = session.run_alone(partial(trained_delta, session.prepared.inputs, _baseline(session), config))
    if not math.isclose(delta.norm, metrics["delta_norm"], rel_tol=NORM_TOLERANCE):
        raise RuntimeError(
            f"training {config.position} again gave a delta of norm {delta.norm:.6g} instead of the trial's "
            f"{metrics['delta_norm']:.6g} (other hardware?); `locft edit --from-run {run_id} --register` measures it again"
        )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        delta.save(folder)
        about = {"model": study.model, "position": config.position, "settings": config.to_dict(), "metrics": metrics}
        (folder / "edit.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
        alias, edits = study_alias(study.name), f"{study.edits.source}, study {study.name}"
        register_edit(folder, run_id, study.model, config.position, metrics, session.store, alias, edits)
