"""Which of the axes that a study varied matter, by PED-ANOVA (Watanabe et al., 2023, as Optuna has it).

It asks how differently an axis is spread among the best quarter of the trials and among all: an axis whose values are the
same in both does not decide what is among the best. Each axis is looked at by itself, so axes that were varied together
(a rate of its own for each module) share what they explain. With few trials an axis of many values looks important by
chance; the same is therefore computed with the results dealt out anew among the trials, and what does not stand out from
that is said to be chance.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import optuna
import pandas as pd
import plotly.graph_objects as go
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import PedAnovaImportanceEvaluator
from optuna.trial import FrozenTrial

from analysis.figures.style import BLUE, INK, TITLES, styled_figure
from analysis.stats.table import done
from analysis.stats.wording import escaped, plural

BEST = 0.25
"""Share of the trials that count as the best."""
FEWEST = 12
"""Trials below which nothing is said."""
SHUFFLES = 40
"""Times that the results are dealt out anew; fewer where trials are many, which makes chance small and shuffling slow."""
DECISIVE = 10
"""More distinct values than these are a range, fewer are a choice."""
LOWER_IS_BETTER = ("drift_kl",)
AXES = {
    "layer": "layer", "module": "module", "pipeline": "pipeline", "batch_size": "batch", "learning_rate": "rate",
    "loss_average": "loss by", "epochs": "epochs", "seed": "seed",
}  # fmt: skip


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
    """Why the other metrics, or all, have none: sentences."""


def what_matters(results: pd.DataFrame, *, seed: int = 0) -> WhatMatters:
    """Importance of every axis that varies, for reliability, generalization, capability and drift as far as measured.

    A trial that diverged counts as not among the best.
    """
    rows = done(results)
    axes = [name for name in AXES if rows[name].notna().all() and rows[name].nunique() > 1]
    if len(axes) < 2:
        varied = f"Only the {AXES[axes[0]]} was varied" if axes else "No axis was varied"
        return WhatMatters((), (f"{varied}, so there is nothing to weigh against it.",) if axes else (f"{varied}.",))
    if len(rows) < FEWEST:
        return WhatMatters((), (f"{plural(len(rows), 'finished trial')} are too few; it takes {FEWEST}.",))
    change = "capability_change" if np.isfinite(rows["capability_change"]).any() else "capability"
    study = _study(rows, axes)
    found, not_shown = [], []
    for metric in ("reliability", "generalization", change, "drift_kl"):
        values = rows[metric].to_numpy("float64", copy=True)
        usable = np.isfinite(values) & (rows["diverged"].fillna(0) != 1).to_numpy()
        if usable.sum() < FEWEST:
            continue
        loss = np.where(usable, values if metric in LOWER_IS_BETTER else -values, np.inf)
        loss[~usable] = loss[usable].max() + 1.0
        quantile = max(BEST, 5 / len(rows))
        best = int((loss <= np.partition(loss, math.ceil(quantile * len(loss)) - 1)[math.ceil(quantile * len(loss)) - 1]).sum())
        if best > 0.8 * len(loss):
            not_shown.append(f"{TITLES[metric].capitalize()} is at its best in {best} of {len(loss)} trials: nothing to tell apart.")
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
            warnings.simplefilter("ignore")  # that a target is minimised, which is meant
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
    """The trials as Optuna knows them; their values are looked up by number."""
    space: dict[str, BaseDistribution] = {}
    plain: dict[str, Callable] = {}
    for name in axes:
        values = rows[name]
        if name == "layer":
            space[name], plain[name] = IntDistribution(int(values.min()), int(values.max())), int
        elif name == "learning_rate" and values.nunique() > DECISIVE:
            space[name], plain[name] = FloatDistribution(float(values.min()), float(values.max()), log=True), float
        else:
            choices = [value.item() if hasattr(value, "item") else value for value in values.unique()]
            space[name], plain[name] = CategoricalDistribution(choices), type(choices[0])
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


def sentences(weighed: WhatMatters) -> list[tuple[str, str]]:
    """(metric, what decides it) in words."""
    said = []
    for item in weighed.found:
        matters = [(AXES[axis], share) for axis, share, chance in item.shares if share > chance]
        rest = [AXES[axis] for axis, share, chance in item.shares if share <= chance]
        text = (
            f"mostly the {matters[0][0]} ({100 * matters[0][1]:.0f}%)" if matters else "no axis stands out from chance"
        )
        text += "".join(f", then the {axis} ({100 * share:.0f}%)" for axis, share in matters[1:])
        text += f"; not told from chance: {', '.join(rest)}" if matters and rest else ""
        said.append((TITLES[item.metric].capitalize(), text[0].upper() + text[1:] + "."))
    return said


def importance_figure(weighed: WhatMatters) -> go.Figure:
    """A row of bars per metric and axis, a tick where chance ends."""
    bars = [(TITLES[item.metric], *share) for item in weighed.found for share in item.shares]
    figure = styled_figure(
        height=70 + 26 * len(bars) + 14 * len(weighed.found),
        xaxis={"title": {"text": "share of importance"}, "tickformat": ".0%", "rangemode": "tozero"},
        yaxis={"autorange": "reversed", "showgrid": False, "type": "multicategory", "dividercolor": "#dfe3e9"},
        bargap=0.3,
    )
    rows = [[escaped(title) for title, *_ in bars], [AXES[axis] for _, axis, _, _ in bars]]
    figure.add_bar(
        y=rows, x=[round(share, 4) for *_, share, _ in bars], orientation="h", name="importance",
        marker={"color": [BLUE if share > chance else "#b9c2cd" for *_, share, chance in bars]},
        hovertemplate="%{y}: %{x:.0%}<extra></extra>", showlegend=False,
    )  # fmt: skip
    figure.add_scatter(
        y=rows, x=[round(chance, 4) for *_, chance in bars], mode="markers", name="95% of shuffled studies stay below",
        marker={"symbol": "line-ns-open", "size": 16, "color": INK, "line": {"width": 2}},
        hovertemplate="chance reaches %{x:.0%}<extra></extra>",
    )  # fmt: skip
    return figure
