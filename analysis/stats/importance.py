"""Which of the axes that a study varied matter, by PED-ANOVA (Watanabe et al., 2023, as implemented in Optuna).

It measures how much an axis's distribution among the best quarter of the trials differs from that among all: an axis whose
values are distributed alike in both does not decide which trials are best. Each axis is looked at by itself, so axes that were
varied together (a separate rate for each module) share what they explain. With few trials an axis with many values looks
important by chance; so the same is computed with the results shuffled among the trials; what does not exceed that is chance.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial

from analysis.stats.axes import AXES, AXIS
from analysis.stats.table import TITLES, done
from analysis.stats.wording import plural

BEST = 0.25
"""Share of the trials that count as the best."""
FEWEST = 12
"""Minimum number of trials for importance to be reported."""
SHUFFLES = 40
"""How often the results are shuffled; less often for many trials, which make chance small and shuffling slow."""
DECISIVE = 10
"""A numeric axis with more distinct values than this is treated as a range, otherwise as a choice (layers are always a range)."""


@dataclass(frozen=True)
class Importance:
    """What decides whether a trial is among the best in one metric."""

    metric: str
    shares: tuple[tuple[str, float, float], ...]
    """(axis, share of all axes' importance, share that 19 of 20 shuffled studies stay below), highest first."""
    trials: int
    best: int
    """Trials that count as the best; more than a quarter where there are ties."""

    @property
    def matters(self) -> tuple[str, ...]:
        """The axes that stand out from chance."""
        return tuple(axis for axis, share, chance in self.shares if share > chance)


@dataclass(frozen=True)
class WhatMatters:
    found: tuple[Importance, ...]
    not_shown: tuple[str, ...]
    """Sentences on why other metrics, or all of them, have no importance."""


def what_matters(results: pd.DataFrame, *, seed: int = 0) -> WhatMatters:
    """Importance of every axis that varies, for whichever of reliability, generalization, capability and drift were measured.

    A trial that diverged does not count among the best.
    """
    rows = done(results)
    axes = [axis.name for axis in AXES if rows[axis.name].notna().all() and rows[axis.name].nunique() > 1]
    why_not = None
    if not axes:
        why_not = "No axis was varied."
    elif len(axes) == 1:
        why_not = f"Only the {AXIS[axes[0]].title} was varied, so there is nothing to weigh it against."
    elif len(rows) < FEWEST:
        why_not = f"{plural(len(rows), 'finished trial')} are too few; at least {FEWEST} are needed."
    if why_not:
        return WhatMatters((), (why_not,))
    change = "capability_change" if np.isfinite(rows["capability_change"]).any() else "capability"
    study = _study(rows, axes)
    quantile = max(BEST, 5 / len(rows))
    found, not_shown = [], []
    for metric in ("reliability", "generalization", change, "drift_kl"):
        values = rows[metric].to_numpy("float64", copy=True)
        usable = np.isfinite(values) & (rows["diverged"].fillna(0) != 1).to_numpy()
        if usable.sum() < FEWEST:
            continue
        loss = np.where(usable, values if metric == "drift_kl" else -values, np.inf)
        loss[~usable] = loss[usable].max() + 1.0
        best = int((loss <= np.sort(loss)[math.ceil(quantile * len(loss)) - 1]).sum())
        if best > 0.8 * len(loss):
            title = TITLES[metric].capitalize()
            not_shown.append(
                f"{title} is at its best in {best} of {len(loss)} trials, too many to tell the settings apart."
            )
            continue
        found.append(_importance(study, axes, metric, loss, best, quantile, np.random.default_rng(seed)))
    return WhatMatters(tuple(found), tuple(not_shown))


def _importance(
    study: optuna.Study,
    axes: Sequence[str],
    metric: str,
    loss: np.ndarray,
    best: int,
    quantile: float,
    rng: np.random.Generator,
) -> Importance:
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)

    def weigh(losses: np.ndarray) -> np.ndarray:
        def target(trial: FrozenTrial) -> float:
            return float(losses[trial.number])

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about the target being minimised, which is intended
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, params=list(axes), target=target, normalize=False
            )
        return np.array([found[name] for name in axes])

    weights = weigh(loss)
    total = weights.sum() or 1.0
    shuffles = max(10, min(SHUFFLES, 20_000 // len(loss)))
    chance = np.quantile([weigh(rng.permutation(loss)) for _ in range(shuffles)], 0.95, axis=0)
    shares = sorted(zip(axes, weights / total, chance / total, strict=True), key=lambda item: -item[1])
    return Importance(metric, tuple((name, float(a), float(b)) for name, a, b in shares), len(loss), best)


def _study(rows: pd.DataFrame, axes: Sequence[str]) -> optuna.Study:
    """The trials as an Optuna study; their losses are looked up by trial number."""
    space: dict[str, BaseDistribution] = {}
    plain = {name: AXIS[name].type for name in axes}
    for name, kind in plain.items():
        values = rows[name]
        if name == "layer" or (kind is not str and values.nunique() > DECISIVE):
            distribution = IntDistribution if kind is int else FloatDistribution
            low, high = kind(values.min()), kind(values.max())
            space[name] = distribution(low, high, log=AXIS[name].log and low > 0)
        else:
            space[name] = CategoricalDistribution([kind(value) for value in values.unique()])
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study()
    optuna.logging.set_verbosity(level)
    study.add_trials(
        [
            optuna.create_trial(params={name: plain[name](row[name]) for name in axes}, distributions=space, value=0.0)
            for row in rows.to_dict("records")
        ]
    )
    return study


def importance_sentences(weighed: WhatMatters) -> list[tuple[str, str]]:
    """(metric, sentence on what decides it) pairs."""
    said = []
    for item in weighed.found:
        matters = [(AXIS[axis].title, share) for axis, share, _ in item.shares if axis in item.matters]
        rest = [AXIS[axis].title for axis, *_ in item.shares if axis not in item.matters]
        text = "No axis stands out from chance"
        if matters:
            text = f"Mostly the {matters[0][0]} ({100 * matters[0][1]:.0f}%)"
            text += "".join(f", then the {axis} ({100 * share:.0f}%)" for axis, share in matters[1:])
            text += f"; no more than chance: {', '.join(rest)}" if rest else ""
        said.append((TITLES[item.metric].capitalize(), text + "."))
    return said
