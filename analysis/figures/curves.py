"""Plots of how settings arrived at their results: loss curves, what a stream retains, how many edits fit, breadth-first
against depth-first, and parallel coordinates.

Most are made in two steps: `*_info` reads the results table, `*_figure` draws the info. Marks and lines carry their
trial's id as `customdata`, by which the page filters them.
"""

import json
import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.colors import qualitative

from analysis.figures.style import ACCENT, BLUE, INK, MUTED, styled_figure, thinned
from analysis.stats.axes import AXIS, STAGES, SWEPT, Axis
from analysis.stats.capacity import LEVEL, Filling, Law
from analysis.stats.pareto import comparable
from analysis.stats.table import (
    FRACTIONS,
    SETTING_AXES,
    TITLES,
    by_setting,
    done,
    position_of,
    setting_names,
    setting_text,
    value_text,
)
from analysis.stats.wording import escaped

MAX_CURVES = 150
"""Maximum number of loss curves drawn; the info says how many were left out."""
PALETTE = qualitative.Safe
MAX_PAIRS = 200
"""Maximum number of pairs of pipelines drawn; the mean difference is over all pairs."""
MAX_LINES = 1000
"""Maximum number of settings in the parallel coordinates."""


@dataclass(frozen=True)
class LossCurve:
    trial_id: str
    label: str
    depth: float
    losses: tuple[float | None, ...]
    """By epoch (breadth-first), batch (depth-first) or arrival (stream); None where the loss was not finite and positive."""
    highlight: str
    """pick, front or other."""


@dataclass(frozen=True)
class LossInfo:
    curves: tuple[LossCurve, ...]
    pipeline: str | None
    """The one whose curves these are, breadth-first if it was run: pipelines have different x axes."""
    left_out: int


def loss_info(results: pd.DataFrame, *, front: Sequence[str] = (), pick: str | None = None) -> LossInfo:
    """Training loss of the finished trials. The trials of `front` and the `pick` stand out, and are left out last."""
    rows = done(results)
    rows = rows[rows["epoch_losses"].map(len).gt(0).astype(bool)]
    pipelines = set(rows["pipeline"])
    pipeline = next((name for name in AXIS["pipeline"].choices if name in pipelines), None)
    rows = rows[rows["pipeline"] == pipeline]
    rank = dict.fromkeys(front, 1) | {pick: 0}
    ordered = rows.sort_values("trial_id", key=lambda ids: ids.map(lambda trial: rank.get(trial, 2)), kind="stable")
    curves = []
    for row in ordered.head(MAX_CURVES).to_dict("records"):
        usable = tuple(float(f"{x:.4g}") if math.isfinite(x) and x > 0 else None for x in row["epoch_losses"])
        label = escaped(", ".join(filter(None, (position_of(row), setting_text(row)))))
        kind = ("pick", "front", "other")[rank.get(row["trial_id"], 2)]
        curves.append(LossCurve(row["trial_id"], label, row["depth"], usable, kind))
    return LossInfo(curves=tuple(curves), pipeline=pipeline, left_out=len(rows) - len(curves))


def loss_figure(info: LossInfo) -> go.Figure:
    """Loss against epoch on a logarithmic axis: the pick bold, the front in colour, the others in grey behind."""
    unit = {"depth_first": "batch", "stream": "arrival"}.get(info.pipeline or "", "epoch")
    figure = styled_figure(
        height=400,
        xaxis={"title": {"text": unit}, "rangemode": "tozero"},
        yaxis={"title": {"text": "training loss"}, "type": "log", "dtick": 1, "tickformat": "~g"},
        hovermode="closest",
    )
    looks = (
        ("other", "other settings", "#b3bac4", 0.8),
        ("front", "on the front", BLUE, 1.6),
        ("pick", "pick", ACCENT, 3.5),
    )
    for kind, name, colour, width in looks:
        curves = [curve for curve in info.curves if curve.highlight == kind]
        if not curves:
            continue
        xs, ys, labels, trials = [], [], [], []
        for curve in curves:  # one trace for all of a kind, with gaps between: hundreds of traces draw slowly
            xs += [*range(1, len(curve.losses) + 1), None]
            ys += [*curve.losses, None]
            labels += [curve.label] * len(curve.losses) + [""]
            trials += [curve.trial_id] * (len(curve.losses) + 1)
        figure.add_scatter(
            x=xs, y=ys, mode="lines+markers" if len(xs) == 2 * len(curves) else "lines", name=name, text=labels,
            customdata=trials,
            line={"color": colour, "width": width}, opacity=0.55 if kind == "other" else 1,
            connectgaps=False, hovertemplate=f"%{{text}}<br>{unit} %{{x}}: loss %{{y:.3g}}<extra></extra>",
        )  # fmt: skip
    return figure


def retention_figure(results: pd.DataFrame) -> go.Figure | None:
    """A line per setting: reliability at the end of each tenth of the edits, in the order of their arrival, as a mean over
    seeds and formats; where stages were measured, a dotted line for the first tenth as more arrived, for the lowest seed.

    None for a study without streams. Settings that train everything together are there for comparison: to them the order
    of arrival means nothing.
    """
    rows = by_setting(results)
    if "stream" not in set(rows["pipeline"]):
        return None
    names = setting_names(rows)
    figure = styled_figure(
        height=400,
        xaxis={"title": {"text": "share of the edits that had arrived"}, "tickformat": ".0%", "range": [0, 1.03]},
        yaxis={"title": {"text": "reliability"}, "tickformat": ".0%", "range": [0, 1.03]},
        hovermode="closest",
    )
    known = (row for row in rows[:MAX_CURVES].itertuples() if isinstance(row.right_by_edit, np.ndarray))
    for index, row in enumerate(row for row in known if len(row.right_by_edit) >= STAGES):
        right, label = row.right_by_edit, escaped(names[row.trial_id])
        tenths = enumerate(np.array_split(right, STAGES), start=1)
        at_end = [(part / STAGES, float(kept.mean())) for part, kept in tenths]
        stages = json.loads(row.stages or "[]")  # the last one is at the end of the stream
        first = [(one["arrived"] / stages[-1]["arrived"], one["first_tenth"]) for one in stages if "first_tenth" in one]
        for points, dash, what in ((at_end, "solid", "at the end"), (first, "dot", "of the first tenth")):
            if points:
                xs, ys = zip(*points, strict=True)
                figure.add_scatter(
                    x=xs, y=ys, mode="lines+markers", name=label, legendgroup=label, showlegend=dash == "solid",
                    line={"color": PALETTE[index % len(PALETTE)], "dash": dash}, customdata=[row.trial_id] * len(xs),
                    hovertemplate=f"{label}<br>{what}, %{{x:.0%}}: %{{y:.0%}}<extra></extra>",
                )  # fmt: skip
    return figure


def latency_figure(results: pd.DataFrame) -> go.Figure | None:
    """Seconds from arrival to live of each setting that has them: the median, and a bar to the 95th percentile. None if
    no setting has them."""
    rows = by_setting(results)
    names, timed = setting_names(rows), rows[np.isfinite(rows["arrival_seconds"])][:MAX_CURVES]
    if timed.empty:
        return None
    figure = styled_figure(
        height=90 + 26 * len(timed),
        xaxis={"title": {"text": "seconds from arrival to live"}, "type": "log"},
        yaxis={"autorange": "reversed", "showgrid": False},
    )
    figure.add_scatter(
        x=list(timed["arrival_seconds"]), y=[escaped(names[trial]) for trial in timed["trial_id"]], mode="markers",
        error_x={
            "array": list(timed["arrival_seconds_p95"] - timed["arrival_seconds"]), "arrayminus": [0.0] * len(timed),
        },
        marker={"color": BLUE, "size": 9}, customdata=list(timed["trial_id"]), showlegend=False,
        hovertemplate="%{y}: %{x:.3g} s<extra></extra>",
    )  # fmt: skip
    return figure


def capacity_figure(found: Sequence[Filling], law: Law | None) -> go.Figure:
    """Reliability against bits per trained parameter: a line per position and setting with 95% intervals, a mark where it
    breaks, and a band for the law over these marks."""
    figure = styled_figure(
        height=440,
        xaxis={"title": {"text": "bits per trained parameter"}, "type": "log", "dtick": "D2"},
        yaxis={"title": {"text": "reliability"}, "tickformat": ".0%", "range": [0, 1.04]},
        hovermode="closest",
    )
    figure.add_hline(y=LEVEL, line={"color": MUTED, "width": 1, "dash": "dot"})
    if law and math.isfinite(law.spread):
        figure.add_vrect(
            x0=law.bits / law.spread, x1=law.bits * law.spread, fillcolor=MUTED, opacity=0.18, line_width=0
        )
    for filling in found:
        label = escaped(filling.label)
        figure.add_scatter(
            x=filling.bits, y=filling.reliability, mode="lines+markers", name=label, customdata=filling.trial_ids,
            text=[f"{label}, {edits:,} edits" for edits in filling.edits],
            error_y={
                "type": "data", "symmetric": False, "thickness": 1, "width": 3,
                "array": [high - value for high, value in zip(filling.high, filling.reliability, strict=True)],
                "arrayminus": [value - low for low, value in zip(filling.low, filling.reliability, strict=True)],
            },
            hovertemplate="%{text}<br>%{x:.3g} bits per parameter: %{y:.1%}<extra></extra>",
        )  # fmt: skip
    broken = [filling for filling in found if not math.isnan(filling.breaks_at)]
    if broken:
        figure.add_scatter(
            x=[filling.breaks_at for filling in broken], y=[LEVEL] * len(broken), mode="markers", name="breaks",
            marker={"symbol": "x", "size": 9, "color": ACCENT, "line": {"width": 1, "color": INK}},
            text=[escaped(filling.sentence()) for filling in broken], hovertemplate="%{text}<extra></extra>",
        )  # fmt: skip
    return figure


@dataclass(frozen=True)
class PipelinePair:
    batch_size: int
    label: str
    """Position and settings the two have in common."""
    breadth_first: float
    depth_first: float
    trial_ids: tuple[str, str]


@dataclass(frozen=True)
class PipelineInfo:
    metric: str
    pairs: tuple[PipelinePair, ...]
    """Sorted by batch size. Empty when no setting was run with both pipelines."""
    mean_difference: tuple[tuple[int, float, int], ...]
    """(batch size, mean of breadth_first - depth_first, number of pairs) over all pairs."""
    left_out: int
    """Pairs that are not drawn because there are too many."""


def pipeline_info(results: pd.DataFrame, metric: str = "reliability") -> PipelineInfo:
    """Breadth-first against depth-first, paired: settings that agree in everything else (seeds averaged)."""
    rows = comparable(by_setting(results), (metric,))
    wide, deep = (rows[rows["pipeline"] == name] for name in ("breadth_first", "depth_first"))
    shared = [axis for axis in SETTING_AXES if axis != "pipeline"]
    both = wide.merge(deep[[*shared, "trial_id", metric]], on=shared, suffixes=("", "_deep"))
    both = both.assign(gap=both[metric] - both[f"{metric}_deep"]).sort_values("batch_size", kind="stable")
    drawn = both[both["trial_id"].isin(thinned(list(both["trial_id"]), (), MAX_PAIRS))]
    pairs = []
    for row in drawn.to_dict("records"):
        label = escaped(f"{position_of(row)}, {setting_text(row | {'pipeline': None})}")
        ids = (row["trial_id"], row["trial_id_deep"])
        pairs.append(PipelinePair(row["batch_size"], label, row[metric], row[f"{metric}_deep"], ids))
    gaps = both.groupby("batch_size")["gap"].agg(["mean", "size"])
    return PipelineInfo(
        metric=metric,
        pairs=tuple(pairs),
        mean_difference=tuple((int(size), float(mean), int(count)) for size, mean, count in gaps.itertuples()),
        left_out=len(both) - len(drawn),
    )


def pipeline_figure(info: PipelineInfo) -> go.Figure:
    """A line per pair from depth-first to breadth-first, grouped by batch size."""
    counts, where = Counter(pair.batch_size for pair in info.pairs), []  # pairs are sorted by batch size
    for column, count in enumerate(counts.values()):
        where += [column + (0.6 * (rank / (count - 1) - 0.5) if count > 1 else 0) for rank in range(count)]
    title = TITLES.get(info.metric, info.metric)
    figure = styled_figure(
        height=380,
        xaxis={
            "title": {"text": "batch size"}, "tickvals": list(range(len(counts))), "ticktext": [*map(str, counts)],
            "range": [-0.6, len(counts) - 0.4], "showgrid": False,
        },
        yaxis={"title": {"text": title}, "tickformat": ".1%" if info.metric.startswith("capability") else ".0%"},
    )  # fmt: skip
    lines_x, lines_y, trials = [], [], []
    for place, pair in zip(where, info.pairs, strict=True):
        lines_x += [place, place, None]
        lines_y += [pair.depth_first, pair.breadth_first, None]
        trials += [pair.trial_ids[1], pair.trial_ids[0], None]
    figure.add_scatter(
        x=lines_x, y=lines_y, mode="lines", line={"color": "#c3c9d2", "width": 1.5}, hoverinfo="skip", showlegend=False,
        customdata=trials,
    )  # fmt: skip
    looks = (("breadth_first", BLUE, "circle"), ("depth_first", ACCENT, "diamond"))
    for index, (side, colour, symbol) in enumerate(looks):
        name = side.replace("_", "-")
        trials = [pair.trial_ids[index] for pair in info.pairs]
        figure.add_scatter(
            x=where,
            y=[getattr(pair, side) for pair in info.pairs],
            mode="markers", name=name, marker={"color": colour, "symbol": symbol, "size": 10},
            customdata=trials,
            text=[f"<b>{pair.label}</b><br>{escaped(id)}" for pair, id in zip(info.pairs, trials, strict=True)],
            hovertemplate=f"%{{text}}<br>{name}: {title} %{{y:.1%}}<extra></extra>",
        )  # fmt: skip
    return figure


@dataclass(frozen=True)
class ParallelAxis:
    name: str
    label: str
    values: tuple[float, ...]
    """One per setting, positions along the axis (logarithms for a rate, ranks for text)."""
    ticks: tuple[tuple[float, str], ...]
    """(position, text); empty to use plotly's own ticks."""


@dataclass(frozen=True)
class ParallelInfo:
    trial_ids: tuple[str, ...]
    axes: tuple[ParallelAxis, ...]
    """Axes of the space with more than one value, then the metrics measured."""
    colour: tuple[float, ...]
    """Reliability."""
    left_out: int
    """Settings that are not drawn because there are too many."""


def parallel_info(results: pd.DataFrame, *, keep: Collection[str | None] = ()) -> ParallelInfo:
    """Settings (seeds averaged) as lines over every axis that varies and every metric that all of them have.

    keep: settings that are always drawn."""
    known = comparable(by_setting(results), ("reliability",))
    rows = known[known["trial_id"].isin(thinned(list(known["trial_id"]), keep, MAX_LINES))]
    axes = [
        _axis(axis, rows[axis.name])
        for axis in SWEPT
        if axis.name != "seed" and rows[axis.name].nunique() > 1 and rows[axis.name].notna().all()
    ]
    for name, (label, scale) in _METRICS.items():
        if len(rows) and np.isfinite(rows[name]).all():
            axes.append(ParallelAxis(name, label, tuple(float(f"{scale * x:.4g}") for x in rows[name]), ()))
    colour = tuple(round(float(x), 4) for x in rows["reliability"])
    return ParallelInfo(tuple(rows["trial_id"]), tuple(axes), colour, len(known) - len(rows))


_METRICS = {name: (name, 1) for name in FRACTIONS} | {
    "capability_change": ("change, points", 100), "drift_kl": ("drift, nats", 1), "seconds_per_edit": ("s per edit", 1),
}  # fmt: skip
"""Metric -> label and unit of its axis."""


def _axis(axis: Axis, values: pd.Series) -> ParallelAxis:
    """Numbers at their value, or its logarithm on a logarithmic axis if all are positive; text by rank in the axis's order."""
    log = axis.log and values.min() > 0
    if axis.type is not str and not log:
        return ParallelAxis(axis.name, axis.head, tuple(map(float, values)), ())
    given = list(dict.fromkeys(values))
    given.sort(key=None if log else [*axis.choices, *given].index)
    place = {value: math.log10(value) if log else float(i) for i, value in enumerate(given)}
    shown = given if len(given) <= 8 else [given[0], given[-1]]
    texts = tuple((place[value], escaped(value_text(axis.name, value))) for value in shown)
    return ParallelAxis(axis.name, axis.head, tuple(place[value] for value in values), texts)


def parallel_figure(info: ParallelInfo) -> go.Figure:
    """Lines over parallel axes, coloured by reliability. Dragging along an axis keeps the lines that cross there."""
    dimensions = []
    for axis in info.axes:
        shape: dict = {"range": [0, 1], "tickformat": ".0%"} if axis.name in FRACTIONS else {}
        if axis.ticks:
            shape |= {"tickvals": [at for at, _ in axis.ticks], "ticktext": [text for _, text in axis.ticks]}
        dimensions.append({"label": axis.label, "values": list(axis.values), **shape})
    figure = styled_figure(height=430, margin={"l": 60, "r": 50, "t": 48, "b": 20})
    figure.add_parcoords(
        line={"color": list(info.colour), "colorscale": "Cividis", "cmin": 0, "cmax": 1},
        dimensions=dimensions, unselected={"line": {"opacity": 0.08}}, labelfont={"size": 12}, tickfont={"size": 11},
        customdata=list(info.trial_ids),
        rangefont={"color": "rgba(0,0,0,0)"},  # the ends of the ranges overlap the ticks
    )  # fmt: skip
    return figure
