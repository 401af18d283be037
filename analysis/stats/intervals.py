"""How far a measured number can be trusted: standard errors and 95% intervals of a setting, from its items and its seeds.

- reliability, generalization and locality are means over edits: Wilson's interval with an edit as one item, since the
  prompts of an edit stand and fall together. Where there are several seeds, the error of their mean is added to each side
  (sides are added as roots of squares, as errors are).
- capability and its change: the bootstrap interval of the change, paired by item.
- drift: how it varies over the text is not recorded, so `interval` has none; of several seeds the lowest and highest are
  known. Where a guess beats silence, the standard error of a single seed is taken to be `DRIFT_ERROR` of the drift.

A row is one of `analysis.stats.table.by_setting`, of the results table (a single seed) or the metrics of a pick.
"""

import math
from collections.abc import Mapping
from typing import Any

from analysis.stats.table import FRACTIONS, Z95, proportion_se, wilson_interval
from analysis.stats.wording import number, percent, seed_span, share_interval


DRIFT_ERROR = 0.1
"""Standard error of a single seed's drift, as a share of it: about what other seeds of the built-in model's settings gave."""
EXPECTED = ("reliability", "generalization", "capability_change", "drift_kl")


def seed_error(row: Mapping[str, Any], name: str) -> float:
    """Standard error of a fraction's mean over the seeds; 0 for a single seed."""
    spread, seeds = row.get(f"{name}_sd", math.nan), row.get("n_seeds", 1)
    return float(spread) / math.sqrt(seeds) if math.isfinite(spread) else 0.0


def standard_error(row: Mapping[str, Any], name: str) -> float:
    """Of a metric; NaN where it is not known."""
    if _is_fraction(name):
        return math.hypot(proportion_se(row.get(name, math.nan), row.get("n_edits", math.nan)), seed_error(row, name))
    if name in ("capability", "capability_change"):
        low, high = (row.get(f"capability_change_{end}", math.nan) for end in ("low", "high"))
        return float(high - low) / (2 * Z95)
    if name == "drift_kl":
        return DRIFT_ERROR * row.get(name, math.nan) / math.sqrt(row.get("n_seeds", 1))
    return math.nan


def interval(row: Mapping[str, Any], name: str) -> tuple[float, float]:
    """95% interval of a metric; (NaN, NaN) where it is not known. That of capability is the one of its change, moved."""
    value = row.get(name, math.nan)
    if _is_fraction(name):
        low, high = wilson_interval(value, row.get("n_edits", math.nan))
        if not math.isfinite(low):
            return math.nan, math.nan
        more = Z95 * seed_error(row, name)
        return max(0.0, value - math.hypot(value - low, more)), min(1.0, value + math.hypot(high - value, more))
    if name in ("capability", "capability_change"):
        change, low, high = (row.get(f"capability_change{end}", math.nan) for end in ("", "_low", "_high"))
        return value + (low - change), value + (high - change)
    return math.nan, math.nan


def expected(row: Mapping[str, Any]) -> dict[str, tuple[float, float, float]]:
    """Metric -> (value, low, high): what to expect of such an edit, with 95% intervals, as far as it was measured."""
    found = {name: (float(row[name]), *interval(row, name)) for name in EXPECTED[:3]}
    drift, more = float(row["drift_kl"]), Z95 * standard_error(row, "drift_kl")
    found["drift_kl"] = (drift, max(0.0, drift - more), drift + more)
    return {name: tuple(map(float, values)) for name, values in found.items() if all(map(math.isfinite, values))}


def seed_range(row: Mapping[str, Any]) -> tuple[float, float]:
    """The lowest and highest drift over the seeds; (NaN, NaN) for one."""
    return row.get("drift_kl_low", math.nan), row.get("drift_kl_high", math.nan)


def with_interval(row: Mapping[str, Any], name: str) -> str:
    """A fraction in words: "98.0% [93.0, 99.4]"."""
    return " ".join(filter(None, (percent(row[name]), share_interval(*interval(row, name)))))


def drift_text(row: Mapping[str, Any]) -> str:
    """Drift in words: "0.0125 nats per token", and what it was over the seeds where there are several."""
    span = seed_span(*seed_range(row))
    return f"{number(row['drift_kl'])} nats per token" + (f" ({span} over the seeds)" if span else "")


def _is_fraction(name: str) -> bool:
    return name.removesuffix("_tf") in FRACTIONS
