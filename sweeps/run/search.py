"""Multi-objective search with Optuna, which is slow to import and therefore imported only where a study uses it."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    import optuna

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
        earlier: Mapping[str, tuple[Mapping[str, Any], tuple[float, ...] | None]],
    ):
        """space: axis -> list of values, or ("log_uniform", low, high). trials: most trials to propose. earlier: trial id ->
        point and objectives (None: the trial failed)."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        sampler = optuna.samplers.TPESampler(seed=seed + len(earlier), multivariate=True)
        self._study = optuna.create_study(directions=["maximize"] * len(OBJECTIVES), sampler=sampler)
        self._space = {axis: _distribution(values) for axis, values in space.items()}
        self._left = trials
        self._to_config = to_config
        self._known = {trial_id: values for trial_id, (_, values) in earlier.items()}
        self._proposed: dict[str, tuple[optuna.trial.Trial, str]] = {}
        """Key of the proposal -> the proposal, and the id of its trial."""
        for point, values in earlier.values():
            if values is not None:
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
        self._known[trial_id] = objectives(result) if result else None
        self._tell(proposal, self._known[trial_id])

    def _tell(self, proposal: "optuna.trial.Trial", values: Sequence[float] | None) -> None:
        import optuna

        if values is None:
            self._study.tell(proposal, state=optuna.trial.TrialState.FAIL)
        else:
            self._study.tell(proposal, list(values))


def objectives(result: TrialResult) -> tuple[float, ...] | None:
    """The values that a search maximises; None for a failed trial. Without a capability suite, capability counts as 0."""
    if result.status == "failed":
        return None
    return tuple(result.metrics.get(name, 0.0) for name in OBJECTIVES)


def _distribution(values: Any) -> "optuna.distributions.BaseDistribution":
    import optuna

    if isinstance(values, tuple):
        return optuna.distributions.FloatDistribution(values[1], values[2], log=True)
    return optuna.distributions.CategoricalDistribution(list(values))
