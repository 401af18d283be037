"""The trade-off front, its hypervolume and knee, and the default pick.

Everything is maximised. A trial takes part when it is done, did not diverge and has a finite value of each objective.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import moocore
import numpy as np
import pandas as pd

from analysis.stats.table import METRICS, SPREADS, by_setting
from analysis.stats.wording import change_with_interval, percent, plural, points

DEFAULT_OBJECTIVES = ("reliability", "capability")

_REFERENCES = {
    "reliability": 0.0, "generalization": 0.0, "locality": 0.0, "reliability_tf": 0.0, "generalization_tf": 0.0,
    "locality_tf": 0.0, "capability": 0.0, "capability_change": -1.0,
}  # fmt: skip
"""The metrics that can be objectives, each with the worst value it can have: the hypervolume's default reference."""

SAME = 1e-9
"""Values closer than this are ties: means over seeds differ in their last bits for no reason."""


@dataclass(frozen=True)
class ParetoFront:
    """The trials that no other trial beats in one objective without losing in another (equal trials are all in)."""

    trial_ids: tuple[str, ...]
    """From the highest first objective to the lowest."""
    objectives: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    """One value per objective, for each trial."""
    hypervolume: float
    """Of the region between the front and `reference`; 0.0 for an empty front."""
    reference: tuple[float, ...]


@dataclass(frozen=True)
class Recommendation:
    """The setting to use. With several seeds it names the group: `trial_ids` are all, `trial_id` the lowest seed's."""

    trial_id: str
    position: str
    """Such as "22.mlp_down"."""
    settings: dict[str, Any]
    """Every axis of the setting, and `seeds`."""
    metrics: dict[str, float]
    """Means over the seeds, finite ones only; with `reliability_se`, `SPREADS` (several seeds), `n_seeds`."""
    rule: str
    """How it was chosen, in one sentence to show next to it."""
    runner_up: str | None
    """trial_id of the setting the rule puts second, None when there is only one."""
    reasons: tuple[str, ...]
    """What speaks for it and what to know about it, one sentence each."""
    floor: float
    """The reliability that the rule asked for."""
    trial_ids: tuple[str, ...] = field(default=())


def can_be_objective(name: str) -> bool:
    """Whether this is a metric that is better when higher."""
    return name in _REFERENCES or name.startswith("capability.")


def check_objectives(objectives: Sequence[str]) -> tuple[str, ...]:
    """These objectives as a tuple.

    Raises:
        ValueError: fewer than two, one twice, or one that is not a metric that is better when higher.
    """
    names = tuple(objectives)
    unknown = [name for name in names if not can_be_objective(name)]
    if unknown or len(names) < 2 or len(set(names)) < len(names):
        raise ValueError(
            f"objectives {list(names)}: expected two or more different ones of {', '.join(_REFERENCES)}"
            " (or capability.TASK)"
        )
    return names


def pareto_front(
    results: pd.DataFrame, objectives: Sequence[str] = DEFAULT_OBJECTIVES, *, reference: Sequence[float] | None = None
) -> ParetoFront:
    """The front of a results table, trial by trial. Give it `by_setting(results)` for the front of seed averages.

    `reference` is the corner the hypervolume is measured from: by default the worst values possible (0, or -1 for
    capability_change), so that hypervolumes of several studies compare.
    """
    names = check_objectives(objectives)
    corner = tuple(float(x) for x in (reference or (_REFERENCES.get(name, 0.0) for name in names)))
    if len(corner) != len(names):
        raise ValueError(f"the reference has {len(corner)} values for {len(names)} objectives")
    rows = comparable(results, names)
    if rows.empty:
        return ParetoFront((), names, (), 0.0, corner)
    points = rows[list(names)].to_numpy("float64")  # (trials, objectives)
    best = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    front = sorted(
        (
            (tuple(map(float, point)), str(trial))
            for point, trial in zip(points[best], rows["trial_id"][best], strict=True)
        ),
        key=lambda pair: (tuple(-x for x in pair[0]), pair[1]),
    )
    return ParetoFront(
        trial_ids=tuple(trial for _, trial in front),
        objectives=names,
        points=tuple(point for point, _ in front),
        hypervolume=float(moocore.hypervolume(points[best], ref=corner, maximise=True)),
        reference=corner,
    )


def comparable(results: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """The trials that can be compared: done, not diverged, each objective finite."""
    if absent := [name for name in objectives if name not in results.columns]:
        raise ValueError(f"the results have no column {absent[0]!r}")
    finite = np.isfinite(results[list(objectives)].astype("float64")).all(axis=1)
    keep = (results["status"] == "done") & (results["diverged"].fillna(0) != 1) & finite
    return results[keep].reset_index(drop=True)


def knee(front: ParetoFront) -> str | None:
    """The trial where the front bends most: the highest sum of the objectives, each scaled to [0, 1] over the front
    (with two objectives that is the farthest from the line through the ends). The first trial (highest first
    objective) when nothing bends; None when empty.
    """
    if not front.points:
        return None
    points = np.array(front.points)  # (trials, objectives)
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    scaled = (points - low) / np.where(span > 0, span, 1.0)
    height = scaled.sum(axis=1).round(12)
    return front.trial_ids[int(height.argmax())]


def recommend(results: pd.DataFrame, floor: float | None = None) -> Recommendation | None:
    """The default pick: **the highest capability among the settings whose reliability is within one standard error of
    the best**. One standard error, because a difference in reliability smaller than that says nothing about new edits,
    while capability is what such a difference would be bought with.

    - Trials that differ only in their seed are averaged first (`by_setting`); the standard error is that of the best
      setting (`reliability_se`). Without `n_edits` it is unknown and only exact ties with the best are candidates.
    - A setting that diverged with any seed is never picked.
    - Ties in capability: higher generalization, then lower drift_kl, then fewer seconds per edit, then higher
      reliability, then the trial id (so that the pick never depends on the order of rows). A value that was not
      measured loses against one that was.
    - Without any capability, the same order starts at generalization and the rule says so.

    floor: the reliability to ask for instead of that within one standard error of the best.

    None when no trial is done with a finite reliability, or none has as much as the floor asks for.
    """
    settings = comparable(by_setting(results), ("reliability",))
    if settings.empty:
        return None
    ordered = by_preference(settings)
    top = max(round(row["reliability"], 9) for row in ordered)
    best = next(row for row in ordered if round(row["reliability"], 9) == top)
    error = float(best["reliability_se"])
    error = error if math.isfinite(error) else 0.0
    least = best["reliability"] - error if floor is None else floor
    candidates = [row for row in ordered if row["reliability"] >= least - SAME]
    if not candidates:
        return None
    rest = sorted((row for row in ordered if row["reliability"] < least - SAME), key=lambda row: -row["reliability"])
    pick, second = (candidates + rest + [None])[:2]
    measured = bool(np.isfinite(settings["capability"]).any())
    aim = "capability" if measured else "generalization (capability was not measured)"
    asked = (
        f"within one standard error ({points(error).lstrip('+')} points) of the best ({percent(best['reliability'])})"
        if floor is None
        else f"at least {percent(floor)}"
    )
    rule = f"Highest {aim} among the settings whose reliability is {asked}."
    return Recommendation(
        trial_id=pick["trial_id"],
        position=f"{pick['layer']}.{pick['module']}",
        settings={name: _plain(pick[name]) for name in SETTINGS_SHOWN if not pd.isna(pick[name])}
        | {"seeds": pick["seeds"]},
        metrics=_metrics_of(pick),
        rule=rule,
        runner_up=None if second is None else second["trial_id"],
        reasons=_reasons(pick, best, len(candidates), len(settings), floor),
        floor=float(least),
        trial_ids=pick["trial_ids"],
    )


def by_preference(settings: pd.DataFrame) -> list[dict[str, Any]]:
    """The settings with a reliability, in the order in which `recommend` takes the first that is reliable enough."""
    return sorted(comparable(settings, ("reliability",)).to_dict("records"), key=_preference)


def pickable(settings: pd.DataFrame) -> tuple[str, ...]:
    """trial_ids of the settings that `recommend` takes at some floor from some of the positions, the preferred first.
    All others stand behind one of the same position that is at least as reliable."""
    most: dict[tuple[int, str], float] = {}
    found = []
    for row in by_preference(settings):
        place = (int(row["layer"]), row["module"])
        if row["reliability"] > most.get(place, -math.inf):
            most[place] = row["reliability"]
            found.append(row["trial_id"])
    return tuple(found)


def best_by_position(settings: pd.DataFrame) -> dict[tuple[int, str], dict[str, Any]]:
    """(layer, module) -> the best setting tried there: the highest reliability, then the highest capability."""
    best: dict[tuple[int, str], dict[str, Any]] = {}

    def rank(row: Mapping[str, Any]) -> tuple[float, float]:
        return round(row["reliability"], 9), row["capability"] if math.isfinite(row["capability"]) else -math.inf

    for row in comparable(settings, ("reliability",)).to_dict("records"):
        place = (int(row["layer"]), row["module"])
        if place not in best or rank(row) > rank(best[place]):
            best[place] = row
    return best


SETTINGS_SHOWN = (
    "layer", "module", "pipeline", "batch_size", "learning_rate", "loss_average", "epochs", "skip_below", "stop_below",
    "dtype",
)  # fmt: skip


def _preference(row: Mapping[str, Any]) -> tuple:
    """Sort key among candidates, best first. Rounded to `SAME`, so that ties are ties."""

    def key(name: str, sign: int) -> float:
        return round(sign * float(row[name]), 9) if math.isfinite(row[name]) else math.inf

    return (
        key("capability", -1), key("generalization", -1), key("drift_kl", 1), key("seconds_per_edit", 1),
        key("reliability", -1), row["trial_id"],
    )  # fmt: skip


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _metrics_of(row: Mapping[str, Any]) -> dict[str, float]:
    names = [
        *METRICS,
        *(name for name in row if name.startswith("capability.")),
        "reliability_se",
        *SPREADS,
        "n_seeds",
    ]
    return {name: float(row[name]) for name in names if math.isfinite(row[name])}


def _reasons(
    pick: Mapping[str, Any], best: Mapping[str, Any], n_candidates: int, n_settings: int, floor: float | None
) -> tuple[str, ...]:
    reasons = []
    if n_settings == 1:
        reasons.append("It is the only setting with a result.")
    else:
        reasons.append(
            f"{n_candidates} of {n_settings} settings {'is' if n_candidates == 1 else 'are'} "
            + ("within one standard error of the best reliability." if floor is None else "as reliable as that.")
        )
        if pick["reliability"] >= best["reliability"] - SAME:
            reasons.append("The pick has the best reliability as well.")
        else:
            reasons.append(
                f"The best reliability, {percent(best['reliability'])}, is at {best['layer']}.{best['module']}"
                + (f" with capability {percent(best['capability'])}" if math.isfinite(best["capability"]) else "")
                + (f" against {percent(pick['capability'])} here." if math.isfinite(pick["capability"]) else ".")
            )
    if math.isfinite(pick["capability_change"]):
        low, high = pick["capability_change_low"], pick["capability_change_high"]
        change = change_with_interval(pick["capability_change"], low, high)
        verdict = ""
        if math.isfinite(low) and math.isfinite(high):
            inside = low <= 0 <= high
            verdict = ": no change that these items could show" if inside else ": more than chance explains"
        reasons.append(f"Capability changed by {change}{verdict}.")
    if pick["n_seeds"] > 1:
        spread = points(pick["reliability_sd"]).lstrip("+")
        reasons.append(
            f"Mean of {plural(int(pick['n_seeds']), 'seed')}; reliability varies by {spread} points"
            " (standard deviation) between them."
        )
    else:
        reasons.append("One seed only: how much another order of the edits would change is not known.")
    if pick["n_failed"]:
        reasons.append(f"{plural(int(pick['n_failed']), 'further seed')} of this setting failed.")
    return tuple(reasons)
