"""Which of several measured settings to use: the rule of the selection, and how sure it is.

The rule, step by step:

1. reliability within one standard error of the best (a smaller difference says nothing about new edits);
2. no loss of capability that the items show: zero is not above the 95% interval of the paired change. (A gain is no aim:
   an edit that shakes a model enough raises some accuracies by chance.)
3. drift within 0.01 nats per token of the least, about one per cent of perplexity;
4. of those, the highest generalization.

Where no setting passes a step, the best in it do.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from analysis.stats.table import Z95, proportion_se, wilson_interval

DRIFT_TOLERANCE = 0.01
"""Nats per token that are not worth losing generalization for."""
DRAWS = 2000
SEED_SPREAD = 0.1
"""Standard error of a single seed's drift, as a share of it."""
RULE = (
    "Highest generalization among the settings whose drift is within 0.01 nats of the least, of those that lose no"
    " capability the items show and whose reliability is within one standard error of the best."
)


@dataclass(frozen=True)
class Outcome:
    """What a setting does, averaged over its seeds, with standard errors."""

    reliability: float
    reliability_se: float
    generalization: float
    generalization_se: float
    capability_change: float
    capability_se: float
    """Of the paired change, over items."""
    drift: float
    """Nats per token; infinite where training diverged."""
    drift_se: float


FAILED = Outcome(0.0, 0.0, 0.0, 0.0, -1.0, 0.0, float("inf"), 0.0)
"""Of a run that failed or diverged."""


def outcome_of(metrics: Mapping[str, float]) -> Outcome:
    """From a trial's metrics. What was not measured (capability, drift, rephrases) counts as no loss and no gain."""

    def value(name: str, absent: float = 0.0) -> float:
        found = metrics.get(name, math.nan)
        return absent if found is None or not math.isfinite(found) else float(found)

    if value("diverged"):
        return FAILED
    edits = value("n_edits", 1.0)
    drift = value("drift_kl")
    return Outcome(
        reliability=value("reliability"),
        reliability_se=proportion_se(value("reliability"), edits),
        generalization=value("generalization"),
        generalization_se=proportion_se(value("generalization"), edits),
        capability_change=value("capability_change"),
        capability_se=(value("capability_change_high") - value("capability_change_low")) / (2 * Z95),
        drift=drift,
        drift_se=SEED_SPREAD * drift,
    )


def preference(outcomes: Sequence[Outcome]) -> list[int]:
    """Indices of the outcomes, the one to use first."""
    if not outcomes:
        return []
    return [int(i) for i in _order(_table(outcomes), _errors(outcomes))]


def probabilities(outcomes: Sequence[Outcome], correct: np.ndarray | None = None, seed: int = 0) -> list[float]:
    """For each outcome how often the rule picks it when everything is measured again.

    Edits are drawn again with replacement, the same for all settings. Capability and drift vary by their errors, which
    counts what settings share of them (the same items, the same prose) as chance and so errs towards doubt.

    correct: (settings, 2, edits), how right the answer to each edit's prompt and its rephrased prompt was, in [0, 1];
    None takes the reliability of all settings to vary together, and generalization by its error.
    """
    if not outcomes:
        return []
    rng = np.random.default_rng(seed)
    table = np.where(np.isfinite(_table(outcomes)), _table(outcomes), 1e6)  # (settings, 4)
    errors = _errors(outcomes)
    picks = np.zeros(len(outcomes))
    for noise in rng.standard_normal((DRAWS, *table.shape)):
        noise[:, 0] = noise[0, 0]
        drawn = table + noise * errors
        if correct is not None:
            drawn[:, :2] = correct[:, :, rng.integers(correct.shape[2], size=correct.shape[2])].mean(axis=2)
        drawn[:, :2] = drawn[:, :2].clip(0, 1)
        drawn[:, 3] = drawn[:, 3].clip(0)
        picks[_order(drawn, errors)[0]] += 1
    return (picks / DRAWS).tolist()


def intervals(outcome: Outcome, edits: int) -> dict[str, tuple[float, float, float]]:
    """Metric -> (value, low, high): what to expect of such an edit, with 95% intervals. edits: how many it was measured on."""

    def normal(value: float, error: float, least: float) -> tuple[float, float, float]:
        return value, max(least, value - Z95 * error), value + Z95 * error

    return {
        "reliability": (outcome.reliability, *wilson_interval(outcome.reliability, edits)),
        "generalization": (outcome.generalization, *wilson_interval(outcome.generalization, edits)),
        "capability_change": normal(outcome.capability_change, outcome.capability_se, -1.0),
        "drift_kl": normal(outcome.drift, outcome.drift_se, 0.0),
    }


def _table(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([[o.reliability, o.generalization, o.capability_change, o.drift] for o in outcomes])


def _errors(outcomes: Sequence[Outcome]) -> np.ndarray:
    return np.array([[o.reliability_se, o.generalization_se, o.capability_se, o.drift_se] for o in outcomes])


def _order(table: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """table: (settings, 4) reliability, generalization, capability change, drift. errors: (settings, 4) of these."""
    reliability, generalization, change, drift = table.T
    best = reliability.max()
    reliable = reliability >= best - errors[reliability == best, 0].min() - 1e-9
    able = reliable & (change >= min(0.0, change[reliable].max()) - Z95 * errors[:, 2] - 1e-9)
    gentle = able & (drift <= drift[able].min() + DRIFT_TOLERANCE)
    steps = 3 - reliable.astype(int) - able - gentle
    last = np.where(gentle, -generalization, np.where(reliable, drift, -reliability))
    return np.lexsort((*errors.T, -change, -reliability, -generalization, drift, last, steps))
