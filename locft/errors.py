"""Input the user can correct, and memory that does not suffice: the two causes that are answered, not only told."""

from collections.abc import Iterable


class InputError(Exception):
    """Bad input from the user: a file, a setting, a name, an address.

    Carries every problem found, so that a file is corrected in one go. Each problem says what was got, what was
    expected and where. The command line prints them without a traceback and exits with code 2.
    """

    def __init__(self, problems: str | Iterable[str]):
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        return InputError, (self.problems,)


_NO_MEMORY = (
    "out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory", "cublas_status_alloc_failed",
)  # fmt: skip
"""What CUDA, PyTorch's allocators (each system's has words of its own) and the C library say."""


def out_of_memory(error: BaseException) -> bool:
    """Whether that is what PyTorch or Python say when memory does not suffice, on a GPU or a CPU.

    PyTorch's own class is known by its name: who only asks need not have imported PyTorch.
    """
    said = str(error).lower()
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or any(words in said for words in _NO_MEMORY)
