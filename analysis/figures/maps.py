"""Figures of positions: maps of a metric over layer and module, and what the probe expected against the drift measured.

Both show each position at the setting that the rule would use first there.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from scipy.stats import spearmanr

from analysis.figures.front import SYMBOLS
from analysis.figures.style import ACCENT, INK, add_ring, hover_text, styled_figure
from analysis.stats.pick import best_by_position
from analysis.stats.table import by_setting, is_fraction
from analysis.stats.wording import escaped

CHANGE_SCALE = ((0.0, "#b35806"), (0.25, "#f1a340"), (0.5, "#f7f7f7"), (0.75, "#67a9cf"), (1.0, "#2166ac"))
"""Losses orange, gains blue."""


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
    """Limits of the colour scale. Symmetric about 0 for a change."""
    pick: tuple[int, int] | None
    """(row, column) of the cell that shows the picked trial; None when no cell does."""


HEATMAP_CAPTION = (
    "Each cell shows the setting tried there that the rule would use first, the same one in every map. An empty cell was not"
    " tried, failed or diverged."
)


def heatmap_info(results: pd.DataFrame, metric: str = "reliability", *, pick: str | None = None) -> HeatmapInfo:
    """A metric over layer and module. Each cell shows the setting that the rule would use first there (seeds averaged), the
    same one whatever the metric, so that maps of several metrics can be read together."""
    layers = tuple(sorted({int(layer) for layer in results["layer"]}))
    modules = tuple(dict.fromkeys(results["module"]))
    best = best_by_position(by_setting(results))
    found = [[best.get((layer, module), {}) for layer in layers] for module in modules]
    values = tuple(
        tuple(float(row[metric]) if math.isfinite(row.get(metric, math.nan)) else None for row in line)
        for line in found
    )
    flat = [x for line in values for x in line if x is not None]
    if metric == "capability_change":
        edge = max((abs(x) for x in flat), default=0.0) or 0.01
        limits = (-edge, edge)
    elif metric == "capability" or is_fraction(metric):
        limits = (0.0, 1.0)
    else:
        limits = (min(flat, default=0.0), max(flat, default=1.0))
    trial_ids = tuple(tuple(row.get("trial_id") for row in line) for line in found)
    cells = ((i, j) for i, line in enumerate(trial_ids) for j, trial in enumerate(line) if trial and trial == pick)
    return HeatmapInfo(
        metric=metric,
        layers=layers,
        modules=modules,
        values=values,
        hover=tuple(
            tuple(
                hover_text(row) if row else f"<b>{layer}.{escaped(module)}</b><br>no result"
                for layer, row in zip(layers, line, strict=True)
            )
            for module, line in zip(modules, found, strict=True)
        ),
        trial_ids=trial_ids,
        limits=limits,
        pick=next(cells, None),
    )


def heatmap_figure(info: HeatmapInfo) -> go.Figure:
    """Layers from left to right, a row per module; for a change, the colour scale is centred on 0."""
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
    row, column = info.pick or (0, 0)  # the page's script moves the frame when the pick changes
    figure.add_shape(
        type="rect", name="pick", visible=info.pick is not None, line={"color": ACCENT, "width": 3},
        x0=column - 0.5, x1=column + 0.5, y0=row - 0.5, y1=row + 0.5,
    )  # fmt: skip
    return figure


def probe_figure(
    results: pd.DataFrame, probe: Sequence[tuple[int, str, float]], pick: str | None
) -> tuple[go.Figure, int, float]:
    """The positions that were run, each at the setting that the rule would use first there: disturbance to the right, drift
    upwards, both logarithmic; coloured by relative depth, a symbol per module.

    probe: (layer, module, disturbance) of every position. Returns the figure, the number of positions in it, and Spearman's
    correlation of disturbance and drift, which is NaN for fewer than three.
    """
    best = best_by_position(by_setting(results))
    points = [
        (disturbance, row)
        for layer, module, disturbance in probe
        if (row := best.get((layer, module))) is not None and row["drift_kl"] > 0 and 0 < disturbance < math.inf
    ]
    axis = {"type": "log", "tickformat": "~g"}
    figure = styled_figure(
        height=420,
        xaxis=axis | {"title": {"text": "disturbance that the probe expects"}, "tickformat": ".0e"},
        yaxis=axis | {"title": {"text": "drift measured, nats per token"}},
    )
    for index, module in enumerate(dict.fromkeys(row["module"] for _, row in points)):
        shown = [(disturbance, row) for disturbance, row in points if row["module"] == module]
        figure.add_scatter(
            x=[disturbance for disturbance, _ in shown], y=[row["drift_kl"] for _, row in shown], mode="markers",
            name=escaped(module), text=[hover_text(row) for _, row in shown], hovertemplate="%{text}<extra></extra>",
            customdata=[row["trial_id"] for _, row in shown],
            marker={
                "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 11, "color": [row["depth"] for _, row in shown],
                "colorscale": "Cividis", "cmin": 0, "cmax": 1, "line": {"width": 0.8, "color": INK},
            },
        )  # fmt: skip
    for disturbance, row in points:
        if row["trial_id"] == pick:
            add_ring(figure, disturbance, row["drift_kl"])
    values = [(disturbance, row["drift_kl"]) for disturbance, row in points]
    return figure, len(points), float(spearmanr(values).statistic) if len(points) > 2 else math.nan
