"""How many edits a position holds: reliability by bits per trained parameter, where it breaks, and the law over these breaks.

The bits of an edit are what its target tells the unedited model, -log2 p(target | prompt) (`bits_per_parameter` of the
results table). A position breaks where reliability falls below 95% as edits are added, all else equal.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from analysis.stats.pareto import comparable
from analysis.stats.table import SETTING_AXES, by_setting, interval, position_of, setting_names
from analysis.stats.wording import number, percent, plural

LEVEL = 0.95
"""Reliability below which a position counts as overfull."""


@dataclass(frozen=True)
class Filling:
    """One position and setting with increasing numbers of edits, seeds averaged. Tuples are in ascending order of bits."""

    position: str
    """Such as "22.mlp_down"."""
    label: str
    """The position, with what tells the setting apart from others there."""
    trial_ids: tuple[str, ...]
    edits: tuple[int, ...]
    bits: tuple[float, ...]
    """Bits per trained parameter."""
    reliability: tuple[float, ...]
    low: tuple[float, ...]
    """Lower end of the 95% interval of reliability."""
    high: tuple[float, ...]
    diverged: tuple[int, ...]
    """Further numbers of edits, with which training diverged."""

    @property
    def breaks_at(self) -> float:
        """Bits per parameter at which reliability falls below the level; NaN where it is below the level from the start, or
        never falls below it."""
        found = _crossing(self.bits, self.reliability)
        return found if 0 < found < math.inf else math.nan

    @property
    def breaks_between(self) -> tuple[float, float]:
        """The same for both ends of the interval: 0 where an end is below the level from the start, infinite where it never
        falls below it."""
        return _crossing(self.bits, self.low), _crossing(self.bits, self.high)

    def sentence(self) -> str:
        """A statement of where it breaks, without a full stop."""
        lost = ", ".join(f"{edits:,}" for edits in self.diverged)
        ended = f"; training diverged with {lost}" if lost else ""
        if math.isnan(self.breaks_at):
            end, place = ("holds the most", -1) if self.reliability[0] >= LEVEL else ("is overfull with the fewest", 0)
            tried = "trained without divergence" if lost else "tried"
            counts = f"{self.edits[place]:,}, {number(self.bits[place])} bits per parameter"
            return f"{self.label} {end} edits {tried} ({counts}){ended}"
        at = math.exp(np.interp(math.log(self.breaks_at), np.log(self.bits), np.log(self.edits)))
        low, high = self.breaks_between
        above = f"to {number(high)}" if math.isfinite(high) else "and more"
        where = f"{number(self.breaks_at)} bits per parameter ({number(low)} {above})"
        return f"{self.label} breaks at {where}, about {at:,.0f} edits{ended}"


@dataclass(frozen=True)
class Law:
    """Bits per parameter at which positions break: the geometric mean, and by what factor positions differ from it."""

    bits: float
    spread: float
    """exp of the standard deviation of the logarithms; NaN for a single position."""
    positions: int

    def sentence(self) -> str:
        factor = f", within a factor of {number(self.spread)} either way" if math.isfinite(self.spread) else ""
        return (
            f"A position holds about {number(self.bits)} bits per trained parameter at {percent(LEVEL)} reliability{factor} "
            f"({plural(self.positions, 'position')})"
        )


def fillings(results: pd.DataFrame) -> tuple[Filling, ...]:
    """Every position and setting that was tried with several numbers of edits, and did not diverge with all of them."""
    rows = by_setting(results)
    rows = rows[rows["bits_per_parameter"] > 0].sort_values(["layer", "module"], kind="stable")
    names, found = setting_names(_drawn(rows).assign(edit_count=0)), []
    keys = [axis for axis in SETTING_AXES if axis != "edit_count"]
    for _, tried in rows.groupby(keys, dropna=False, sort=False):
        tried = tried.sort_values("bits_per_parameter", kind="stable")
        group, lost = _drawn(tried), tried[tried["diverged"] == 1]
        if group.empty or len({*group["edit_count"], *lost["edit_count"]}) < 2:
            continue
        ends = [interval(row, "reliability") for row in group.to_dict("records")]
        found.append(
            Filling(
                position_of(group.iloc[0]),
                names[group["trial_id"].iloc[0]],
                tuple(group["trial_id"]),
                _trained(group),
                tuple(map(float, group["bits_per_parameter"])),
                tuple(map(float, group["reliability"])),
                tuple(low for low, _ in ends),
                tuple(high for _, high in ends),
                _trained(lost),
            )
        )
    return tuple(found)


def _drawn(rows: pd.DataFrame) -> pd.DataFrame:
    """The settings that are points of a line: those that did not diverge."""
    return comparable(rows, ("reliability", "bits_per_parameter"))


def _trained(rows: pd.DataFrame) -> tuple[int, ...]:
    """How many edits each setting trains. Where that is all of the study's, the seconds tell, since only a sample of many edits
    is asked about."""
    every = (rows["train_seconds"] / rows["seconds_per_edit"]).round()
    every = every.where(np.isfinite(every), rows["n_edits"])
    return tuple(map(int, rows["edit_count"].astype("float64").where(rows["edit_count"] > 0, every)))


def law_of(found: Iterable[Filling]) -> Law | None:
    """The law over the best setting of each position. Positions that hold all edits tried, or not even the fewest, do not
    count; None if no others are left."""
    best: dict[str, float] = {}
    for one in found:
        best[one.position] = max(best.get(one.position, 0.0), _crossing(one.bits, one.reliability))
    logs = [math.log(bits) for bits in best.values() if 0 < bits < math.inf]
    if not logs:
        return None
    spread = math.exp(np.std(logs, ddof=1)) if len(logs) > 1 else math.nan
    return Law(math.exp(np.mean(logs)), spread, len(logs))


def _crossing(bits: Sequence[float], values: Sequence[float]) -> float:
    """Bits at which the values first fall below the level, interpolated linearly in the logarithm of bits; 0 if they start
    below it, infinite if they never fall below it."""
    below = [value < LEVEL for value in values]
    if below[0]:
        return 0.0
    if not any(below):
        return math.inf
    after = below.index(True)
    share = (values[after - 1] - LEVEL) / (values[after - 1] - values[after])
    return math.exp((1 - share) * math.log(bits[after - 1]) + share * math.log(bits[after]))
