"""Which trial is started next: one that lost its worker, else the search's next one, while there is room.

Ray Tune would start a lost trial again at once, beside the same company. Here what killed it decides: what ran out of
memory waits until fewer trials run, and a trial that ran out of memory alone is not tried again. One that keeps losing
its worker without a known cause has its last try alone: the kernel too ends what takes too much memory, and says nothing.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from sweeps.run.cluster import WORKER_RESTARTS, Room
from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.run.search import Search


class Listed:
    """Trials that are known beforehand, in their order."""

    def __init__(self, trials: Iterable[TrialConfig]):
        self._left = deque(trials)

    def propose(self, key: str) -> TrialConfig | None:
        """See `sweeps.run.search.Search`."""
        return self._left.popleft() if self._left else None

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Nothing depends on what came of a trial."""


@dataclass(frozen=True)
class _Attempt:
    config: TrialConfig
    proposal: str
    """The key under which the search proposed it."""
    alone: bool = False
    """Whether no other trial could run beside it."""
    solo: bool = False
    """It waits until no other trial runs, and none is started beside it."""


class Dispatch:
    """Hands out trials under the keys of whoever runs them, and hears what came of each."""

    def __init__(self, search: Search, room: Room):
        self._search, self._room = search, room
        self._running: dict[str, _Attempt] = {}
        self._again: deque[_Attempt] = deque()
        self._deaths: Counter[tuple[str, bool]] = Counter()

    def next(self, key: str) -> TrialConfig | Literal["wait"] | None:
        """The trial to run under this key; "wait" while there may be one later; None when there is no further one."""
        room = self._room.trials()
        if len(self._running) >= room or any(attempt.solo for attempt in self._running.values()):
            return "wait"
        if self._again:
            if self._again[0].solo and self._running:
                return "wait"
            attempt = self._again.popleft()
        else:
            config = self._search.propose(key)
            if config is None and self._running:  # what runs may have to be tried again
                return "wait"
            if config is None or config == "wait":
                return config
            attempt = _Attempt(config, key)
        self._running[key] = replace(attempt, alone=attempt.solo or room == 1)
        return attempt.config

    def holds(self, key: str) -> bool:
        """Whether it runs under this key, as far as was heard here."""
        return key in self._running

    def finished(self, key: str, result: TrialResult) -> None:
        """What came of it. Its place is free."""
        self._search.learn(self._running.pop(key).proposal, result)

    def given_up(self, key: str) -> None:
        """Nothing will come of it. Its place is free."""
        self._search.learn(self._running.pop(key).proposal, None)

    def died(self, key: str, *, began: bool = True, out_of_memory: bool = False, with_its_node: bool = False) -> bool:
        """Its worker is gone, and its place free. Whether it will be tried again; else it is given up.

        began: whether the worker had begun with it; an idle one that is gone is noticed when it is given a trial.
        with_its_node: the worker's whole node is gone, so nothing is known against the trial.
        """
        attempt, beside = self._running[key], len(self._running)
        if out_of_memory and not attempt.alone:
            self._room.narrow(beside)
            again = True
        elif out_of_memory and began:
            again = False
        else:
            self._deaths[attempt.config.id, began] += 1
            left = WORKER_RESTARTS - self._deaths[attempt.config.id, began]
            again = left >= 0
            if left == 0 and began and not with_its_node:
                attempt = replace(attempt, solo=True)
        if not again:
            self.given_up(key)
            return False
        del self._running[key]
        self._again.append(attempt)
        return True
