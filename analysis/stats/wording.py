"""Human-readable numbers, and user text escaped for display, for the report and the hover texts of the figures."""

import html
import math
from datetime import datetime
from typing import Any

MINUS = "\N{MINUS SIGN}"
ABSENT = "\N{EN DASH}"


def percent(fraction: float) -> str:
    """0.983 -> "98.3%", 1.0 -> "100%"; a dash when absent."""
    if not math.isfinite(fraction):
        return ABSENT
    return f"{100 * fraction:.0f}%" if fraction in (0, 1) else f"{100 * fraction:.1f}%"


def whole_percent(chance: float) -> str:
    """A probability: 0.483 -> "48%", 0.004 -> "<1%", 0.998 -> ">99%"; a dash when absent."""
    if not math.isfinite(chance):
        return ABSENT
    return "<1%" if 0 < chance < 0.01 else ">99%" if 0.99 < chance < 1 else f"{100 * chance:.0f}%"


def points(change: float) -> str:
    """A difference of fractions in percentage points with its sign: -0.004 -> "−0.4", 0.003 -> "+0.3", 0 -> "0.0"."""
    if not math.isfinite(change):
        return ABSENT
    text = f"{abs(100 * change):.1f}"
    sign = "" if text == "0.0" else MINUS if change < 0 else "+"
    return sign + text


def change_with_interval(change: float, low: float, high: float) -> str:
    """ "−0.4 points [−1.2, +0.3]"; without brackets when the interval is absent."""
    return " ".join(filter(None, (f"{points(change)} points", points_interval(low, high))))


def points_interval(low: float, high: float) -> str:
    """ "[−1.2, +0.3]", in percentage points; empty when absent."""
    return f"[{points(low)}, {points(high)}]" if math.isfinite(low) and math.isfinite(high) else ""


def share_interval(low: float, high: float) -> str:
    """The interval of a fraction, to follow its percentage: "[93.0, 99.4]"; empty when absent."""
    known = math.isfinite(low) and math.isfinite(high)
    return f"[{percent(low)}, {percent(high)}]".replace("%", "") if known else ""


def number(value: Any) -> str:
    """A setting or a measurement with few digits: 0.004, 1e-05, 12.3, 1,200; text unchanged; a dash when absent."""
    if value is None or isinstance(value, str):
        return ABSENT if value is None else value
    if isinstance(value, tuple | list):
        return ", ".join(map(number, value)) or ABSENT
    value = float(value)
    if not math.isfinite(value):
        return ABSENT
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def seconds(value: float) -> str:
    """A duration in the largest unit that reads well: "0.25 s", "48 s", "12 min", "3.4 h"."""
    if not math.isfinite(value):
        return ABSENT
    if value < 10:
        return f"{value:.2g} s"
    if value < 120:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.1f} h"


def when(moment: Any) -> str:
    """A date and time to the minute: "2026-03-02 09:14"; text unchanged; empty when absent."""
    return moment.strftime("%Y-%m-%d %H:%M") if isinstance(moment, datetime) else str(moment or "")


def plural(count: int, noun: str) -> str:
    """ "1 trial", "2 trials"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def escaped(text: Any) -> str:
    """User text escaped for plotly, which interprets a subset of HTML in its texts."""
    return html.escape(str(text), quote=False)
