"""The plots of a study, each in two steps: `*_info` reads the results table into a frozen record of what is to be seen,
`*_figure` draws that record with plotly. Tests look at the info; the drawing has no logic of its own.

Every mark's hover names its trial. User text is escaped, since plotly reads some HTML. The colours are those of
`analysis.figures.style`; loss curves, pipelines and parallel coordinates are in `analysis.figures.curves` and named here as well.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.curves import (
    LossInfo,
    ParallelInfo,
    PipelineInfo,
    loss_figure,
    loss_info,
    parallel_figure,
    parallel_info,
    pipeline_figure,
    pipeline_info,
)
from analysis.stats.intervals import interval
from analysis.figures.style import ACCENT, INK, MUTED, TITLES, hover_text, styled_figure
from analysis.stats.pareto import DEFAULT_OBJECTIVES, ParetoFront, comparable, pareto_front
from analysis.stats.pick import best_by_position
from analysis.stats.table import by_setting
from analysis.figures.thinning import thinned
from analysis.stats.wording import escaped

__all__ = [
    "FrontInfo", "HeatmapInfo", "LossInfo", "ParallelInfo", "PipelineInfo", "HEATMAP_CAPTION", "front_figure",
    "front_info", "heatmap_figure", "heatmap_info", "loss_figure", "loss_info", "parallel_figure", "parallel_info",
    "pipeline_figure", "pipeline_info",
]  # fmt: skip

SYMBOLS = (
    "circle",
    "square",
    "diamond",
    "triangle-up",
    "pentagon",
    "cross",
    "x",
    "hexagon",
    "triangle-down",
    "hourglass",
)
MAX_MARKS = 1000
"""Settings in the figure of the front at most; the info says how many were left out."""
MAX_BARS = 24
"""Settings on the front up to which each has the bars of its intervals; of more only the pick has."""
CHANGE_SCALE = ((0.0, "#b35806"), (0.25, "#f1a340"), (0.5, "#f7f7f7"), (0.75, "#67a9cf"), (1.0, "#2166ac"))
"""Losses orange, gains blue."""


@dataclass(frozen=True)
class FrontPoint:
    trial_id: str
    position: str
    module: str
    depth: float
    values: tuple[float, float]
    """Of the two objectives, x and y."""
    on_front: bool
    hover: str
    intervals: tuple[tuple[float, float], tuple[float, float]] | None
    """95% intervals of the two values; None where no bars are to be drawn."""


@dataclass(frozen=True)
class FrontInfo:
    objectives: tuple[str, str]
    points: tuple[FrontPoint, ...]
    modules: tuple[str, ...]
    """In order of first appearance: each has a symbol."""
    step: tuple[tuple[float, float], ...]
    """Corners of the front's line, from the left: what lies below and left of it is reached by some trial."""
    pick: str | None
    """trial_id of the marked point."""
    unedited: float | None
    """The unedited model's value of the second objective, a reference line."""
    n_front: int
    left_out: int
    """Settings that are not drawn because there are too many."""

    @property
    def n_barred(self) -> int:
        """Settings with bars."""
        return sum(bool(_ends(mark, 0) or _ends(mark, 1)) for mark in self.points)


def front_info(
    results: pd.DataFrame,
    *,
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
    baseline: Mapping[str, float] | None = None,
    pick: str | None = None,
    chances: Mapping[str, float] | None = None,
    keep: Collection[str] = (),
) -> FrontInfo:
    """The trade-off of two objectives over the settings (seeds averaged); diverged and unfinished ones are left out.

    chances: trial_id -> how likely it is on the front (`analysis.stats.bootstrap`), for the hover texts.
    keep: settings to draw however many there are, beside front and pick.
    """
    x, y = objectives
    settings = by_setting(results)
    rows = comparable(settings, (x, y))
    front = pareto_front(settings, (x, y))
    drawn = thinned(list(rows["trial_id"]), {*front.trial_ids, *keep, *((pick,) if pick else ())}, MAX_MARKS)
    barred = {pick, *(front.trial_ids if len(front.trial_ids) <= MAX_BARS else ())}
    marks = tuple(
        FrontPoint(
            trial_id=row["trial_id"],
            position=f"{row['layer']}.{row['module']}",
            module=row["module"],
            depth=float(row["depth"]),
            values=(float(row[x]), float(row[y])),
            on_front=row["trial_id"] in front.trial_ids,
            hover=hover_text(row, (chances or {}).get(row["trial_id"])),
            intervals=(interval(row, x), interval(row, y)) if row["trial_id"] in barred else None,
        )
        for row in rows[rows["trial_id"].isin(drawn)].to_dict("records")
    )
    unedited = float((baseline or {}).get(y, math.nan))
    if y == "capability_change":
        unedited = 0.0
    return FrontInfo(
        objectives=(x, y),
        points=marks,
        modules=tuple(dict.fromkeys(mark.module for mark in marks)),
        step=tuple(front_step(front, [mark.values for mark in marks])),
        pick=pick if any(mark.trial_id == pick for mark in marks) else None,
        unedited=unedited if math.isfinite(unedited) and y.startswith("capability") else None,
        n_front=len(front.trial_ids),
        left_out=len(rows) - len(marks),
    )


def front_step(front: ParetoFront, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line of a front of two objectives, from the left end of these points and down to their bottom."""
    corners: list[tuple[float, float]] = []
    for point in sorted(set(front.points)):
        if corners:
            corners.append((corners[-1][0], point[1]))
        corners.append(point)
    if not corners:
        return []
    left, bottom = min(x for x, _ in points), min(y for _, y in points)
    return [(left, corners[0][1]), *corners, (corners[-1][0], bottom)]


def front_figure(info: FrontInfo) -> go.Figure:
    """Scatter coloured by relative depth, a symbol per module, the front as a step with bars of its intervals, the pick
    ringed."""
    x, y = (TITLES.get(name, name) for name in info.objectives)
    figure = styled_figure(height=520, xaxis={"title": {"text": x}}, yaxis={"title": {"text": y}}, dragmode="select")
    if info.step:
        figure.add_scatter(
            x=[a for a, _ in info.step], y=[b for _, b in info.step], mode="lines", name="front", hoverinfo="skip",
            line={"color": "#5b6675", "width": 1.5, "dash": "dot"}, showlegend=False,
        )  # fmt: skip
    for index, module in enumerate(info.modules):
        marks = [mark for mark in info.points if mark.module == module]
        figure.add_scatter(
            x=[round(mark.values[0], 5) for mark in marks],
            y=[round(mark.values[1], 5) for mark in marks],
            mode="markers",
            name=escaped(module),
            customdata=[mark.trial_id for mark in marks],
            text=[mark.hover for mark in marks],
            hovertemplate="%{text}<extra></extra>",
            error_x=_bars(marks, 0),
            error_y=_bars(marks, 1),
            marker={
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "size": [13 if mark.on_front else 9 for mark in marks],
                "opacity": [1.0 if mark.on_front else 0.75 for mark in marks],
                "color": [round(mark.depth, 4) for mark in marks],
                "coloraxis": "coloraxis",
                "line": {"width": [1.6 if mark.on_front else 0.6 for mark in marks], "color": INK},
            },
        )
    figure.update_layout(
        coloraxis={
            "colorscale": "Cividis", "cmin": 0, "cmax": 1,
            "colorbar": {
                "title": {"text": "depth", "side": "right"}, "thickness": 10, "len": 0.8, "outlinewidth": 0,
                "tickvals": [0, 0.5, 1], "ticktext": ["first", "middle", "last"],
            },
        }
    )  # fmt: skip
    if info.unedited is not None:
        figure.add_hline(
            y=info.unedited, line={"color": MUTED, "width": 1.5, "dash": "dash"},
            annotation={"text": "unedited model", "font": {"color": "#5b6675"}, "xanchor": "left", "x": 0},
            annotation_position="bottom left" if any(y > info.unedited for _, y in info.step) else "top left",
        )  # fmt: skip
    for mark in info.points:
        if mark.trial_id == info.pick:
            figure.add_scatter(
                x=[mark.values[0]], y=[mark.values[1]], mode="markers", name="pick", hoverinfo="skip",
                marker={"symbol": "circle-open", "size": 25, "color": ACCENT, "line": {"width": 3}},
            )  # fmt: skip
            left = mark.values[0] > sum(corner[0] for corner in info.step[:1] + info.step[-1:]) / 2
            figure.add_annotation(
                x=mark.values[0], y=mark.values[1], text=f"<b>{escaped(mark.position)}</b>", showarrow=True,
                arrowhead=0, arrowcolor=ACCENT, ax=-46 if left else 46, ay=34, standoff=13,
                font={"color": ACCENT, "size": 15}, bgcolor="rgba(255,255,255,0.8)", name="pick",
            )  # fmt: skip
    xs, ys = ([end for mark in info.points for end in (mark.values[axis], *_ends(mark, axis))] for axis in (0, 1))
    ys += [info.unedited] if info.unedited is not None else []
    figure.update_layout(
        xaxis={"tickformat": ".0%", "range": _padded(xs, least=0.03)},
        yaxis={"tickformat": _tickformat(ys), "range": _padded(ys, least=0.006)},
    )
    return figure


def _ends(mark: FrontPoint, axis: int) -> tuple[float, ...]:
    """Of the bar along an axis; none where the interval is not known."""
    return tuple(end for end in mark.intervals[axis] if math.isfinite(end)) if mark.intervals else ()


def _bars(marks: Sequence[FrontPoint], axis: int) -> dict[str, Any]:
    """plotly's error bars along an axis, None where a mark has none."""
    ends = [_ends(mark, axis) for mark in marks]
    if not any(ends):
        return {}
    return {
        "type": "data", "symmetric": False, "color": "rgba(86,96,110,0.55)", "thickness": 1.2, "width": 3,
        "array": [round(end[1] - mark.values[axis], 5) if end else None for end, mark in zip(ends, marks, strict=True)],
        "arrayminus": [round(mark.values[axis] - end[0], 5) if end else None for end, mark in zip(ends, marks, strict=True)],
    }  # fmt: skip


def _padded(values: Sequence[float], least: float) -> list[float]:
    """The range of an axis: all values, and 7% or at least `least` on both sides."""
    if not values:
        return [0.0, 1.0]
    pad = max(0.07 * (max(values) - min(values)), least)
    return [min(values) - pad, max(values) + pad]


@dataclass(frozen=True)
class HeatmapInfo:
    metric: str
    layers: tuple[int, ...]
    """Columns."""
    modules: tuple[str, ...]
    """Rows."""
    values: tuple[tuple[float | None, ...], ...]
    """values[row][column]; None where nothing was measured."""
    hover: tuple[tuple[str, ...], ...]
    trial_ids: tuple[tuple[str | None, ...], ...]
    limits: tuple[float, float]
    """Of the colours. Symmetric about 0 for a change."""
    pick: tuple[int, int] | None
    """(row, column) of the cell that shows the picked trial; None when that is not among the best of its cell."""


HEATMAP_CAPTION = (
    "Each cell shows the best setting tried there: the highest reliability, then the highest capability. "
    "The maps show the same setting in the same cell; an empty cell was not tried, failed or diverged."
)


def heatmap_info(results: pd.DataFrame, metric: str = "reliability", *, pick: str | None = None) -> HeatmapInfo:
    """A metric over layer and module, of the best setting (reliability, then capability; seeds averaged) in each cell.
    The same settings whatever the metric, so that maps of several metrics can be read together."""
    settings = by_setting(results)
    tried = results[["layer", "module"]].drop_duplicates()
    layers = tuple(sorted({int(layer) for layer in tried["layer"]}))
    modules = tuple(dict.fromkeys(tried["module"]))
    best = best_by_position(settings)
    found = [[best.get((layer, module)) for layer in layers] for module in modules]

    def value(row: dict[str, Any] | None) -> float | None:
        return float(row[metric]) if row is not None and math.isfinite(row[metric]) else None

    values = tuple(tuple(value(row) for row in line) for line in found)
    flat = [x for line in values for x in line if x is not None]
    if metric == "capability_change":
        edge = max((abs(x) for x in flat), default=0.0) or 0.01
        limits = (-edge, edge)
    else:
        limits = (
            (0.0, 1.0)
            if metric in TITLES and "drift" not in metric
            else (min(flat, default=0.0), max(flat, default=1.0))
        )
    trial_ids = tuple(tuple(None if row is None else row["trial_id"] for row in line) for line in found)
    cells = [(i, j) for i, line in enumerate(trial_ids) for j, trial in enumerate(line) if trial is not None]
    return HeatmapInfo(
        metric=metric,
        layers=layers,
        modules=modules,
        values=values,
        hover=tuple(
            tuple(
                hover_text(row) if row is not None else f"<b>{layer}.{escaped(module)}</b><br>no result"
                for layer, row in zip(layers, line, strict=True)
            )
            for module, line in zip(modules, found, strict=True)
        ),
        trial_ids=trial_ids,
        limits=limits,
        pick=next(((i, j) for i, j in cells if trial_ids[i][j] == pick), None),
    )


def heatmap_figure(info: HeatmapInfo) -> go.Figure:
    """Layers from left to right, a row per module; a colour centred on 0 for a change."""
    change = info.metric == "capability_change"
    form = "+.1~f" if change else ".2~f" if "drift" in info.metric else ".0%"
    low, high = info.limits
    figure = styled_figure(
        height=120 + 34 * max(2, len(info.modules)),
        xaxis={
            "title": {"text": "layer"}, "showgrid": False, "type": "category", "tickangle": 0, "tick0": 0,
            "dtick": max(1, math.ceil(len(info.layers) / 16)),
        },
        yaxis={"showgrid": False, "type": "category", "autorange": "reversed", "ticklabelstandoff": 6},
        dragmode="select",
    )  # fmt: skip
    figure.add_heatmap(
        x=[str(layer) for layer in info.layers],
        y=[escaped(module) for module in info.modules],
        z=[[None if x is None else round(100 * x if change else x, 4) for x in line] for line in info.values],
        text=[list(line) for line in info.hover],
        customdata=[list(line) for line in info.trial_ids],
        hovertemplate="%{text}<extra></extra>",
        hoverongaps=True,
        colorscale=[list(stop) for stop in CHANGE_SCALE] if change else "Viridis",
        zmin=100 * low if change else low, zmax=100 * high if change else high,
        xgap=1, ygap=1,
        colorbar={"thickness": 10, "outlinewidth": 0, "tickformat": form, "nticks": 5},
    )  # fmt: skip
    figure.update_layout(plot_bgcolor="#eceef1")
    row, column = info.pick or (0, 0)  # the page moves the frame where the pick moves
    figure.add_shape(
        type="rect", name="pick", visible=info.pick is not None, line={"color": ACCENT, "width": 3},
        x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5,
    )  # fmt: skip
    return figure


def _tickformat(values: Sequence[float]) -> str:
    """Decimals by the range to be read off."""
    return ".1%" if values and max(values) - min(values) < 0.1 else ".0%"
