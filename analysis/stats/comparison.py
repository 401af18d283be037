"""Two studies in one report: whether the pick moved, how alike they rank the positions they share, and what is not comparable.

Each position is compared at the setting that the rule would use first there (`analysis.stats.pick.best_by_position`). Models
with the same number of layers share positions by layer and module, others by module and relative depth, as mutual nearest
neighbours. Differences are there minus here.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

from analysis.stats.axes import AXES
from analysis.stats.pick import Recommendation, best_by_position, recommend
from analysis.stats.table import TITLES, Z95, by_setting, position_of, value_text
from analysis.stats.wording import number, plural, points

Row = Mapping[str, Any]
Position = tuple[int, str]


@dataclass(frozen=True)
class Measured:
    """A study and its results, as `analysis.page.report.render_report` takes them."""

    study: Mapping[str, Any]
    results: pd.DataFrame
    baseline: Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
    """One metric over the shared positions."""

    metric: str
    rank: tuple[float, float, float]
    """Spearman's correlation with its 95% interval; NaN where it is not defined (the interval needs at least five positions)."""
    difference: tuple[float, float, float]
    """Mean of there - here, with its 95% interval over positions (NaN for fewer than three)."""


@dataclass(frozen=True)
class Comparison:
    studies: tuple[Measured, Measured]
    """Here and there; in the second, each trial id is prefixed with the study's name."""
    names: tuple[str, str]
    """Distinct names, to tell the two apart."""
    shared: tuple[tuple[Row, Row], ...]
    """The setting that represents each shared position, here and there, sorted by module and layer."""
    by_depth: bool
    """Positions are matched by relative depth."""
    capability: bool
    """The same items were asked, so changes of capability are comparable."""
    agreements: tuple[Agreement, ...]
    picks: tuple[Recommendation | None, Recommendation | None]


def compare(here: Measured, there: Measured) -> Comparison:
    """Never fails for studies with nothing in common: what is not comparable is left empty, and `cautions` says why."""
    names = (here.study["name"], there.study["name"])
    if names[0] == names[1]:
        names = (names[0], f"{names[1]} (other run)")
    ids = [f"{names[1]}: {trial}" for trial in there.results["trial_id"]]  # two runs of a study have the same ids
    studies = (here, replace(there, results=there.results.assign(trial_id=ids)))
    best = [best_by_position(by_setting(study.results)) for study in studies]
    layers = [study.results["layers"].max() for study in studies]
    by_depth = bool(layers[0] != layers[1])
    shared = _shared(best[0], best[1], 0.5 / max(1, min(layers) - 1) if by_depth else None)
    items, others = (_measured_on(study)["items"][0] for study in studies)
    capability = items == others is not None
    metrics = ("reliability", "generalization", *(["capability_change"] if capability else []), "drift_kl")
    return Comparison(
        studies=studies,
        names=names,
        shared=shared,
        by_depth=by_depth,
        capability=capability,
        agreements=tuple(filter(None, (_agreement(name, shared) for name in metrics))),
        picks=(recommend(studies[0].results), recommend(studies[1].results)),
    )


def _shared(
    here: Mapping[Position, Row], there: Mapping[Position, Row], reach: float | None
) -> tuple[tuple[Row, Row], ...]:
    """reach: largest difference in relative depth at which positions are matched; None matches by layer."""

    def nearest(row: Row, others: Mapping[Position, Row]) -> Row | None:
        if reach is None:
            return others.get((int(row["layer"]), row["module"]))
        gaps = (
            (abs(other["depth"] - row["depth"]), other) for other in others.values() if other["module"] == row["module"]
        )
        gap, near = min(gaps, key=lambda pair: pair[0], default=(math.inf, None))
        return near if gap <= reach + 1e-9 else None

    pairs = [(row, nearest(row, there)) for _, row in sorted(here.items(), key=lambda item: (item[0][1], item[0][0]))]
    return tuple((row, other) for row, other in pairs if other is not None and nearest(other, here) is row)


def _agreement(metric: str, shared: Sequence[tuple[Row, Row]]) -> Agreement | None:
    values = np.array([(a[metric], b[metric]) for a, b in shared], dtype="float64").reshape(-1, 2)
    here, there = values[np.isfinite(values).all(axis=1)].T
    if not len(here):
        return None
    gaps, n = there - here, len(here)
    rho = low = high = math.nan
    if n > 2 and np.ptp(here) > 0 and np.ptp(there) > 0:
        rho = float(spearmanr(here, there).statistic)
        if n >= 5:  # Fisher's transformation; 1.06 because ranks are correlated
            centre, half = math.atanh(max(-0.9999, min(0.9999, rho))), Z95 * math.sqrt(1.06 / (n - 3))
            low, high = math.tanh(centre - half), math.tanh(centre + half)
    mean, half = float(gaps.mean()), Z95 * float(gaps.std(ddof=1)) / math.sqrt(n) if n > 2 else math.nan
    return Agreement(metric, (rho, low, high), (mean, mean - half, mean + half))


def cautions(found: Comparison) -> list[str]:
    """Sentences on what is not comparable, and why."""
    said = []
    on = [_measured_on(study) for study in found.studies]
    for name, sentence in _UNLIKE.items():
        (one, here), (other, there) = (side[name] for side in on)
        if one != other:
            said.append(
                sentence.format(f"here {here}; there {there}" if here != there else f"{here}, but not the same")
            )
    if not found.shared:
        said.append("The two studies share no position with a result.")
    elif found.by_depth:
        said.append("The models have different numbers of layers: positions are matched by module and relative depth.")
    for axis in AXES:
        if axis.name in ("layer", "module", "seed"):
            continue
        values = [study.results[axis.name].dropna().unique() for study in found.studies]
        a, b = (", ".join(value_text(axis.name, one) for one in sorted(side)) for side in values)
        if a != b and a and b:
            best = "; each position is represented by its best setting" if axis.swept else ""
            said.append(f"The studies differ in {axis.title} ({a} here, {b} there){best}.")
    return said


_UNLIKE = {
    "items": "Capability was measured on different items ({}), so changes of capability cannot be compared and are left out.",
    "edits": "The studies do not train and ask the same edits ({}), so every difference may be that of the edits.",
    "formats": "Edits were asked in different formats ({}), and reliability and generalization are means over these.",
    "prose": "Drift was measured on different prose ({}), so its values cannot be compared.",
}
"""What may be unlike in two studies -> the caution, with a place for what it is in each."""


def _measured_on(about: Measured) -> dict[str, tuple[Any, str]]:
    """What a study's metrics are measured on, by the names in `_UNLIKE`: a value that is equal for two studies only if they
    measure on the same (None where nothing is measured), and what to call it."""
    study = about.study
    hashes = study.get("fingerprints") or {}
    items, n_items = study.get("capability_source") or "none", study.get("n_items")
    source, n_edits = study.get("edits_source") or "unknown", int(study.get("n_edits") or 0)
    asked = min(n_edits, study.get("edits_asked") or n_edits)
    edits = f"{plural(n_edits, 'edit')} from {source}" + (f", {asked:,} of them asked" if asked < n_edits else "")
    formats = tuple(form for form in study.get("ask_formats") or () if form != "unseen")
    tokens = study.get("prose_tokens")
    prose = f"up to {tokens:,} tokens of {study.get('prose') or 'the built-in prose'}" if tokens else "none"
    return {
        "items": ((hashes.get("items") or (items, n_items)) if n_items else None, items),
        "edits": ((hashes.get("edits") or (source, n_edits), asked), edits),
        "formats": (formats, ", ".join(formats)),
        "prose": ((hashes.get("prose"), tokens), prose),
    }


def moved(found: Comparison) -> list[str]:
    """Sentences on whether the pick moved, and what the other study's pick would cost."""
    picks = [pick for pick in found.picks if pick is not None]
    if len(picks) < 2:
        return ["One of the two has no pick."]
    places = [[position_of(pair[side]) for pair in found.shared] for side in (0, 1)]
    if (picks[0].position, picks[1].position) in zip(*places, strict=True):
        same = "the same position" if picks[0].position == picks[1].position else "the same relative depth and module"
        return [f"The pick did not move: {picks[0].position} here, {picks[1].position} there ({same})."]
    said = [f"The pick moved: {picks[0].position} here, {picks[1].position} there."]
    for side, name in enumerate(found.names):
        own, other = picks[side], picks[1 - side]
        if other.position not in places[1 - side]:
            said.append(f"{other.position} has no result in {name}.")
            continue
        row = found.shared[places[1 - side].index(other.position)][side]
        parts = [
            f"{TITLES[metric]} {points(row[metric] - own.metrics[metric])} points"
            for metric in ("reliability", "generalization", "capability_change")
            if metric in own.metrics and math.isfinite(row[metric])
        ]
        if "drift_kl" in own.metrics and math.isfinite(row["drift_kl"]):
            parts.append(f"drift {number(row['drift_kl'])} instead of {number(own.metrics['drift_kl'])} nats")
        said.append(f"In {name}, {position_of(row)} against its own pick {own.position}: {', '.join(parts)}.")
    return said
