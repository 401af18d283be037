"""One question of a capability task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")

Rule = Literal["sum", "mean", "exact"]


@dataclass(frozen=True)
class CapabilityItem:
    """One question with its possible answers."""

    task: str
    id: str
    """Unique within the task."""
    context: str
    """What precedes every choice; empty if whole sentences are compared."""
    choices: tuple[str, ...]
    """With their leading space."""
    answer: int
    """Index of the right choice."""
    rule: Rule
    """How a choice is scored. sum: log-likelihood of its tokens. mean: that divided by its characters (without the
    leading space), for choices of uneven length. exact: there is one choice, which is right if each of its tokens is
    the most likely one given the true tokens before it."""
    contexts: tuple[str, ...] = ()
    """What precedes each choice, where that differs; `context` is empty then."""

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Context and choice, for every choice."""
        return list(zip(self.contexts or (self.context,) * len(self.choices), self.choices, strict=True))


def spread(items: Sequence[T], limit: int | None) -> tuple[T, ...]:
    """At most `limit` of the items, evenly spaced over them, so that a sorted or grouped list is sampled fairly."""
    if limit is None or limit >= len(items):
        return tuple(items)
    return tuple(items[index * len(items) // limit] for index in range(limit))
