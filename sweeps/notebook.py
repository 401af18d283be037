"""Studies in notebooks and scripts: run one, get its table, draw it. docs/example.ipynb is an example."""

from collections.abc import Mapping
from os import PathLike, fspath
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.curves import loss_figure, loss_info
from analysis.figures.front import front_figure, front_info
from analysis.figures.maps import heatmap_figure, heatmap_info
from analysis.stats.pick import recommend
from analysis.stats.table import TITLES, done, has_values
from sweeps.answer import foresee, read_state
from sweeps.commands.console import notice
from sweeps.commands.options import StudyOptions
from sweeps.commands.progress import Progress
from sweeps.commands.surroundings import settle
from sweeps.run.dispatch import Reporter
from sweeps.study.plan import PreparedStudy
from sweeps.study.reader import as_override
from sweeps.sweep import Sweep, run_sweep
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.study_run import find_tracker

MAPS = ("reliability", "generalization", "locality", "capability_change", "drift_kl")


def run_study(
    study: str | PathLike[str],
    changes: Mapping[str, Any] | None = None,
    *,
    tracking_uri: str | None = None,
    address: str | None = None,
    reporter: Reporter | None = None,
    register: bool = True,
) -> Sweep:
    """Run the open trials of a study, as `locft sweep` does; the same call again runs only those that are not done.

    study: a ready study's name or a study file. changes: dotted field -> value (as in JSON, or a path, a range or numpy's),
    overriding the study's own. reporter: notified of trials, instead of lines on standard error. register: put the pick's delta
    into the model registry. The result holds state (with the results table), answer (front, recommendation, report_html), how
    it ended, and the address of that delta. Raises InputError at once if anything is wrong with the input.
    """
    prepared, store = _prepared(study, changes), resolve_uri(tracking_uri)

    def show(state):
        return reporter or Progress(prepared.study.name, foresee(prepared, store), done(state.results)["trial_id"])

    return run_sweep(prepared, store, address=address, show=show, register=register)


def load_results(
    study: str | PathLike[str], changes: Mapping[str, Any] | None = None, *, tracking_uri: str | None = None
) -> pd.DataFrame:
    """The results table of a study so far (columns: `analysis.stats.table.COLUMNS`); empty when nothing ran."""
    prepared = _prepared(study, changes)
    return read_state(prepared, find_tracker(resolve_uri(tracking_uri), prepared.study.name, prepared.id)).results


def figures(results: pd.DataFrame) -> dict[str, go.Figure]:
    """plotly figures of a results table: "front", a map over layer and module for each of `MAPS` that was measured, and
    "losses". The study's pick is marked."""
    pick = recommend(results)
    picked = pick.trial_id if pick else None
    front = front_info(results, pick=picked)
    found = {"front": front_figure(front)}
    for metric in MAPS:
        if has_values(results, metric):
            found[metric] = heatmap_figure(heatmap_info(results, metric, pick=picked))
            found[metric].update_layout(title=TITLES.get(metric, metric).capitalize(), margin={"t": 60})
    on_front = tuple(point.trial_id for point in front.points if point.on_front)
    found["losses"] = loss_figure(loss_info(results, front=on_front, pick=picked))
    return found


def _prepared(study: str | PathLike[str], changes: Mapping[str, Any] | None) -> PreparedStudy:
    notice(*settle())
    overrides = [as_override(field, value) for field, value in (changes or {}).items()]
    return StudyOptions(fspath(study), overrides).prepared()
