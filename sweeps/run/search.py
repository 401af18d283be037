"""Multi-objective search with Optuna. It is slow to import: callers import this module only when a study uses it."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution

from sweeps.study.trial_types import TrialConfig, TrialResult

OBJECTIVES = ("reliability", "capability")
"""Metrics that a search maximises."""
SAME_AGAIN = 200
"""Consecutive proposals of known trials after which the space counts as used up."""


class OptunaSearch:
    """Proposes configurations by Optuna's multi-objective TPE, learns from results, repeats none (`sweeps.run.dispatch.Search`).

    The sampler is given earlier results at the start, so a resumed search continues where it left off.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        to_config: Callable[[Mapping[str, Any]], TrialConfig],
        trials: int,
        seed: int,
        earlier: Mapping[str, tuple[Mapping[str, Any], tuple[float, ...]]],
    ):
        """space: axis -> list of values, or ("log_uniform", low, high). trials: most trials to propose. earlier: trial id ->
        point and objectives."""
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed + len(earlier), multivariate=True)
        self._study = optuna.create_study(directions=["maximize"] * len(OBJECTIVES), sampler=sampler)
        self._space = {axis: _distribution(values) for axis, values in space.items()}
        self._left = trials
        self._to_config = to_config
        self._known: dict[str, tuple[float, ...] | None] = {name: values for name, (_, values) in earlier.items()}
        """Trial id -> objectives; None while it runs, and if it failed."""
        self._proposed: dict[str, tuple[optuna.trial.Trial, str]] = {}
        """Key of the proposal -> the proposal, and the id of its trial."""
        for point, values in earlier.values():
            told = {"params": dict(point), "distributions": self._space, "values": list(values)}
            self._study.add_trial(optuna.trial.create_trial(**told))

    def propose(self, key: str) -> TrialConfig | None:
        """A configuration that was neither run nor proposed before; None when the space seems used up, or `trials` are
        proposed, and from then on."""
        for _ in range(SAME_AGAIN if self._left > 0 else 0):
            proposal = self._study.ask(self._space)
            config = self._to_config(proposal.params)
            if config.id not in self._known:
                self._left -= 1
                self._known[config.id] = None
                self._proposed[key] = (proposal, config.id)
                return config
            self._tell(proposal, self._known[config.id])
        self._left = 0  # asking again would take as long, and longer each time
        return None

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Tell the sampler the result of a proposal; None if it brought none."""
        proposal, trial_id = self._proposed.pop(key)
        self._known[trial_id] = objectives(result.metrics) if result and result.status == "done" else None
        self._tell(proposal, self._known[trial_id])

    def _tell(self, proposal: optuna.trial.Trial, values: Sequence[float] | None) -> None:
        self._study.tell(proposal, values, None if values else optuna.trial.TrialState.FAIL)


def objectives(metrics: Mapping[str, Any]) -> tuple[float, ...]:
    """The values that a search maximises. Without a capability suite, capability counts as 0.

    metrics: of a trial that is done, or its row of the results table."""
    values = (metrics.get(name, 0.0) for name in OBJECTIVES)
    return tuple(0.0 if math.isnan(value) else value for value in values)


def _distribution(values: Any) -> BaseDistribution:
    if isinstance(values, tuple):
        return FloatDistribution(values[1], values[2], log=True)
    return CategoricalDistribution(list(values))
