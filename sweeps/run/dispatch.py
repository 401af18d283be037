"""Which trial to start next, while there is room: one that lost its worker, otherwise the search's next proposal.

Ray Tune would restart a lost trial at once, alongside the same neighbours. Here the cause decides: a trial that ran out of
memory waits until fewer run, and one that ran out of memory while running alone is not retried. A trial that keeps losing its
worker for no known cause runs alone on its last attempt, since the kernel silently kills a process that uses too much memory.
"""

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from locft.errors import InputError
from sweeps.study.trial_types import TrialConfig, TrialResult

WORKER_RESTARTS = 2
"""How many times work whose worker process died is retried."""
LOOK_SECONDS = 2.0
"""Seconds between checks of how many trials a cluster can hold."""

Ending = Literal["complete", "same_failure", "interrupted", "out_of_time"]
"""Why no further trials run: none is left, the first ones all failed with the same error, Ctrl-C, or the deadline."""


class Reporter(Protocol):
    """Is notified of what happens to trials; called in the driver, one call at a time (`note` also from another thread)."""

    def note(self, text: str) -> None:
        """Something that a waiting user should know."""

    def started(self, running: int) -> None: ...

    def retried(self, config: TrialConfig, cause: str) -> None: ...

    def finished(self, result: TrialResult, running: int) -> None: ...


class Search(Protocol):
    """Chooses trials while others run. Called in the driver, one call at a time."""

    def propose(self, key: str) -> TrialConfig | Literal["wait"] | None:
        """The next trial; "wait" when the choice depends on running trials; None when there are no more."""

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Take the result of the trial proposed under this key; None if it brought none."""


class ListedTrials:
    """A search that goes through trials known beforehand, in their order."""

    def __init__(self, trials: Iterable[TrialConfig]):
        self._left = deque(trials)

    def propose(self, key: str) -> TrialConfig | None:
        return self._left.popleft() if self._left else None

    def learn(self, key: str, result: TrialResult | None) -> None:
        """Does nothing, since the order does not depend on results."""


class Room:
    """How many trials run at a time: as many as the nodes that are up can hold, fewer once memory has run out."""

    def __init__(self, look: Callable[[], int]):
        """look: returns the number of trials that fit now; raises InputError if none does, which is passed on here."""
        self.empty = False
        """Every node that could run a trial is gone."""
        self._most = math.inf
        self._look = look
        self._fit = look()
        self._looked = time.monotonic()

    def trials(self) -> int:
        """How many trials may run now: at least one, even while a cluster has no node to run it."""
        if time.monotonic() - self._looked > LOOK_SECONDS:
            try:
                self._fit, self.empty = self._look(), False
            except InputError:  # another node may come
                self._fit, self.empty = 1, True
            self._looked = time.monotonic()
        return min(self._fit, self._most)

    def narrow(self, running: int) -> None:
        """Memory ran out while `running` trials ran: from now on at most half that number run."""
        self._most = min(self._most, max(1, running // 2))


@dataclass(frozen=True)
class _Attempt:
    config: TrialConfig
    proposal: str
    """The key under which the search proposed it."""
    alone: bool = False
    """No other trial could run alongside it."""
    solo: bool = False
    """It waits until no other trial runs, and none is started alongside it."""


class Dispatch:
    """Hands out trials under the keys of their workers, and records how each one ended."""

    def __init__(self, search: Search, room: Room):
        self._search, self._room = search, room
        self._running: dict[str, _Attempt] = {}
        self._again: deque[_Attempt] = deque()
        self._deaths: Counter[tuple[str, bool]] = Counter()

    def next(self, key: str) -> TrialConfig | Literal["wait"] | None:
        """The trial to run under this key; "wait" while there may be one later; None when there are no more."""
        room = self._room.trials()
        if len(self._running) >= room or any(attempt.solo for attempt in self._running.values()):
            return "wait"
        if self._again:
            if self._again[0].solo and self._running:
                return "wait"
            attempt = self._again.popleft()
        else:
            config = self._search.propose(key)
            if config is None and self._running:  # a running trial may have to be retried
                return "wait"
            if config is None or config == "wait":
                return config
            attempt = _Attempt(config, key)
        self._running[key] = replace(attempt, alone=attempt.solo or room == 1)
        return attempt.config

    def holds(self, key: str) -> bool:
        """True if a trial runs under this key."""
        return key in self._running

    def finished(self, key: str, result: TrialResult) -> None:
        """A trial has a result, and its place is free."""
        self._search.learn(self._running.pop(key).proposal, result)

    def given_up(self, key: str) -> None:
        """The trial will bring no result, and its place is free."""
        self._search.learn(self._running.pop(key).proposal, None)

    def died(self, key: str, *, began: bool = True, out_of_memory: bool = False, with_its_node: bool = False) -> bool:
        """A trial's worker is gone, and its place is free. True if the trial will be retried; otherwise it is given up.

        began: the worker had begun the trial; the loss of an idle worker is noticed only when it is given one. with_its_node: the
        worker's whole node is gone, so nothing suggests that the trial is at fault.
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
