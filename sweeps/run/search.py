"""Multi-objective search with Optuna, which takes a moment to import and is imported where a study asks for it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    import optuna

OBJECTIVES = ("reliability", "capability")
"""What a search maximises."""
SAME_AGAIN = 200
"""Proposals in a row that may be known trials before the space counts as used up."""


class PointSampler:
    """Optuna's ask and tell over points (axis -> value) of a space."""

    def __init__(self, space: Mapping[str, Any], directions: Sequence[str], sampler: "optuna.samplers.BaseSampler"):
        """space: axis -> list of values, ("log_uniform", low, high), or a distribution of Optuna. directions: "maximize" or
        "minimize" for each value."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        self._space = {axis: _distribution(values) for axis, values in space.items()}
        self._study = optuna.create_study(directions=list(directions), sampler=sampler)

    def add(self, point: Mapping[str, Any], values: Sequence[float]) -> None:
        """Tell of a point that was measured before."""
        import optuna

        self._study.add_trial(
            optuna.trial.create_trial(params=dict(point), distributions=self._space, values=list(values))
        )

    def ask(self) -> "optuna.trial.Trial":
        """A proposal; its `params` are the point."""
        return self._study.ask(self._space)

    def tell(self, proposal: "optuna.trial.Trial", values: Sequence[float] | None) -> None:
        """The values of a proposal; None when there are none."""
        import optuna

        if values is None:
            self._study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(proposal, list(values))


class OptunaSearch:
    """Proposes configurations by Optuna's multi-objective TPE, learns from results, repeats none (`sweeps.run.dispatch.Search`).

    The sampler is told at the start what was found earlier, so a resumed search goes on where it was.
    """

    def __init__(
        self,
        space: Mapping[str, Any],
        to_config: Callable[[Mapping[str, Any]], TrialConfig],
        trials: int,
        seed: int,
        earlier: Mapping[str, tuple[Mapping[str, Any], tuple[float, ...] | None]],
    ):
        """space: see `PointSampler`. trials: to propose at most. earlier: trial id -> point and objectives (None: it failed)."""
        import optuna

        sampler = optuna.samplers.TPESampler(seed=seed + len(earlier), multivariate=True)
        self._points = PointSampler(space, ["maximize"] * len(OBJECTIVES), sampler)
        self._left = trials
        self._to_config = to_config
        self._known = {trial_id: values for trial_id, (_, values) in earlier.items()}
        self._proposed: dict[str, tuple[optuna.trial.Trial, str]] = {}
        """By the key of the proposal: it, and the id of its trial."""
        for point, values in earlier.values():
            if values is not None:
                self._points.add(point, values)

    def propose(self, key: str) -> TrialConfig | None:
        """A configuration that was neither run nor proposed before; None when the space seems used up, or trials are."""
        for _ in range(SAME_AGAIN if self._left > 0 else 0):
            proposal = self._points.ask()
            config = self._to_config(proposal.params)
            if config.id not in self._known:
                self._left -= 1
                self._known[config.id] = None
                self._proposed[key] = (proposal, config.id)
                return config
            self._points.tell(proposal, self._known[config.id])
        return None

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Tell the sampler what came of a proposal; None when nothing did."""
        proposal, trial_id = self._proposed.pop(key)
        values = objectives(result) if result else None
        self._known[trial_id] = values
        self._points.tell(proposal, values)


def objectives(result: TrialResult) -> tuple[float, ...] | None:
    """What a search maximises; None for a failed trial. A study without a capability suite counts it as 0."""
    if result.status == "failed":
        return None
    return tuple(result.metrics.get(name, 0.0) for name in OBJECTIVES)


def _distribution(values: Any) -> "optuna.distributions.BaseDistribution":
    import optuna

    if isinstance(values, optuna.distributions.BaseDistribution):
        return values
    if isinstance(values, tuple) and values[0] == "log_uniform":
        return optuna.distributions.FloatDistribution(values[1], values[2], log=True)
    return optuna.distributions.CategoricalDistribution(list(values))
