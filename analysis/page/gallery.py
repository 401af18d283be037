"""The figures of a page, with their titles and captions, and the frame that pages are drawn in.

Those of the report, in reading order: all that the results can fill.
"""

import base64
import functools
import gzip
import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jinja2
import pandas as pd
import plotly.graph_objects as go
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from analysis.figures import front as figures
from analysis.figures.style import TITLES
from analysis.stats.pareto import comparable
from analysis.stats.table import by_setting, has_values
from analysis.stats.wording import plural, points

DRAWN = "the front, the pick and the best of each position are"


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
    """Across the page; otherwise two share a row where there is room."""
    scrolls: bool = False
    """Needs more width than a phone has: scrolls inside its frame."""
    trials: frozenset[str] = frozenset()
    """Ids of the trials that it shows, by which the page filters it."""


def gallery(
    results: pd.DataFrame,
    objectives: tuple[str, str],
    baseline: Mapping[str, float],
    front: tuple[str, ...],
    pick: str | None,
    chances: Mapping[str, float],
    keep: Collection[str] = (),
) -> list[Plot]:
    """The figures that these results can fill, in reading order. chances: of being on the front, by trial_id. keep:
    settings to draw where there are too many to draw all, beside front and pick."""
    plots: list[Plot] = []
    x, y = (TITLES.get(name, name) for name in objectives)
    if len(comparable(by_setting(results), objectives)):
        info = figures.front_info(
            results, objectives=objectives, baseline=baseline, pick=pick, chances=chances, keep=keep
        )
        barred = ", the bars are 95% intervals " + ("on the front" if info.n_barred > 1 else "of the pick")
        plots.append(
            page_plot(
                "front", f"{x.capitalize()} against {y}", figures.front_figure(info),
                f"Each mark is a setting: its colour is the depth of the layer, its shape the module. Up and to the"
                f" right is better. The dotted step is the front ({plural(info.n_front, 'setting')}), the ring the pick"
                f"{barred if info.n_barred else ''}.{_left_out(info.left_out, 'settings', DRAWN)}",
                f"Scatter of {x} and {y} of {plural(len(info.points), 'setting')}; the table of the front above holds"
                " its best ones.",
            )
        )  # fmt: skip
    maps = [name for name in ("reliability", "generalization", "capability_change") if has_values(results, name)]
    for metric in maps if results[["layer", "module"]].drop_duplicates().shape[0] > 1 else ():
        title = TITLES[metric].capitalize()
        caption = figures.HEATMAP_CAPTION if metric == maps[0] else ""
        caption = "In percentage points: blue is a gain, orange a loss." if metric == "capability_change" else caption
        plots.append(
            page_plot(
                f"map-{metric.replace('_', '-')}", f"{title} by layer and module",
                figures.heatmap_figure(figures.heatmap_info(results, metric, pick=pick)), caption,
                f"Heat map of {TITLES[metric]} over layers and modules; the table of all trials holds the values.",
            )
        )  # fmt: skip
    losses = figures.loss_info(results, front=front, pick=pick)
    if losses.curves:
        caption = "Mean loss over the edits" + (
            f" ({losses.pipeline.replace('_first', '-first')} trials)" if losses.pipeline else ""
        )
        caption += f"; {losses.left_out:,} more trials are not drawn." if losses.left_out else "."
        plots.append(page_plot("losses", "Training loss", figures.loss_figure(losses), caption, "Training loss by epoch."))
    for metric in ("reliability", "capability"):
        pairs = figures.pipeline_info(results, metric) if has_values(results, metric) else None
        if pairs is None or not pairs.pairs:
            continue
        means = "; ".join(f"batch {size}: {points(gap)} points" for size, gap, _ in pairs.mean_difference)
        plots.append(
            page_plot(
                f"pipelines-{metric}", f"Breadth-first against depth-first: {metric}", figures.pipeline_figure(pairs),
                f"Pairs that agree in everything else. Mean advantage of breadth-first: {means}."
                + _left_out(pairs.left_out, "pairs", "the means are of all"),
                f"{metric.capitalize()} of {plural(len(pairs.pairs), 'pair')} of settings. Mean advantage of"
                f" breadth-first: {means}.",
                wide=False,
            )
        )  # fmt: skip
    parallel = figures.parallel_info(results, keep={*front, *((pick,) if pick else ()), *keep})
    if len(parallel.trial_ids) > 1:
        plots.append(
            page_plot(
                "parallel", "Everything at once", figures.parallel_figure(parallel),
                "A line is a setting, coloured by reliability. Drag along an axis to keep the lines that cross there, here"
                f" and in all figures; click the axis to let go.{_left_out(parallel.left_out, 'settings', DRAWN)}",
                "Parallel coordinates of settings and metrics; the table of all trials holds the values.",
                scrolls=True,
            )
        )  # fmt: skip
    return plots


def _left_out(count: int, what: str, but: str) -> str:
    """What a caption says of marks that are not drawn."""
    return f" {count:,} more {what} are not drawn, picked at random; {but}." if count else ""


def page_template(name: str) -> jinja2.Template:
    """A page of this package by its file's name; autoescape is on."""
    return _PAGES.get_template(name)


_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("analysis.page", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)


def page_plot(id: str, title: str, figure: go.Figure, caption: str, description: str, **shape: bool) -> Plot:
    """A figure for a page. shape: fields of `Plot`."""
    data = script_json(figure.to_plotly_json())
    return Plot(id, title, caption, description, data, int(figure.layout.height), trials=_trials(figure), **shape)


def _trials(figure: go.Figure) -> frozenset[str]:
    """What the traces carry as `customdata`: a list, or one a row of a map."""
    found = [item for trace in figure.data for item in (trace.customdata if trace.customdata is not None else ())]
    rows = [item if isinstance(item, list | tuple) else [item] for item in found]
    return frozenset(trial for row in rows for trial in row if trial is not None)


@functools.cache
def packed_plotly() -> Markup:
    """plotly.js as base64 of gzip, 1.9 MB instead of 4.8, for the page's script to unpack."""
    packed = gzip.compress(get_plotlyjs().encode(), mtime=0)
    return Markup(base64.b64encode(packed).decode())


def script_json(value: Any) -> Markup:
    """A value as JSON that is safe inside a script element."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False, ensure_ascii=False, default=_jsonable)
    # "</script" would end the script element, "<!--" and "<script" confuse it; JSON has another way to write "<"
    return Markup(re.sub("<(?=[/!sS])", r"\\u003c", text))


def _jsonable(value: Any) -> Any:
    return value.tolist()
