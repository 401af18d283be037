"""A policy as the search that Ray Tune drives: a rung's runs side by side, the next rung when all are in."""

from collections.abc import Callable
from typing import Literal

from sweeps.select.policy import Policy, Run, Rung, Score, Scores, SelectionTask
from sweeps.study.trial_types import TrialConfig, TrialResult


class PolicySearch:
    """Runs a policy to its end. What is known already is not run again, so a stopped selection goes on where it was."""

    def __init__(
        self,
        policy: Policy,
        task: SelectionTask,
        to_config: Callable[[Run], TrialConfig],
        to_score: Callable[[Run, TrialResult], Score],
        known: Scores,
        tell: Callable[[Rung, int], None] = lambda rung, open_runs: None,
    ):
        """known: scores of earlier runs. tell: hears of every rung, and how many of its runs are not known yet."""
        self.rungs: list[Rung] = []
        """So far, in order."""
        self.scores: dict[Run, Score] = {}
        """Of the runs that the rungs asked for."""
        self._known = dict(known)
        self._policy = policy(task)
        self._to_config, self._to_score, self._tell = to_config, to_score, tell
        self._queue: list[Run] = []
        self._running: dict[str, Run] = {}
        self._over = False

    def propose(self, key: str) -> TrialConfig | Literal["wait"] | None:
        """See `sweeps.run.dispatch.Search`."""
        while not self._queue:
            if self._running:
                return "wait"
            if self._over or not self._advance():
                return None
        run = self._queue.pop(0)
        self._running[key] = run
        return self._to_config(run)

    def learn(self, key: str, result: TrialResult | None) -> None:
        """See `sweeps.run.dispatch.Search`. A run of which nothing came stays unknown, and the policy goes on without it."""
        run = self._running.pop(key)
        if result is not None:
            self.scores[run] = self._to_score(run, result)

    def _advance(self) -> bool:
        """The next rung into the queue; False when there is none."""
        try:
            rung = self._policy.send(dict(self.scores) if self.rungs else None)
        except StopIteration:
            self._over = True
            return False
        self.rungs.append(rung)
        self.scores |= {run: self._known[run] for run in rung.runs if run in self._known}
        self._queue = [run for run in rung.runs if run not in self.scores]
        self._tell(rung, len(self._queue))
        return True
