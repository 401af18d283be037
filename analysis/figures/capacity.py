"""Reliability against bits per trained parameter: how full a position can be. The numbers are `analysis.stats.capacity`'s."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go

from analysis.figures.style import ACCENT, INK, MUTED, styled_figure
from analysis.stats.capacity import LEVEL, Filling, law_of
from analysis.stats.wording import escaped


def capacity_figure(found: Sequence[Filling]) -> go.Figure:
    """A line per position and setting with 95% intervals, a mark where it breaks, and a band for the law of these marks."""
    figure = styled_figure(
        height=440,
        xaxis={"title": {"text": "bits per trained parameter"}, "type": "log", "dtick": "D2"},
        yaxis={"title": {"text": "reliability"}, "tickformat": ".0%", "range": [0, 1.04]},
        hovermode="closest",
    )
    figure.add_hline(y=LEVEL, line={"color": MUTED, "width": 1, "dash": "dot"})
    law = law_of(found)
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
