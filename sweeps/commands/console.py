"""Where the `locft` command writes: answers on standard output, notices and errors on standard error, and files."""

import json
import math
import os
import threading
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from locft.errors import InputError
from sweeps.tracking.address import check_writable

SILENCE_SECONDS = 0.7
"""PyTorch and transformers take seconds to load; a command that prints nothing meanwhile looks hung."""
_out = Console()
_err = Console(stderr=True)
_silent: list[threading.Timer] = []
"""Timers that print the loading notice unless another line is printed first."""


def break_silence(after: float = SILENCE_SECONDS) -> None:
    """On a terminal, say that libraries are being loaded, unless something else is printed first."""
    if _err.is_terminal:
        timer = threading.Timer(after, notice, ["loading PyTorch and the other libraries this command needs ..."])
        timer.daemon = True
        _silent.append(timer)
        timer.start()


def _speaks() -> None:
    while _silent:
        _silent.pop().cancel()


def say(*texts: str, style: str = "") -> None:
    """Print texts of an answer, each on lines of its own, unwrapped."""
    for text in texts:
        _speaks()
        _out.print(Text(text, style), soft_wrap=True)


def notice(*texts: str) -> None:
    """Print texts on standard error, each on lines of its own, unwrapped."""
    for text in texts:
        _speaks()
        _err.print(Text(text), soft_wrap=True)


def complain(problems: Sequence[str]) -> None:
    if len(problems) == 1:
        return notice(f"error: {problems[0]}")
    notice("\n  ".join([f"error: {len(problems)} problems", *problems]))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], title: str | None = None) -> None:
    """Print a table of plain text: as wide as the terminal or, in a file or a pipe, as wide as its content."""
    _speaks()
    table = Table(*columns, title=title and Text(title), title_justify="left")
    for row in rows:
        table.add_row(*map(Text, row))
    if _out.is_terminal:
        _out.print(table)
    else:
        Console(width=Console(width=10_000).measure(table).maximum).print(table)


def print_json(value: Any) -> None:
    _speaks()
    print(json.dumps(plain(value), allow_nan=False), flush=True)  # flushed: `locft ui` keeps running after it


def plain(value: Any) -> Any:
    """The value in JSON types: numpy and pandas scalars become numbers; NaN, infinities and NA null; anything else text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if (isinstance(value, float) and not math.isfinite(value)) or repr(value) == "<NA>":
        return None
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def writable(file: Path, *inputs: str | Path | None) -> Path:
    """The path, checked before any work. Creates nothing; raises InputError when no file can be written there, or when it is one
    that the command reads. inputs: what may name such a file; None, and names of anything else, are passed over."""
    if file.is_dir():
        raise InputError(f"cannot write {file}: it is a folder")
    if file.exists() and not os.access(file, os.W_OK):
        raise InputError(f"cannot write {file}: it is read-only")
    for given in inputs:
        read = os.path.expanduser(given or "")
        if file.is_file() and os.path.isfile(read) and file.samefile(read):
            raise InputError(f"cannot write {file}: this is the input file; name another output")
    check_writable(file.absolute().parent, str(file))
    return file


def new_folder(folder: Path, file: str) -> None:
    """Checks, before any work, that the folder is new or empty and that `file` can be written in it. Raises InputError."""
    writable(folder / file)
    if folder.resolve() == Path.cwd():
        raise InputError(
            f"--out {folder}: this is the current folder; name a new one, which is created only when the result is complete"
        )
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"--out {folder}: the folder is not empty; name a new one")


def write(file: Path, text: str) -> None:
    """Write a file that appears whole or not at all. Raises InputError, for example on a full disk."""
    place = file.resolve()  # a link stays a link
    partial = place.with_name(f"{place.name}.partial-{os.getpid()}")
    try:
        if file.exists() and not file.is_file():  # /dev/stdout, a pipe
            file.write_text(text, encoding="utf-8")
            return
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(text, encoding="utf-8")
        partial.replace(place)
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
