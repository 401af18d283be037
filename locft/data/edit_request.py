"""The edit request: one fact to write into a model."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LocalityPrompt:
    """A prompt that the edit must not touch.

    `answer` is the data set's, None if it gives none. Locality asks what the edit changes along it, not whether a model
    gives it.
    """

    prompt: str
    answer: str | None


@dataclass(frozen=True)
class EditRequest:
    """One fact to write into a model. Texts have no whitespace around them; target and answers are one line."""

    id: str
    """The file's own id or case_id, otherwise layout-N for the file's N-th record, counted from 1."""
    subject: str
    prompt: str
    target: str
    ground_truth: str | None
    """The answer before the edit (the first if the file has several), or None."""
    rephrases: tuple[str, ...]
    locality: tuple[LocalityPrompt, ...]
