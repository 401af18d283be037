"""Which of the axes that a study varied matter, by PED-ANOVA (Watanabe et al., 2023, as implemented in Optuna).

It measures how much an axis's distribution among the best quarter of the trials differs from that among all: an axis whose
values are distributed alike in both does not decide which trials are best. Each axis is looked at by itself, so axes that were
varied together (a separate rate for each module) share what they explain. With few trials an axis with many values looks
important by chance; so the same is computed with the results shuffled among the trials; what does not exceed that is chance.
"""

import math
import warnings
from dataclasses import dataclass

import numpy as np
import optuna
import pandas as pd
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator

from analysis.stats.axes import AXES, AXIS
from analysis.stats.table import TITLES, done, has_values
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


def what_matters(results: pd.DataFrame) -> WhatMatters:
    """Importance of every axis that varies, for whichever of reliability, generalization, capability and drift were measured.

    A trial that diverged does not count among the best.
    """
    rows = done(results)
    axes = [axis.name for axis in AXES if rows[axis.name].notna().all() and rows[axis.name].nunique() > 1]
    if not axes:
        return WhatMatters((), ("No axis was varied.",))
    if len(axes) == 1:
        only = f"Only the {AXIS[axes[0]].title} was varied, so there is nothing to weigh it against."
        return WhatMatters((), (only,))
    if len(rows) < FEWEST:
        few = f"{plural(len(rows), 'finished trial')} are too few; at least {FEWEST} are needed."
        return WhatMatters((), (few,))
    study, quantile = _study(rows, axes), max(BEST, 5 / len(rows))
    change = "capability_change" if has_values(rows, "capability_change") else "capability"
    found, not_shown = [], []
    for metric in ("reliability", "generalization", change, "drift_kl"):
        values = rows[metric].to_numpy()
        usable = np.isfinite(values) & (rows["diverged"] != 1).to_numpy()
        if usable.sum() < FEWEST:
            continue
        loss = values if metric == "drift_kl" else -values
        loss = np.where(usable, loss, loss[usable].max() + 1.0)
        best = int((loss <= np.sort(loss)[math.ceil(quantile * len(loss)) - 1]).sum())
        if best > 0.8 * len(loss):
            at_best = f"{TITLES[metric].capitalize()} is at its best in {best} of {len(loss)} trials"
            not_shown.append(f"{at_best}, too many to tell the settings apart.")
            continue
        weights, rng = _weights(study, axes, quantile, loss), np.random.default_rng(0)
        shuffles = max(10, min(SHUFFLES, 20_000 // len(loss)))
        by_chance = [_weights(study, axes, quantile, rng.permutation(loss)) for _ in range(shuffles)]
        shares = np.stack([weights, np.quantile(by_chance, 0.95, axis=0)], axis=1) / (weights.sum() or 1.0)
        listed = sorted(zip(axes, *shares.T.tolist(), strict=True), key=lambda item: -item[1])
        found.append(Importance(metric, tuple(listed), len(loss), best))
    return WhatMatters(tuple(found), tuple(not_shown))


def _weights(study: optuna.Study, axes: list[str], quantile: float, loss: np.ndarray) -> np.ndarray:
    """(axes,): the importance of each, where `quantile` of the trials, with these losses, count as the best."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the target being minimised, which is intended
        found = optuna.importance.get_param_importances(
            study,
            evaluator=PedAnovaImportanceEvaluator(target_quantile=quantile),
            params=axes,
            target=lambda trial: float(loss[trial.number]),
            normalize=False,
        )
    return np.array([found[name] for name in axes])


def _study(rows: pd.DataFrame, axes: list[str]) -> optuna.Study:
    """The trials as an Optuna study; their losses are looked up by trial number."""
    space: dict[str, BaseDistribution] = {}
    for name in axes:
        values, kind = rows[name], AXIS[name].type
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
    for row in rows[axes].to_dict("records"):
        params = {name: AXIS[name].type(value) for name, value in row.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=space, value=0.0))
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
