"""Errors that are handled: bad input, which the user can correct, and running out of memory."""

from collections.abc import Iterable
from difflib import get_close_matches


class InputError(Exception):
    """Bad input from the user: a file, a setting, a name, an address.

    Carries every problem found, so that a file can be corrected in one go. Each problem says what was given, what was
    expected and where. The command line prints them without a traceback and exits with code 2.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return InputError, (self.problems,)


_NO_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory",
    "cublas_status_alloc_failed",
)  # fmt: skip
"""Phrases of CUDA, of PyTorch's allocators (which differ by system) and of the C library."""


def out_of_memory(error: BaseException) -> bool:
    """True if the exception is an out-of-memory error from PyTorch or Python, on a GPU or a CPU.

    PyTorch's own class is recognised by its name, so that callers need not import PyTorch.
    """
    message = str(error).lower()
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(phrase in message for phrase in _NO_MEMORY)


def one_line(error: BaseException) -> str:
    """The error's message in one line of at most 300 characters (some messages list every supported architecture)."""
    text = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]} …"


def listed(words: Iterable[str], most: int, separator: str = ", ") -> str:
    """The first `most` of the words, and how many more there are."""
    every = list(words)
    more = f" and {len(every) - most:,} more" if len(every) > most else ""
    return separator.join(every[:most]) + more


def did_you_mean(got: str, choices: Iterable[str], least: float = 0.6) -> str:
    """A clause for a message that names the choice most like `got`; empty if none is near. least: likeness, at most 1."""
    near = get_close_matches(got, list(choices), 1, least)
    return f"; did you mean {near[0]}?" if near else ""
