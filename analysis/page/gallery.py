"""The figures of the report with their titles and captions."""

import base64
import functools
import gzip
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.figures import curves, maps
from analysis.figures.front import FrontInfo, front_figure, front_info
from analysis.stats.capacity import Filling, fillings, law_of
from analysis.stats.comparison import Comparison
from analysis.stats.pareto import ParetoFront, comparable
from analysis.stats.table import TITLES, has_values
from analysis.stats.wording import plural, points

DRAWN = "the front, the pick and the best of each position always are"


@dataclass(frozen=True)
class Plot:
    """One figure of the page."""

    id: str
    title: str
    caption: str
    description: str
    """For a screen reader."""
    data: Markup
    """The figure as JSON, safe inside a script element."""
    height: int
    wide: bool = True
    """Spans the page; otherwise two share a row where there is room."""
    scrolls: bool = False
    """Needs more width than a phone has: scrolls inside its frame."""
    trials: frozenset[str] = frozenset()
    """Ids of the trials that it shows, by which the page filters it."""


def gallery(
    results: pd.DataFrame,
    front: ParetoFront,
    baseline: Mapping[str, float],
    pick: str | None,
    chances: Mapping[str, float],
    keep: Collection[str] = (),
) -> Iterator[Plot]:
    """The figures that these results can fill, in reading order. chances: trial_id -> chance of being on the front.
    keep: settings to draw, besides the front and the pick, if there are too many to draw all."""
    shown = front_info(results, objectives=front.objectives, baseline=baseline, pick=pick, chances=chances, keep=keep)
    if shown.points:
        yield _front_plot(shown)
    mapped = [name for name in ("reliability", "generalization", "capability_change") if has_values(results, name)]
    for metric in mapped if results[["layer", "module"]].drop_duplicates().shape[0] > 1 else ():
        caption = maps.HEATMAP_CAPTION if metric == mapped[0] else ""
        caption = "In percentage points: blue is a gain, orange a loss." if metric == "capability_change" else caption
        yield page_plot(
            f"map-{metric.replace('_', '-')}", f"{TITLES[metric].capitalize()} by layer and module",
            maps.heatmap_figure(maps.heatmap_info(results, metric, pick=pick)), caption,
            f"Heat map of {TITLES[metric]} over layers and modules; the table of all trials holds the values.",
        )  # fmt: skip
    losses = curves.loss_info(results, front=front.trial_ids, pick=pick)
    if losses.curves:
        pipeline = f" ({losses.pipeline.replace('_', '-')} trials)" if losses.pipeline else ""
        more = f"; {losses.left_out:,} more trials are not drawn." if losses.left_out else "."
        caption = f"Mean loss over the edits{pipeline}{more}"
        yield page_plot("losses", "Training loss", curves.loss_figure(losses), caption, "Training loss by epoch.")
    yield from _stream_plots(results)
    if filled := fillings(results):
        yield _capacity_plot(filled)
    for metric in ("reliability", "capability"):
        pairs = curves.pipeline_info(results, metric)
        if pairs.pairs:
            means = "; ".join(f"batch {size}: {points(gap)} points" for size, gap, _ in pairs.mean_difference)
            yield page_plot(
                f"pipelines-{metric}", f"Breadth-first against depth-first: {metric}", curves.pipeline_figure(pairs),
                f"Pairs of settings that agree in everything else. Mean advantage of breadth-first: {means}."
                + _left_out(pairs.left_out, "pairs", "the means cover all"),
                f"{metric.capitalize()} of {plural(len(pairs.pairs), 'pair')} of settings. Mean advantage of"
                f" breadth-first: {means}.",
                wide=False,
            )  # fmt: skip
    parallel = curves.parallel_info(results, keep={*front.trial_ids, pick, *keep})
    if len(parallel.trial_ids) > 1:
        yield page_plot(
            "parallel", "Everything at once", curves.parallel_figure(parallel),
            "Each line is a setting, coloured by reliability. Drag along an axis to keep only the lines that cross it there,"
            f" in all figures; click the axis to undo that.{_left_out(parallel.left_out, 'settings', DRAWN)}",
            "Parallel coordinates of settings and metrics; the table of all trials holds the values.",
            scrolls=True,
        )  # fmt: skip


def _stream_plots(results: pd.DataFrame) -> Iterator[Plot]:
    if (figure := curves.retention_figure(results)) and figure.data:
        yield page_plot(
            "retention", "What a stream retains", figure,
            "Reliability at the end of each tenth of the edits, in the order in which they arrived. A line that rises to the"
            " right forgets; a level one does not. Dotted: the first tenth, measured again as more arrived.",
            "Reliability by time of arrival, a line per setting.",
        )  # fmt: skip
    if figure := curves.latency_figure(results):
        yield page_plot(
            "latency", "From arrival to live", figure,
            "Training time of the edits that arrive together: the median over all arrivals, with a bar to the 95th"
            " percentile. Replaying earlier edits takes time and preserves them.",
            "Seconds from arrival to live, a row per setting.",
        )  # fmt: skip


def _capacity_plot(filled: Sequence[Filling]) -> Plot:
    """For a study with several numbers of edits."""
    law = law_of(filled)
    said = [*(one.sentence() for one in filled), *([f"{law.sentence()}: the band"] if law else [])]
    return page_plot(
        "capacity", "How many edits fit", curves.capacity_figure(filled, law),
        "Bits are the targets' information given the unedited model. A cross marks where reliability falls below 95%. "
        + ". ".join(said) + ".",
        "Reliability by bits per trained parameter, a line per position and setting.",
    )  # fmt: skip


def _front_plot(info: FrontInfo) -> Plot:
    x, y = (TITLES.get(name, name) for name in info.objectives)
    barred = ", the bars are 95% intervals " + ("on the front" if info.n_barred > 1 else "of the pick")
    return page_plot(
        "front", f"{x.capitalize()} against {y}", front_figure(info),
        f"Each mark is a setting: its colour is the depth of the layer, its shape the module. Up and to the right is"
        f" better. The dotted step is the front ({plural(info.n_front, 'setting')}), the ring the pick"
        f"{barred if info.n_barred else ''}.{_left_out(info.left_out, 'settings', DRAWN)}",
        f"Scatter of {x} and {y} of {plural(len(info.points), 'setting')}; the table of the front above holds its best"
        " ones.",
    )  # fmt: skip


def comparison_plot(found: Comparison) -> Plot | None:
    """Both fronts in one figure, a colour each; None if one of the studies has no settings with both metrics."""
    y = "capability_change" if found.capability else "generalization"
    if not all(len(comparable(study.results, ("reliability", y))) for study in found.studies):
        return None
    here, there = (
        front_info(study.results, objectives=("reliability", y), pick=pick.trial_id if pick else None)
        for study, pick in zip(found.studies, found.picks, strict=True)
    )
    return page_plot(
        "compared-fronts", "Both fronts", front_figure(here, there, found.names),
        "Opaque marks are on their study's front, rings mark the picks. Up and to the right is better."
        + _left_out(here.left_out + there.left_out, "settings", DRAWN),
        f"Scatter of reliability and {TITLES[y]} of both studies with their fronts.",
    )  # fmt: skip


def probe_plot(results: pd.DataFrame, probe: Sequence[tuple[int, str, float]], pick: str | None) -> Plot | None:
    """What the probe expected against what was measured; None where fewer than two positions were run."""
    figure, run, rank = maps.probe_figure(results, probe, pick)
    if run < 2:
        return None
    said = f" Spearman's correlation is {rank:.2f}." if math.isfinite(rank) else ""
    return page_plot(
        "probe", "The probe's order against the drift measured", figure,
        f"Each mark is a position that was run, {run} of {len(probe):,} that were probed. The further left,"
        f" the less the probe expects training there to disturb; the lower, the less it did. The ring is the pick.{said}",
        f"Scatter of disturbance and drift of {plural(run, 'position')}; the tables below hold the runs.",
    )  # fmt: skip


def _left_out(count: int, what: str, but: str) -> str:
    """What a caption says about marks that are not drawn."""
    return f" {count:,} more {what} are not drawn (chosen at random); {but}." if count else ""


def page_plot(id: str, title: str, figure: go.Figure, caption: str, description: str, **shape: bool) -> Plot:
    """A figure for a page. shape: fields of `Plot`."""
    found = [trace.customdata for trace in figure.data if trace.customdata is not None]
    rows = [item if isinstance(item, list | tuple) else [item] for items in found for item in items]  # maps hold lists
    trials = frozenset(trial for row in rows for trial in row if trial is not None)
    data = script_json(figure.to_plotly_json())
    return Plot(id, title, caption, description, data, int(figure.layout.height), trials=trials, **shape)


@functools.cache
def packed_plotly() -> Markup:
    """plotly.js as base64 of gzip, 1.9 MB instead of 4.8, for the page's script to unpack."""
    packed = gzip.compress(get_plotlyjs().encode(), mtime=0)
    return Markup(base64.b64encode(packed).decode())


def script_json(value: Any) -> Markup:
    """A value as JSON that is safe inside a script element."""
    text = json.dumps(
        value, separators=(",", ":"), allow_nan=False, ensure_ascii=False, default=lambda array: array.tolist()
    )
    # "</script" would end the script element, "<!--" and "<script" confuse it; JSON has another way to write "<"
    return Markup(re.sub("<(?=[/!sS])", r"\\u003c", text))
