"""The one exception for input the user can correct."""

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
