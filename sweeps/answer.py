"""What the tracking store holds for a study, and the answer it gives: front, pick, and a report on everything finished so far."""

import json
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import pandas as pd

from analysis.stats.comparison import Comparison, Measured, compare
from analysis.stats.pareto import DEFAULT_OBJECTIVES, ParetoFront, pareto_front
from analysis.stats.pick import Recommendation, recommend
from analysis.stats.signatures import Remedy, remedies
from analysis.stats.table import by_setting, causes, done, failed, results_frame
from locft.cache import content_key
from sweeps.study.estimate import TRIALS, Forecast, machine, make_forecast
from sweeps.study.plan import PreparedStudy, point_of
from sweeps.study.reader import study_to_yaml
from sweeps.study.trial_types import config_of_row
from sweeps.tracking.study_run import Tracker, earlier_trials, find_tracker
from sweeps.tracking.trial_run import environment

if TYPE_CHECKING:
    from analysis.page.report import HowFound

BASELINE_FILE = "baseline.json"
"""File in the study's run with the measurements of the unedited model, if all edits are asked about (`baseline_file`)."""
MOST_READ = 60
"""Up to this many trials, the report's lists of wrong answers read the answers of every trial; beyond it, only those of the
pick and of the part of the front that the report lists."""


@dataclass(frozen=True)
class StudyState:
    """What the tracking store holds for a study, compared with its plan."""

    prepared: PreparedStudy
    results: pd.DataFrame
    """Finished and failed trials that belong to the study as it is planned now."""
    baseline: dict[str, float]
    """Metrics of the unedited model; empty before anything ran."""

    @property
    def done(self) -> int:
        return len(done(self.results))

    @property
    def failed(self) -> int:
        return len(failed(self.results))

    @property
    def left(self) -> int:
        """Planned trials that are not done (failed ones are tried again)."""
        return max(0, self.prepared.plan.count - self.done)

    @property
    def retried(self) -> dict[str, int]:
        """Why attempts at trials were lost (and retried): cause -> how often it happened."""
        return causes(self.results, "retried")

    @property
    def affordable(self) -> int:
        """The number of open trials that the study's budget of trials still allows."""
        limit = self.prepared.study.budget.trials
        return self.left if limit is None else max(0, min(self.left, limit - self.done))


def read_state(prepared: PreparedStudy, tracker: Tracker | None, *, curves: bool = True) -> StudyState:
    """Everything recorded so far. tracker: None when nothing of the study is in the store yet.

    curves: also read the loss curves, which takes one request per trial while the study is unfinished.
    """
    if tracker is None:
        return StudyState(prepared, results_frame([]), {})
    results = tracker.load_results(curves=curves)
    planned = {trial.id for trial in prepared.plan.trials}
    if not planned:  # a search proposes any point of its space
        known = {row["trial_id"]: config_of_row(row) for row in results.to_dict("records")}
        planned = {name for name, config in known.items() if point_of(prepared.study, prepared.facts, config)}
    results = results[results["trial_id"].isin(planned)].reset_index(drop=True)
    names = dict.fromkeys((baseline_file(prepared), BASELINE_FILE))  # the second was an earlier version's only name
    stored = next(filter(None, map(tracker.read_file, names)), None)
    return StudyState(prepared, results, json.loads(stored)["metrics"] if stored else {})


def baseline_file(prepared: PreparedStudy) -> str:
    """The file with the measurements of the unedited model. They hold for the edits that any trial asks about, and only for those;
    a study whose `space.edit_count` changes asks about others."""
    places = prepared.every_asked_place
    return BASELINE_FILE if places is None else f"baseline-{content_key(places)}.json"


def foresee(prepared: PreparedStudy, store: str, *, timed: bool = True) -> Forecast:
    """Forecast of the open trials on this machine, from what the tracking store holds. Creates no store.

    timed: as in `make_forecast`. Raises InputError when the store cannot be reached.
    """
    finished = done(read_state(prepared, find_tracker(store, prepared.study.name, prepared.id), curves=False).results)
    earlier = earlier_trials(prepared.facts.model_fingerprint, machine(prepared.study.resources), TRIALS, store)
    return make_forecast(prepared, finished["trial_id"], earlier, timed=timed)


@dataclass(frozen=True)
class StudyAnswer:
    """The answer that a study gives."""

    front: ParetoFront
    recommendation: Recommendation | None
    report_html: str = field(repr=False)
    remedies: tuple[Remedy, ...] = ()
    comparison: Comparison | None = None
    """Comparison with another study, if one was named."""


def answer_of(
    state: StudyState, tracker: Tracker | None, other: Measured | None = None, found: "HowFound | None" = None
) -> StudyAnswer:
    """Front, pick and report of the trials finished so far. tracker: None leaves out the answers to single prompts,
    which only the store has. other: a study to compare with in the report. found: how a selection found its answer."""
    from analysis.page.report import MAX_MISSES, render_report  # imports plotly, which takes a second

    own = measured(state, tracker)
    settings, pick = by_setting(state.results), recommend(state.results)
    front = pareto_front(settings, DEFAULT_OBJECTIVES)
    trials, outcomes = settings.set_index("trial_id")["trial_ids"], None
    if trials.map(len).sum() > MOST_READ:
        trials = trials[[*([pick.trial_id] if pick else ()), *front.trial_ids[:MAX_MISSES]]]
    if tracker and len(trials):
        run_ids = state.results.set_index("trial_id")["run_id"]
        parts = [tracker.load_outcomes(run_ids[trial]).assign(trial_id=trial) for trial in trials.explode().unique()]
        outcomes = pd.concat(parts, ignore_index=True)
    compared = compare(own, other) if other else None
    html = render_report(
        own.study, own.results, baseline=own.baseline, outcomes=outcomes, compared=compared, found=found
    )
    return StudyAnswer(front, pick, html, remedies(own, pick), compared)


def remedies_so_far(state: StudyState, tracker: Tracker | None) -> tuple[Remedy, ...]:
    """What goes wrong in the trials finished so far, with the commands. Reads the pick's loss curve if the state has none."""
    pick, results = recommend(state.results), state.results.copy()
    if pick and tracker:
        (place,) = results.index[results["trial_id"] == pick.trial_id]
        results.at[place, "epoch_losses"] = tracker.load_curve(results.at[place, "run_id"])
    return remedies(measured(replace(state, results=results), None), pick)


def measured(state: StudyState, tracker: Tracker | None) -> Measured:
    """A study and its results in the form the report takes. Without a tracker, its start is left out and its end is now."""
    prepared, study = state.prepared, state.prepared.study
    started, finished = tracker.times() if tracker else (None, None)
    about = {
        "name": study.name,
        "model": study.model,
        "edits_source": study.edits.source,
        "n_edits": len(prepared.edits.requests),
        "findings": list(prepared.edits.sentences()),
        "edit_counts": asdict(prepared.edits.findings),
        "edits_asked": study.edits.asked,
        "ask_formats": study.ask_formats,
        "command": prepared.command,
        "chosen_axes": prepared.chosen_axes,
        "capability_source": prepared.capability_source,
        "n_items": prepared.n_items,
        "prose": study.capability.prose,
        "prose_tokens": study.capability.prose_tokens if prepared.suite else 0,
        "fingerprints": {
            "edits": prepared.edits.fingerprint,
            **(prepared.suite.fingerprints if prepared.suite else {}),
        },
        "trials_planned": prepared.plan.count,
        "trials_done": state.done,
        "trials_failed": state.failed,
        "started": started,
        "finished": finished or datetime.now(UTC),
        "environment": environment(),
        "settings_yaml": study_to_yaml(study),
    }
    return Measured(about, state.results, state.baseline)


def answer_text(answer: StudyAnswer) -> str:
    """The pick in markdown, for the description of the study's run."""
    pick = answer.recommendation
    if not pick:
        return "No trial has succeeded yet."
    lines = [*pick.reasons, *(f"{remedy.sentences} Change it: `{command}`" for remedy, command in answer.remedies)]
    return f"**Edit at {pick.position}.** {pick.rule}\n\n" + "\n".join(f"- {line}" for line in lines)
