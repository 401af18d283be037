"""One question of a capability task."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

T = TypeVar("T")

Rule = Literal["sum", "mean", "exact", "generated"]


@dataclass(frozen=True)
class Generation:
    """How an answer is generated, where no choices are given, and scored: by a task of lm-evaluation-harness."""

    until: tuple[str, ...]
    """Texts that end an answer, in addition to the end of the turn."""
    tokens: int
    """Length limit of the answer, in tokens."""
    metric: str
    """The metric of the task that scores the answer, from 0 to 1."""
    folder: str | None = None
    """Folder with the task's file, if the task is not one of the harness's own."""
    scoring: str = ""
    """Hash of how the task turns an answer into the metric."""


@dataclass(frozen=True)
class CapabilityItem:
    """One question with its possible answers."""

    task: str
    id: str
    """Unique within the task."""
    context: str
    """What precedes every choice; empty if whole sentences are compared."""
    choices: tuple[str, ...]
    """Each with its leading space."""
    answer: int
    """Index of the right choice."""
    rule: Rule
    """How a choice is scored. sum: log-likelihood of its tokens. mean: the same per character (without the
    leading space), for choices of uneven length. exact: there is one choice, which is right if each of its tokens is
    the most likely one given the true tokens before it. generated: the model answers freely, and the task scores its answer."""
    contexts: tuple[str, ...] = ()
    """What precedes each choice, where that differs; `context` is empty then."""
    generation: Generation | None = None
    """For the rule "generated", whose one choice is the expected answer, as far as the task spells it out."""

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Context and choice, for every choice."""
        return list(zip(self.contexts or (self.context,) * len(self.choices), self.choices, strict=True))


def spread(items: Sequence[T], limit: int | None) -> tuple[T, ...]:
    """At most `limit` of the items, evenly spaced over them, so that a sorted or grouped list is sampled fairly."""
    if limit is None or limit >= len(items):
        return tuple(items)
    return tuple(items[index * len(items) // limit] for index in range(limit))
