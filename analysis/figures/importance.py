"""The figure of what matters: bars of the importance of each axis."""

import plotly.graph_objects as go

from analysis.figures.style import BLUE, INK, styled_figure
from analysis.stats.axes import AXIS
from analysis.stats.importance import WhatMatters
from analysis.stats.table import TITLES
from analysis.stats.wording import escaped


def importance_figure(weighed: WhatMatters) -> go.Figure:
    """A row of bars per metric and axis, a tick where chance ends."""
    bars = [(TITLES[item.metric], *share) for item in weighed.found for share in item.shares]
    figure = styled_figure(
        height=70 + 26 * len(bars) + 14 * len(weighed.found),
        xaxis={"title": {"text": "share of importance"}, "tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "multicategory", "dividercolor": "#dfe3e9"},
        bargap=0.3,
    )
    rows = [[escaped(title) for title, *_ in bars], [AXIS[axis].title for _, axis, _, _ in bars]]
    figure.add_bar(
        y=rows, x=[round(share, 4) for *_, share, _ in bars], orientation="h", name="importance",
        marker={"color": [BLUE if share > chance else "#b9c2cd" for *_, share, chance in bars]},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        y=rows, x=[round(chance, 4) for *_, chance in bars], mode="markers", name="95% of shuffled studies stay below",
        marker={"symbol": "line-ns-open", "size": 16, "color": INK, "line": {"width": 2}},
        hovertemplate="chance reaches %{x:.0%}<extra></extra>",
    )  # fmt: skip
    return figure
