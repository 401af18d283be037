"""The figure of the front, in two steps like most figures: `front_info` reads the results table into a frozen record of
what to show, `front_figure` draws that record with plotly. Tests look at the info; the drawing has no logic of its own.

Every mark's hover text names its trial. User text is escaped, since plotly interprets some HTML.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any

import pandas as pd
import plotly.graph_objects as go

from analysis.figures.style import ACCENT, BLUE, INK, MUTED, add_ring, hover_text, styled_figure, thinned
from analysis.stats.pareto import DEFAULT_OBJECTIVES, ParetoFront, comparable, pareto_front
from analysis.stats.table import TITLES, by_setting, interval, position_of
from analysis.stats.wording import escaped

SYMBOLS = (
    "circle", "square", "diamond", "triangle-up", "pentagon", "cross", "x", "hexagon", "triangle-down", "hourglass",
)  # fmt: skip
STUDY_COLOURS = (BLUE, "#009e73")
"""Colours of two studies in one figure, both different from the pick's."""
MAX_MARKS = 1000
"""Maximum number of settings in the figure of the front; the info says how many were left out."""
MAX_BARS = 24
"""Up to this many settings on the front, each has the bars of its intervals; with more, only the pick has."""


@dataclass(frozen=True)
class FrontPoint:
    trial_id: str
    position: str
    module: str
    depth: float
    values: tuple[float, float]
    """Values of the two objectives, x and y."""
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
        """Number of settings with bars."""
        return sum(bool(_ends(mark, 0) or _ends(mark, 1)) for mark in self.points)


def front_info(
    results: pd.DataFrame,
    *,
    objectives: Sequence[str] = DEFAULT_OBJECTIVES,
    baseline: Mapping[str, float] = MappingProxyType({}),
    pick: str | None = None,
    chances: Mapping[str, float] = MappingProxyType({}),
    keep: Collection[str] = (),
) -> FrontInfo:
    """The trade-off of two objectives over the settings (seeds averaged); diverged and unfinished ones are left out.

    chances: trial_id -> how likely it is on the front (`analysis.stats.bootstrap`), for the hover texts.
    keep: settings that are always drawn, like the front and the pick.
    """
    x, y = objectives
    settings = by_setting(results)
    rows = comparable(settings, (x, y))
    front = pareto_front(settings, (x, y))
    drawn = thinned(list(rows["trial_id"]), {*front.trial_ids, *keep, pick}, MAX_MARKS)
    barred = {pick, *(front.trial_ids if len(front.trial_ids) <= MAX_BARS else ())}
    marks = tuple(
        FrontPoint(
            trial_id=row["trial_id"],
            position=position_of(row),
            module=row["module"],
            depth=float(row["depth"]),
            values=(float(row[x]), float(row[y])),
            on_front=row["trial_id"] in front.trial_ids,
            hover=hover_text(row, chances.get(row["trial_id"])),
            intervals=(interval(row, x), interval(row, y)) if row["trial_id"] in barred else None,
        )
        for row in rows[rows["trial_id"].isin(drawn)].to_dict("records")
    )
    return FrontInfo(
        objectives=(x, y),
        points=marks,
        modules=tuple(dict.fromkeys(mark.module for mark in marks)),
        step=tuple(front_step(front, [mark.values for mark in marks])),
        pick=pick if any(mark.trial_id == pick for mark in marks) else None,
        unedited={"capability": baseline.get("capability"), "capability_change": 0.0}.get(y),
        n_front=len(front.trial_ids),
        left_out=len(rows) - len(marks),
    )


def front_step(front: ParetoFront, points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the line of a front of two objectives, from the left edge of these points down to their bottom edge."""
    if not points:
        return []
    (left, bottom), marks = map(min, zip(*points, strict=True)), sorted({(x, y) for x, y in front.points})
    down = [corner for (a, _), (b, y) in pairwise(marks) for corner in ((a, y), (b, y))]
    return [(left, marks[0][1]), marks[0], *down, (marks[-1][0], bottom)]


def front_figure(info: FrontInfo, other: FrontInfo | None = None, names: Sequence[str] = ()) -> go.Figure:
    """Scatter coloured by relative depth, a symbol per module, the front as a step with bars of its intervals, the pick
    ringed. With another study, a colour and a symbol per study (names: of both), each with its front and its pick."""
    x, y = (TITLES.get(name, name) for name in info.objectives)
    figure = styled_figure(height=520, xaxis={"title": {"text": x}}, yaxis={"title": {"text": y}}, dragmode="select")
    studies = (info,) if other is None else (info, other)
    for place, one in enumerate(studies):
        if one.step:
            figure.add_scatter(
                x=[a for a, _ in one.step], y=[b for _, b in one.step], mode="lines", name="front", hoverinfo="skip",
                line={"color": STUDY_COLOURS[place] if other else "#5b6675", "width": 1.5, "dash": "dot"},
                showlegend=False,
            )  # fmt: skip
    if other is None:
        groups = [(module, [mark for mark in info.points if mark.module == module]) for module in info.modules]
        figure.update_layout(
            coloraxis={
                "colorscale": "Cividis", "cmin": 0, "cmax": 1,
                "colorbar": {
                    "title": {"text": "depth", "side": "right"}, "thickness": 10, "len": 0.8, "outlinewidth": 0,
                    "tickvals": [0, 0.5, 1], "ticktext": ["first", "middle", "last"],
                },
            }
        )  # fmt: skip
    else:
        groups = [(name, list(one.points)) for name, one in zip(names, studies, strict=True)]
    for index, (name, marks) in enumerate(groups):
        _scatter(figure, name, marks, SYMBOLS[index % len(SYMBOLS)], STUDY_COLOURS[index] if other else None)
    if info.unedited is not None:
        figure.add_hline(
            y=info.unedited, line={"color": MUTED, "width": 1.5, "dash": "dash"},
            annotation={"text": "unedited model", "font": {"color": "#5b6675"}, "xanchor": "left", "x": 0},
            annotation_position="bottom left" if any(b > info.unedited for _, b in info.step) else "top left",
        )  # fmt: skip
    for place, one in enumerate(studies):
        name = "pick" if place == 0 else f"pick of {escaped(names[1])}"
        _ring(figure, one, name, STUDY_COLOURS[place] if other else ACCENT)
    marks = [mark for one in studies for mark in one.points]
    xs, ys = ([end for mark in marks for end in (mark.values[axis], *_ends(mark, axis))] for axis in (0, 1))
    ys += [info.unedited] if info.unedited is not None else []
    spread = max(ys, default=1.0) - min(ys, default=0.0)
    figure.update_layout(
        xaxis={"tickformat": ".0%", "range": _padded(xs, least=0.03)},
        yaxis={"tickformat": ".1%" if spread < 0.1 else ".0%", "range": _padded(ys, least=0.006)},
    )
    return figure


def _scatter(figure: go.Figure, name: str, marks: Sequence[FrontPoint], symbol: str, colour: str | None) -> None:
    """colour: of all marks; None colours them by depth."""
    depths = [round(mark.depth, 4) for mark in marks]
    figure.add_scatter(
        x=[round(mark.values[0], 5) for mark in marks],
        y=[round(mark.values[1], 5) for mark in marks],
        mode="markers",
        name=escaped(name),
        customdata=[mark.trial_id for mark in marks],
        text=[mark.hover for mark in marks],
        hovertemplate="%{text}<extra></extra>",
        error_x=_bars(marks, 0),
        error_y=_bars(marks, 1),
        marker={
            "symbol": symbol,
            "size": [13 if mark.on_front else 9 for mark in marks],
            "opacity": [1.0 if mark.on_front else 0.4 if colour else 0.75 for mark in marks],
            "line": {"width": [1.6 if mark.on_front else 0.6 for mark in marks], "color": INK},
            **({"color": colour} if colour else {"color": depths, "coloraxis": "coloraxis"}),
        },
    )


def _ring(figure: go.Figure, info: FrontInfo, name: str, colour: str) -> None:
    """Ring the pick and label it with its position. The page's script moves the trace and the annotation that are named "pick"."""
    for mark in (mark for mark in info.points if mark.trial_id == info.pick):
        add_ring(figure, *mark.values, name, colour)
        left = mark.values[0] > sum(corner[0] for corner in info.step[:1] + info.step[-1:]) / 2
        figure.add_annotation(
            x=mark.values[0], y=mark.values[1], text=f"<b>{escaped(mark.position)}</b>", showarrow=True,
            arrowhead=0, arrowcolor=colour, ax=-46 if left else 46, ay=34, standoff=13,
            font={"color": colour, "size": 15}, bgcolor="rgba(255,255,255,0.8)", name=name,
        )  # fmt: skip


def _ends(mark: FrontPoint, axis: int) -> tuple[float, ...]:
    """Ends of the error bar along an axis; none if the interval is not known."""
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
    """The range of an axis: all values, plus 7% but at least `least` on both sides."""
    if not values:
        return [0.0, 1.0]
    pad = max(0.07 * (max(values) - min(values)), least)
    return [min(values) - pad, max(values) + pad]
