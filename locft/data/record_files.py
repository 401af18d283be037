"""Records from JSON and JSON Lines files, with every problem of a file told at once.

Edit files and benchmark files come in both formats, often under the other one's ending, so the content decides: a text
that begins with "[" is a list of records, anything else is one record a line.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from locft.errors import InputError

MAX_PROBLEMS = 20
"""Problems of one file that are told one by one; a file whose every line is wrong needs no 3000 messages."""

_BLANK = " \t\r\n"


@dataclass(frozen=True)
class FileRecord:
    """One record of a file or table."""

    number: int
    """Counted from 1."""
    value: dict[str, Any]
    line: int | None = None
    """Line of the file, counted from 1; None for formats that do not tell it."""

    @property
    def place(self) -> str:
        """For messages, such as "record 17 (line 30)"."""
        return f"record {self.number}" + (f" (line {self.line})" if self.line else "")


def read_json_records(path: Path) -> tuple[list[FileRecord], list[str]]:
    """(records, problems) of a JSON list or JSON Lines file; blank lines and a byte order mark are skipped.

    Problems are broken JSON (line and column), records that are no objects or no Unicode, and a file without records.
    Raises InputError if the file cannot be read as text.
    """
    text = read_text(path)
    found: list[FileRecord] = []
    problems: list[str] = []
    if text.lstrip(_BLANK).startswith("["):
        try:
            found = [FileRecord(number, value) for number, value in enumerate(json.loads(text), 1)]
        except (ValueError, RecursionError) as error:
            problems.append(_broken(path, error))
    elif path.suffix.lower() == ".json" and (keys := _keys_of_one_object(text)) is not None:
        problems.append(f"{path}: one JSON object (keys: {keys}), expected a list of records, or one record a line")
    else:
        # Split at "\n" alone: str.splitlines also splits at characters that JSON strings may hold (U+2028).
        filled = [(line, content) for line, content in enumerate(text.split("\n"), 1) if content.strip(_BLANK)]
        for number, (line, content) in enumerate(filled, 1):
            try:
                found.append(FileRecord(number, json.loads(content), line))
            except (ValueError, RecursionError) as error:
                problems.append(_broken(path, error, line))
    records = []
    for record in found:
        if not isinstance(record.value, dict):
            problems.append(f"{path}, {record.place}: expected a JSON object, got {describe(record.value)}")
        elif not _is_unicode(record.value):
            problems.append(f"{path}, {record.place}: half a surrogate pair in a string (\\ud800 to \\udfff)")
        else:
            records.append(record)
    if not problems and not records:
        problems.append(f"{path}: no records in it, expected a JSON list of objects, or one object a line")
    return records, problems


def read_text(path: Path) -> str:
    """A UTF-8 file's text without the byte order mark.

    Raises InputError if the path does not exist (with the nearest name that does), is a folder, or holds bytes that are
    not UTF-8 (with line and offset).
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file")
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing_path(path)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        hint = "the file begins like UTF-16; " if raw[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        got = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise InputError(f"{path}, line {line}: not UTF-8: {got}; {hint}save it as UTF-8") from None


def missing_path(path: Path) -> str:
    """The problem that a path does not exist, with the nearest name that does."""
    missing, folder = path, path.parent
    while not folder.is_dir() and folder != missing:
        missing, folder = folder, folder.parent
    problem = f"{path}: no such file" + (f", its folder {missing} does not exist" if missing != path else "")
    names: list[str] = []
    with suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir())
    if near := get_close_matches(missing.name, names, 1):
        return f"{problem}; did you mean {folder / near[0]}?"
    return problem if missing != path else f"{problem}; nothing in {folder.resolve()} has a similar name"


def describe(value: Any) -> str:
    """A JSON value in an error message: its kind, and the value itself, shortened."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    if isinstance(value, str) and not value.strip():
        return "only whitespace" if value else "an empty text"
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return f"{kinds.get(type(value), type(value).__name__)} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def shortened(problems: Sequence[str]) -> tuple[str, ...]:
    """The first problems, and the number of the others."""
    if len(problems) <= MAX_PROBLEMS:
        return tuple(problems)
    return (*problems[:MAX_PROBLEMS], f"... and {len(problems) - MAX_PROBLEMS} more problems")


def _broken(path: Path, error: Exception, line: int | None = None) -> str:
    """What json says of a text that it cannot read; `line` if the text is that line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{path}, line {line or error.lineno}, column {error.colno}: broken JSON: {error.msg}"
    place = f"{path}, line {line}" if line else str(path)
    return f"{place}: unreadable JSON: {error}"  # nested without end; a number of thousands of digits


def _keys_of_one_object(text: str) -> str | None:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return ", ".join(list(value)[:8]) if isinstance(value, dict) else None


def _is_unicode(value: dict[str, Any]) -> bool:
    """False if a string holds half of a surrogate pair: JSON can spell it, but a tokenizer fails on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
