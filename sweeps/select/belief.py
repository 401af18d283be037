"""What the runs so far let one expect of every position, measured or not.

Legend: C candidates, S draws.

Each metric is a Gaussian process (Rasmussen and Williams, 2006, chapter 2) over relative depth and kind of module, and on
three things known beforehand: the probe's log disturbance, if there was a probe, lying in the last third of the layers, and
training attention. What these do was much the same in the tables of two models (docs/measurements.md, "Selection"): it is what
is expected of a new one, and every run corrects it. Nothing is fitted to the model at hand. A position that was measured is what
was measured.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from analysis.stats.pick import DRIFT_MARGIN, Evidence, Verdict, judge

DRAWS = 512
REACH = 0.25
"""Relative depth over which positions resemble each other."""
LATE = 0.7
"""Relative depth at which layers begin to be late ones."""
ALONE = 0.3
"""What is a position's own, as a share of what changes with depth."""
LEAST_RELIABILITY = 0.5
"""A run that learnt less tells others no more than one that learnt this."""
GENERALIZATION_MARGIN = 0.03
"""Of generalization, that is worth another run."""
DRAWN = ("reliability", "generalization", "change", "change_high", "drift", "cost")
"""Fields of `Evidence` that have a row for each draw."""
CAPABILITY_ERROR = 0.02
"""Half the interval of a change of capability that was not measured."""
Effect = tuple[float, float]
"""Mean and standard deviation over models."""


@dataclass(frozen=True)
class Scale:
    """Standard deviations of a metric over the positions of a model, by where they come from."""

    centre: float
    common: float
    """Of all positions together."""
    depth: float
    module: float
    noise: float
    """Of one run."""
    effects: tuple[Effect, ...] = ((0.0, 0.0),) * 3
    """Of one standard deviation of the probe's log disturbance, of lying in the last third of the layers, and of training the
    attention; of training the whole layer half as much."""


SCALES = {
    "drift_kl": Scale(math.log(0.08), 2.0, 0.6, 0.5, 0.25, ((0.5, 0.3), (-0.6, 0.6), (0.8, 0.4))),  # of its logarithm
    "generalization": Scale(0.4, 0.5, 0.12, 0.05, 0.05, ((0.0, 0.05), (0.2, 0.1), (0.05, 0.1))),
    "reliability": Scale(1.1, 0.15, 0.1, 0.1, 0.03),  # most positions learn all, so what is above 1 counts as 1
    "capability_change": Scale(0.0, 0.05, 0.02, 0.01, 0.008),
}
DRIFT = {"natural_gradient": Scale(math.log(0.01), 2.0, 0.6, 0.5, 0.25)}
"""Method -> the scale of the logarithm of its drift, where that of `SCALES`, which is Adam's, does not fit. Natural gradients
drift little, and nothing known beforehand tells where."""


@dataclass(frozen=True)
class Place:
    """A candidate as the belief sees it."""

    depth: float
    """Relative: 0 for the first layer, 1 for the last."""
    module: str
    disturbance: float
    """As the probe has it; infinite if it is not known, or if the position cannot learn."""
    cost: float
    """In seconds."""
    measured: dict[str, float] | None = None
    """The metrics of `SCALES`; NaN where a run has none, all NaN where it cannot be picked. None: not run yet."""


@dataclass(frozen=True)
class Chances:
    """Shares of the draws, (C,)."""

    pick: np.ndarray
    """In which the rule picks the place."""
    front: np.ndarray
    """In which no other place both drifts less and gives more right answers to rephrased prompts."""
    better: np.ndarray
    """In which the rule picks the place and it is clearly better than the best of those measured: that one fails a step of the
    rule, drifts more by more than `DRIFT_MARGIN`, or generalizes less by more than `GENERALIZATION_MARGIN`."""


def chances(places: Sequence[Place], method: str = "") -> Chances:
    """What each place may turn out to be, by draws of what all of them may measure, on 100 edits. method: that all train with."""
    rng = np.random.default_rng(0)
    beforehand = features(places)
    scales = SCALES | {"drift_kl": DRIFT.get(method, SCALES["drift_kl"])}
    drawn = {metric: _draws(metric, scale, places, beforehand, rng) for metric, scale in scales.items()}
    drift, generalization, reliability, change = drawn.values()
    cost, size = np.array([place.cost for place in places]), len(places)
    barred = np.array([_barred(place) for place in places])
    reliability = np.where(barred, -1.0, reliability)
    evidence = Evidence(
        reliability,
        generalization,
        change,
        change + CAPABILITY_ERROR,
        drift,
        np.broadcast_to(cost, drift.shape),
        edits=np.full(size, 100.0),
        right=np.empty((size, 0)),
        counts=np.empty(0),
    )
    verdict = judge(evidence)
    best = verdict.order[:, 0]
    measured = np.flatnonzero([place.measured is not None for place in places] & ~barred)
    clear = _clearly_better(evidence, verdict, measured) if len(measured) else np.ones(DRAWS, dtype=bool)
    right = np.nan_to_num(generalization) * reliability
    order = np.lexsort((right, np.nan_to_num(drift, nan=math.inf)))
    sorted_right = np.take_along_axis(right, order, axis=1)
    before = np.maximum.accumulate(np.pad(sorted_right[:, :-1], ((0, 0), (1, 0)), constant_values=-1.0), axis=1)
    front = np.bincount(order[sorted_right > before], minlength=size) / DRAWS
    pick, better = (np.bincount(some, minlength=size) / DRAWS for some in (best, best[clear]))
    return Chances(pick, np.where(barred, 0.0, front), better)


def _clearly_better(evidence: Evidence, verdict: Verdict, measured: np.ndarray) -> np.ndarray:
    """(S,): whether the best of a draw is clearly better than the best of the measured places, which are the same in all."""
    known = {name: getattr(evidence, name)[0, measured] for name in DRAWN}
    of_known = replace(evidence, **known, edits=evidence.edits[measured], right=evidence.right[measured])
    leader, best = measured[judge(of_known).order[0]], verdict.order[:, :1]

    def gain(values: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values, best, axis=1)[:, 0] - values[:, leader]

    more = gain(evidence.generalization) > GENERALIZATION_MARGIN
    return ~verdict.able[:, leader] | (gain(-evidence.drift) > DRIFT_MARGIN) | more


def _barred(place: Place) -> bool:
    return place.measured is not None and math.isnan(place.measured["reliability"])


def _draws(
    metric: str, scale: Scale, places: Sequence[Place], beforehand: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """(S, C): what the places may measure. NaN everywhere for a metric that the runs so far do not have. beforehand: the
    `features` of the places."""
    log = metric == "drift_kl"
    values = np.array([place.measured[metric] if place.measured else math.nan for place in places])
    known = np.flatnonzero(np.isfinite(values))
    if not len(known) and any(place.measured and not _barred(place) for place in places):
        return np.full((DRAWS, len(places)), math.nan)
    seen = np.log(np.maximum(values, 1e-6)) if log else values
    telling = np.maximum(seen, LEAST_RELIABILITY) if metric == "reliability" else seen
    covariance = _covariance(scale, places, beforehand)
    expected = scale.centre + beforehand @ [mean for mean, _ in scale.effects]
    gain = np.linalg.solve(
        covariance[np.ix_(known, known)] + scale.noise**2 * np.eye(len(known)), covariance[known]
    )  # (known, C)
    mean = expected + (telling[known] - expected[known]) @ gain
    spread, directions = np.linalg.eigh(covariance - covariance[:, known] @ gain)
    root = directions * np.sqrt(spread.clip(min=0)) @ directions.T  # the only symmetric one: the same on every machine
    drawn = mean + rng.standard_normal((DRAWS, len(places))) @ root
    drawn[:, known] = seen[known]
    if log:
        return np.exp(drawn)
    return drawn if metric == "capability_change" else drawn.clip(0, 1)


def _covariance(scale: Scale, places: Sequence[Place], beforehand: np.ndarray) -> np.ndarray:
    """(C, C), before anything is measured."""
    depth = np.array([place.depth for place in places])
    module = np.array([place.module for place in places])
    same = (module[:, None] == module[None]).astype(float)
    near = np.exp(-0.5 * ((depth[:, None] - depth[None]) / REACH) ** 2)
    spread = beforehand * [spread for _, spread in scale.effects]
    return (
        scale.common**2
        + spread @ spread.T
        + scale.depth**2 * near * (1 + same) / 2
        + scale.module**2 * same
        + (ALONE * scale.depth) ** 2 * np.eye(len(places))
    )


def features(places: Sequence[Place]) -> np.ndarray:
    """(C, 3): what is known of every place before it is run, in the order of `Scale.effects`."""
    disturbance = standardised([place.disturbance for place in places])
    late = [1 / (1 + math.exp((LATE - place.depth) / 0.05)) for place in places]
    attention = [0.5 if place.module == "layer" else float(place.module.startswith("attn")) for place in places]
    return np.stack([disturbance, late, attention], axis=1)


def standardised(disturbances: Sequence[float]) -> np.ndarray:
    """Logarithms with mean 0 and standard deviation 1. A position that cannot learn is taken for the worst; all are 0 if none is
    known."""
    given = np.array(disturbances)
    usable = np.isfinite(given) & (given > 0)
    if not usable.any():
        return np.zeros(len(given))
    logs = np.log(np.where(usable, given, given[usable].max()))
    return (logs - logs.mean()) / max(float(logs.std()), 1e-9)
