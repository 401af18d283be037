"""Two studies side by side: what differs, whether the pick moved, and how alike they rank the positions they share.

A position stands for the best setting tried there (`analysis.stats.pareto.best_by_position`). Studies of models with the same
number of layers share a position by layer and module; otherwise by module and nearest relative depth, each the other's
nearest. Differences are there minus here; their intervals add both errors as if the two samples had nothing in common,
which is wide where edits or items are the same.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.intervals import standard_error
from analysis.figures.style import TITLES
from analysis.stats.pick import Recommendation, best_by_position, recommend
from analysis.stats.table import Z95, by_setting
from analysis.stats.wording import ABSENT, MINUS, change_with_interval, number, percent, plural, points, points_interval, when

Row = Mapping[str, Any]
Position = tuple[int, str]


MAX_SHARED = 300
"""Shared positions listed at most."""


@dataclass(frozen=True)
class Measured:
    """A study and what came of it, as `analysis.page.report.render_report` takes them."""

    study: Mapping[str, Any]
    results: pd.DataFrame
    baseline: Mapping[str, float]

    @property
    def name(self) -> str:
        return str(self.study["name"])


@dataclass(frozen=True)
class Agreement:
    """One metric over the shared positions."""

    metric: str
    rank: tuple[float, float, float]
    """Spearman's correlation with its 95% interval; NaN where it is not defined (the interval takes five positions)."""
    difference: tuple[float, float, float]
    """Mean of there - here, with its 95% interval over positions (NaN for fewer than three)."""


@dataclass(frozen=True)
class Comparison:
    here: Measured
    there: Measured
    names: tuple[str, str]
    """Different ones, to tell the two apart."""
    shared: tuple[tuple[Row, Row], ...]
    """The best setting at each shared position, here and there, by layer and module."""
    by_depth: bool
    """Positions are matched by relative depth."""
    capability: bool
    """The same items were asked, so that changes of capability compare."""
    agreements: tuple[Agreement, ...]
    picks: tuple[Recommendation | None, Recommendation | None]

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(item.metric for item in self.agreements)


def compare(here: Measured, there: Measured) -> Comparison:
    """Never fails for studies with nothing in common: what does not compare is empty, and `cautions` says why."""
    best = [best_by_position(by_setting(study.results)) for study in (here, there)]
    depths = [int(study.results["layers"].max()) if study.results["layers"].notna().any() else 0 for study in (here, there)]
    by_depth = depths[0] != depths[1]
    pairs = _nearest(best[0], best[1], min(depths)) if by_depth else [(key, key) for key in best[0] if key in best[1]]
    shared = tuple((best[0][a], best[1][b]) for a, b in sorted(pairs, key=lambda pair: (pair[0][1], pair[0][0])))
    suites = [(study.study.get("capability_source"), study.study.get("n_items")) for study in (here, there)]
    same_items = suites[0] == suites[1] and bool(suites[0][1])
    names = ["reliability", "generalization", *(["capability_change"] if same_items else []), "drift_kl"]
    agreements = [_agreement(name, shared) for name in names]
    return Comparison(
        here=here,
        there=there,
        names=_names(here, there),
        shared=shared,
        by_depth=by_depth,
        capability=same_items,
        agreements=tuple(item for item in agreements if item is not None),
        picks=(recommend(here.results), recommend(there.results)),
    )


def _names(here: Measured, there: Measured) -> tuple[str, str]:
    """Of the same study at two dates the dates tell them apart."""
    names = (here.name, there.name)
    if names[0] != names[1]:
        return names
    dates = tuple(when(study.study.get("started")) for study in (here, there))
    if all(dates) and dates[0] != dates[1]:
        days = tuple(date[:10] for date in dates)
        return tuple(f"{names[0]} ({date})" for date in (days if days[0] != days[1] else dates))
    return names[0], f"{names[1]} (compared)"


def _nearest(here: Mapping[Position, Row], there: Mapping[Position, Row], layers: int) -> list[tuple[Position, Position]]:
    reach = 0.5 / max(1, layers - 1)

    def nearest(row: Row, others: Mapping[Position, Row]) -> Position | None:
        near = [
            (abs(other["depth"] - row["depth"]), key)
            for key, other in others.items()
            if other["module"] == row["module"] and abs(other["depth"] - row["depth"]) <= reach + 1e-9
        ]
        return min(near)[1] if near else None

    found = ((key, nearest(row, there)) for key, row in here.items())
    return [(key, other) for key, other in found if other is not None and nearest(there[other], here) == key]


def _agreement(metric: str, shared: Sequence[tuple[Row, Row]]) -> Agreement | None:
    pairs = [(a[metric], b[metric]) for a, b in shared if math.isfinite(a[metric]) and math.isfinite(b[metric])]
    if not pairs:
        return None
    here, there = (np.array(side, dtype="float64") for side in zip(*pairs, strict=True))
    gaps, n = there - here, len(pairs)
    rho = low = high = math.nan
    if n > 2 and np.ptp(here) > 0 and np.ptp(there) > 0:
        rho = float(np.corrcoef(pd.Series(here).rank(), pd.Series(there).rank())[0, 1])
        if n >= 5:  # Fisher's transformation; 1.06 because ranks are correlated
            centre, half = math.atanh(max(-0.9999, min(0.9999, rho))), Z95 * math.sqrt(1.06 / (n - 3))
            low, high = math.tanh(centre - half), math.tanh(centre + half)
    half = Z95 * float(gaps.std(ddof=1)) / math.sqrt(n) if n > 2 else math.nan
    mean = float(gaps.mean())
    return Agreement(metric, (rho, low, high), (mean, mean - half, mean + half))


def difference(metric: str, here: Row, there: Row) -> tuple[float, float, float]:
    """There - here with its 95% interval; NaN for what is unknown."""
    error = math.hypot(standard_error(here, metric), standard_error(there, metric))
    gap = there[metric] - here[metric]
    return gap, gap - Z95 * error, gap + Z95 * error


# in words


def differing(found: Comparison) -> list[tuple[str, str, str]]:
    """(what, here, there) of the studies themselves."""
    sides = (found.here, found.there)

    def said(name: str, study: Measured) -> str:
        about = study.study
        if name == "edits":
            count = about.get("n_edits")
            return " from ".join(
                filter(None, (plural(int(count), "edit") if count else "", str(about.get("edits_source") or "")))
            )
        if name == "run":
            return " to ".join(filter(None, (when(about.get("started")), when(about.get("finished")))))
        if name == "capability":
            score = study.baseline.get("capability", math.nan)
            before = f"; unedited {percent(score)}" if math.isfinite(score) else ""
            return str(about.get("capability_source") or "") + before
        if name == "trials":
            return f"{int((study.results['status'] == 'done').sum()):,} done"
        return str(about.get(name) or "")

    rows = [(title, *(said(key, study) or ABSENT for study in sides)) for title, key in (
        ("Model", "model"), ("Edits", "edits"), ("Capability", "capability"), ("Trials", "trials"), ("Run", "run"),
    )]  # fmt: skip
    return rows + [("Pick", *(pick.position if pick else ABSENT for pick in found.picks))]


def cautions(found: Comparison) -> list[str]:
    """What does not compare, and why."""
    said = []
    if not found.capability:
        a, b = (str(study.study.get("capability_source") or "none") for study in (found.here, found.there))
        said.append(
            f"Capability was not measured on the same items (here {a}; there {b}), so changes of capability do not"
            " compare and are left out."
        )
    if not found.shared:
        said.append("The two share no position with a result.")
    elif found.by_depth:
        said.append("The models have different numbers of layers: positions are matched by module and relative depth.")
    for axis, title in (("batch_size", "batch sizes"), ("learning_rate", "learning rates"), ("pipeline", "pipelines")):
        a, b = (
            ", ".join(number(value).replace("_first", "-first") for value in sorted(study.results[axis].dropna().unique()))
            for study in (found.here, found.there)
        )
        if a != b:
            said.append(f"They tried different {title} ({a} here, {b} there); the best setting of a position stands for it.")
    return said


def moved(found: Comparison) -> list[str]:
    """Whether the pick moved, and what the other's pick would cost."""
    pick, other = found.picks
    if pick is None or other is None:
        return ["One of the two has no pick."]
    places = [_place(row) for row, _ in found.shared], [_place(row) for _, row in found.shared]
    at = places[0].index(pick.position) if pick.position in places[0] else None
    if at is not None and places[1][at] == other.position:
        same = "the same position" if pick.position == other.position else "the same relative depth and module"
        return [f"The pick did not move: {pick.position} here, {other.position} there ({same})."]
    said = [f"The pick moved: {pick.position} here, {other.position} there."]
    for name, side, taken, index in ((found.names[0], 0, other, 1), (found.names[1], 1, pick, 0)):
        own = found.picks[side]
        if taken.position not in places[index]:
            said.append(f"{taken.position} has no result in {name}.")
            continue
        row = found.shared[places[index].index(taken.position)][side]
        parts = [
            f"{TITLES[metric]} {points(row[metric] - own.metrics[metric])} points"
            for metric in ("reliability", "generalization", "capability_change")
            if metric in own.metrics and math.isfinite(row[metric])
        ]
        if "drift_kl" in own.metrics and math.isfinite(row["drift_kl"]):
            parts.append(f"drift {number(row['drift_kl'])} instead of {number(own.metrics['drift_kl'])} nats")
        said.append(f"In {name}, {_place(row)} against its own pick {own.position}: {', '.join(parts)}.")
    return said


def agreement_rows(found: Comparison) -> list[tuple[str, str, str]]:
    """(metric, rank correlation, mean difference)."""
    rows = []
    for item in found.agreements:
        rho, low, high = item.rank
        rank = _signed(rho) if math.isfinite(rho) else "not defined"
        rank += f" [{_signed(low)}, {_signed(high)}]" if math.isfinite(low) else ""
        gap = item.difference
        if item.metric == "drift_kl":
            text = f"{_signed(gap[0], 3)} nats" + (f" [{_signed(gap[1], 3)}, {_signed(gap[2], 3)}]" if math.isfinite(gap[1]) else "")
        else:
            text = change_with_interval(*gap)
        rows.append((TITLES[item.metric], rank, text))
    return rows


def shared_rows(found: Comparison) -> list[dict[str, Any]]:
    """The table of shared positions, the picks first, at most `MAX_SHARED`: position, trial_id (here), and cells (here,
    there, difference) per metric."""
    rows = []
    for here, there in found.shared:
        cells = []
        for metric in found.metrics:
            a, b = here[metric], there[metric]
            if metric == "drift_kl":
                cells.append((number(a), number(b), f"{number(b / a, 2)} x" if a > 0 and math.isfinite(b / a) else ABSENT))
                continue
            write = points if metric == "capability_change" else percent
            gap, low, high = difference(metric, here, there)
            cells.append((write(a), write(b), " ".join(filter(None, (points(gap), points_interval(low, high))))))
        place = _place(here) + ("" if not found.by_depth else f" / {_place(there)}")
        picks = [pick is not None and _place(row) == pick.position for row, pick in zip((here, there), found.picks, strict=True)]
        rows.append({"position": place, "trial_id": here["trial_id"], "cells": cells, "picks": picks})
    return sorted(rows, key=lambda row: -sum(row["picks"]))[:MAX_SHARED]


def _place(row: Row) -> str:
    return f"{row['layer']}.{row['module']}"


def _signed(value: float, digits: int = 2) -> str:
    text = f"{abs(value):.{digits}f}"
    return (MINUS if value < 0 and float(text) else "") + text
