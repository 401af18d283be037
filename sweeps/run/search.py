"""Searches that choose trials while they run: what every one does, and multi-objective search with Optuna."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from sweeps.study.trial_types import TrialConfig, TrialResult

OBJECTIVES = ("reliability", "capability")


class Search(Protocol):
    """Chooses trials while others run. Called in the driver, one call at a time."""

    def propose(self, key: str) -> TrialConfig | Literal["wait"] | None:
        """The next trial; "wait" when that depends on running ones; None when there is no further one."""

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Hear what came of the trial proposed under this key; None where nothing came."""


class TrialSearch:
    """Multi-objective search with Optuna: proposes configurations, learns from results, repeats none.

    What was found earlier is told to the sampler at the start, so a resumed search goes on where it was.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        to_config: Callable[[Mapping[str, Any]], TrialConfig],
        trials: int,
        seed: int,
        earlier: Mapping[str, tuple[Mapping[str, Any], tuple[float, float] | None]],
    ):
        """space: axis -> list of values, or ("log_uniform", low, high). trials: to propose at most. earlier: trial id -> (point,
        objectives)."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._left = trials
        self._to_config = to_config
        self._space = {axis: _distribution(values) for axis, values in space.items()}
        sampler = optuna.samplers.TPESampler(seed=seed + len(earlier), multivariate=True)
        self._study = optuna.create_study(directions=["maximize"] * len(OBJECTIVES), sampler=sampler)
        self._known: dict[str, tuple[float, ...] | None] = {}
        self._asked: dict[str, Any] = {}
        for trial_id, (point, values) in earlier.items():
            self._known[trial_id] = values
            if values is not None:
                told = optuna.trial.create_trial(params=dict(point), distributions=self._space, values=values)
                self._study.add_trial(told)

    def propose(self, key: str) -> TrialConfig | None:
        """A configuration that was neither run nor proposed before; None when the space seems used up, or trials are."""
        for _ in range(200 if self._left > 0 else 0):
            asked = self._study.ask(self._space)
            config = self._to_config(asked.params)
            if config.id not in self._known:
                self._left -= 1
                self._known[config.id] = None
                self._asked[key] = (asked, config.id)
                return config
            self._tell(asked, self._known[config.id])
        return None

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Tell the sampler what came of a proposal; None where nothing came."""
        asked, trial_id = self._asked.pop(key)
        values = objectives(result) if result else None
        self._known[trial_id] = values
        self._tell(asked, values)

    def _tell(self, asked, values: tuple[float, ...] | None) -> None:
        import optuna

        if values is None:
            self._study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(asked, values)


def objectives(result: TrialResult) -> tuple[float, ...] | None:
    """What a search maximises; None for a failed trial. A study without a capability suite counts it as 0."""
    if result.status == "failed":
        return None
    return tuple(result.metrics.get(name, 0.0) for name in OBJECTIVES)


def _distribution(values: Any):
    import optuna

    if isinstance(values, tuple) and values[0] == "log_uniform":
        return optuna.distributions.FloatDistribution(values[1], values[2], log=True)
    return optuna.distributions.CategoricalDistribution(list(values))
