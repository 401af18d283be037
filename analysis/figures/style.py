"""What all figures share: colours, the hover text of a trial, which marks are drawn, the ring of the pick, and an
empty figure in the project's style.

Colours are safe for colour-blind readers: perceptually uniform scales (cividis, viridis) for quantities, blue against
orange for signs and pairs.
"""

import math
import random
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from analysis.stats.table import drift_text, position_of, setting_text, with_interval
from analysis.stats.wording import escaped, percent, whole_percent

INK, MUTED, GRID, ACCENT, BLUE = "#1c2430", "#8a94a3", "#e6e9ee", "#d55e00", "#0072b2"
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif'


def hover_text(row: Mapping[str, Any], chance: float | None = None) -> str:
    """The hover text of a trial (or a setting), escaped: id, position, settings, metrics, and the chance that it is on the
    front if that is given."""
    seeds = row["seeds"] if "seeds" in row else (row["seed"],)
    named = f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"
    lines = [f"<b>{escaped(position_of(row))}</b>  {escaped(row['trial_id'])}"]
    lines.append(escaped(", ".join(filter(None, (setting_text(row), named)))))
    if math.isfinite(row["reliability"]):
        lines.append(", ".join(f"{name} {with_interval(row, name)}" for name in ("reliability", "generalization")))
    if math.isfinite(row["capability"]):
        lines.append(f"capability {percent(row['capability'])}, change {with_interval(row, 'capability_change')}")
    if math.isfinite(row["drift_kl"]):
        lines.append(f"drift {drift_text(row)}")
    if chance:
        lines.append(f"on the front with a chance of {whole_percent(chance)}")
    return "<br>".join(lines)


def styled_figure(height: int, **layout) -> go.Figure:
    """An empty figure in the project's style. Sizes are for the report's column; the width follows the page."""
    font = {"family": FONT, "size": 13, "color": INK}
    axis = {"gridcolor": GRID, "zeroline": False, "linecolor": MUTED, "ticks": "", "automargin": True}
    common = {
        "template": "none", "height": height, "font": font, "paper_bgcolor": "white", "plot_bgcolor": "white",
        "margin": {"l": 10, "r": 10, "t": 34, "b": 44},
        "legend": {"orientation": "h", "x": 0, "y": 1.01, "xanchor": "left", "yanchor": "bottom", "itemsizing": "constant"},
        "hoverlabel": {"bgcolor": "white", "bordercolor": MUTED, "font": font, "align": "left"},
    }  # fmt: skip
    axes = {name: axis | layout.get(name, {}) for name in ("xaxis", "yaxis")}
    return go.Figure(layout=common | layout | axes)


def add_ring(figure: go.Figure, x: float, y: float, name: str = "pick", colour: str = ACCENT) -> None:
    """Mark the pick. The page's script moves the traces that are named "pick"."""
    figure.add_scatter(
        x=[x], y=[y], mode="markers", name=name, hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 25, "color": colour, "line": {"width": 3}},
    )  # fmt: skip


def thinned(ids: Sequence[str], keep: Collection[str | None], most: int) -> frozenset[str]:
    """All of the ids to keep, filled up to `most` with a random sample of the rest. Random, since every tenth setting of a
    grid would have the same learning rate; always the same sample for the same ids."""
    kept = [one for one in ids if one in keep]
    rest = [one for one in ids if one not in keep]
    room = max(0, most - len(kept))
    return frozenset(kept + (rest if len(rest) <= room else random.Random(0).sample(rest, room)))
