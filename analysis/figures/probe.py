"""The figure of the probe: what it expected of a position against the drift that was measured there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
import plotly.graph_objects as go
from scipy.stats import spearmanr

from analysis.figures.front import SYMBOLS
from analysis.figures.style import ACCENT, INK, hover_text, styled_figure
from analysis.stats.pick import best_by_position
from analysis.stats.table import by_setting
from analysis.stats.wording import escaped


@dataclass(frozen=True)
class ProbePoint:
    trial_id: str
    module: str
    depth: float
    disturbance: float
    drift: float
    hover: str


@dataclass(frozen=True)
class ProbeInfo:
    points: tuple[ProbePoint, ...]
    """Positions that were run, each at the setting that the rule would use first there."""
    positions: int
    """All that were probed."""
    rank: float
    """Spearman's correlation of disturbance and drift; NaN for fewer than three points."""
    pick: str | None


def probe_info(results: pd.DataFrame, probe: Sequence[tuple[int, str, float]], *, pick: str | None = None) -> ProbeInfo:
    """probe: (layer, module, disturbance) of every position."""
    best = best_by_position(by_setting(results))
    points = [
        ProbePoint(row["trial_id"], module, float(row["depth"]), disturbance, float(row["drift_kl"]), hover_text(row))
        for layer, module, disturbance in probe
        if (row := best.get((layer, module))) is not None and row["drift_kl"] > 0 and 0 < disturbance < math.inf
    ]
    values = [(point.disturbance, point.drift) for point in points]
    rank = float(spearmanr(values).statistic) if len(points) > 2 else math.nan
    return ProbeInfo(tuple(points), len(probe), rank, pick)


def probe_figure(info: ProbeInfo) -> go.Figure:
    """Disturbance to the right, drift upwards, both logarithmic; coloured by relative depth, a symbol per module."""
    axis = {"type": "log", "tickformat": "~g"}
    figure = styled_figure(
        height=420,
        xaxis=axis | {"title": {"text": "disturbance that the probe expects"}, "tickformat": ".0e"},
        yaxis=axis | {"title": {"text": "drift measured, nats per token"}},
    )
    for index, module in enumerate(dict.fromkeys(point.module for point in info.points)):
        points = [point for point in info.points if point.module == module]
        figure.add_scatter(
            x=[point.disturbance for point in points], y=[point.drift for point in points], mode="markers",
            name=escaped(module), text=[point.hover for point in points], hovertemplate="%{text}<extra></extra>",
            customdata=[point.trial_id for point in points],
            marker={
                "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 11, "color": [point.depth for point in points],
                "colorscale": "Cividis", "cmin": 0, "cmax": 1, "line": {"width": 0.8, "color": INK},
            },
        )  # fmt: skip
    for point in (point for point in info.points if point.trial_id == info.pick):
        figure.add_scatter(
            x=[point.disturbance], y=[point.drift], mode="markers", name="pick", hoverinfo="skip",
            marker={"symbol": "circle-open", "size": 25, "color": ACCENT, "line": {"width": 3}},
        )  # fmt: skip
    return figure
