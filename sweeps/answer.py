"""What a study says: its front, its pick, and the report of everything finished so far."""

import platform
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from sweeps.study.reader import study_to_yaml
from sweeps.tracking.study_run import Tracker

if TYPE_CHECKING:
    import pandas as pd

    from analysis.stats.comparison import Measured
    from analysis.stats.pareto import ParetoFront, Recommendation
    from sweeps.sweep import StudyState

PACKAGES = ("locft-sweeps", "torch", "transformers", "ray", "optuna", "mlflow", "numpy", "pandas")
MOST_READ = 60
"""Trials up to which all their answers are read, for a bootstrap over edits; of more, those of the pick and of what the
report lists of the front."""


@dataclass(frozen=True)
class Answer:
    """What a study says."""

    front: "ParetoFront"
    recommendation: "Recommendation | None"
    report_html: str = field(repr=False)


def answer_of(state: "StudyState", tracker: Tracker, other: "Measured | None" = None) -> Answer:
    """Front, pick and report of what is finished so far. other: a study to compare with in the report."""
    from analysis.stats.pareto import DEFAULT_OBJECTIVES, pareto_front, recommend
    from analysis.page.report import MAX_MISSES, render_report
    from analysis.stats.table import by_setting

    own = measured(state, tracker)
    settings, pick = by_setting(state.results), recommend(state.results)
    front = pareto_front(settings, DEFAULT_OBJECTIVES)
    finished = [trial for ids in settings["trial_ids"] for trial in ids]
    on_front = settings.set_index("trial_id").loc[list(front.trial_ids[:MAX_MISSES]), "trial_ids"]
    shown = [*(pick.trial_ids if pick else ()), *(trial for ids in on_front for trial in ids)]
    wanted = finished if len(finished) <= MOST_READ else shown
    outcomes = _outcomes(state.results, wanted, tracker)
    html = render_report(own.study, own.results, baseline=own.baseline, outcomes=outcomes, other=other)
    return Answer(front, pick, html)


def _outcomes(results: "pd.DataFrame", trials: list[str], tracker: Tracker) -> "pd.DataFrame | None":
    import pandas as pd

    run_ids = results.set_index("trial_id")["run_id"]
    parts = [tracker.load_outcomes(run_ids[trial]).assign(trial_id=trial) for trial in dict.fromkeys(trials)]
    return pd.concat(parts, ignore_index=True) if parts else None


def measured(state: "StudyState", tracker: Tracker) -> "Measured":
    """A study and its results as the report takes them."""
    from analysis.stats.comparison import Measured

    prepared, study = state.prepared, state.prepared.study
    started, finished = tracker.study_times(prepared.id)
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
        "started": started,
        "finished": finished or datetime.now(UTC),
        "environment": environment(),
        "settings_yaml": study_to_yaml(study),
    }
    return Measured(about, state.results, state.baseline)


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
