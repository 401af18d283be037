"""The edit request: one fact to write into a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalityPrompt:
    """A prompt that the edit must not touch.

    `answer` comes from the data set, None if it gives none. Locality measures what the edit changes along this answer, not
    whether a model gives it.
    """

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class PortabilityPrompt:
    """A question whose answer follows from the edit, such as one about the new capital's country."""

    prompt: str
    answers: tuple[str, ...]
    """Any of them is right; the first is the main one. Never empty."""


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into a model. Texts have no surrounding whitespace; target and answers are single lines."""

    id: str
    """The file's own id or case_id, otherwise layout-N for the file's N-th edit, counted from 1."""
    subject: str
    """"" if the file has none. Guards of the same relation need one; training and measuring do not."""
    prompt: str
    target: str
    ground_truth: str | None
    """The answer before the edit (the first if the file has several), or None."""
    rephrases: tuple[str, ...]
    locality: tuple[LocalityPrompt, ...]
    portability: tuple[PortabilityPrompt, ...] = ()
