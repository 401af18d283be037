"""JSON and JSON Lines files to records that know their line, and one error with everything wrong in a file.

Edit files and benchmark files come in both forms, often under the other one's ending, so the content decides: a text
that begins with "[" is a list of records, anything else is one record a line.
"""

import difflib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from locft.errors import InputError

MAX_PROBLEMS = 20
"""Problems of one file that are told one by one; a file whose every line is wrong needs no 3000 messages."""

_DECODER = json.JSONDecoder()
_BLANK = " \t\r\n"


@dataclass(frozen=True)
class Record:
    """One JSON object of a file."""

    line: int
    """Line of the file it begins on, the first is 1."""
    value: dict[str, Any]


def read_records(path: Path) -> list[Record]:
    """The objects of a JSON list or JSON Lines file, in order, at least one. Blank lines and a byte order mark are
    skipped.

    Raises InputError with every problem of the file: missing (with the nearest existing name), a folder, not UTF-8
    (with the byte), broken JSON (line and column), no list of records, a record that is no object, no records at all.
    """
    text = read_text(path)
    begin = len(text) - len(text.lstrip(_BLANK))
    problems: list[str] = []
    if text.startswith("[", begin):
        found = _list_elements(path, text, begin, problems)
    elif _is_one_object(text) and path.suffix.lower() == ".json":
        keys = ", ".join(list(json.loads(text))[:8])
        raise InputError(f"{path}: one JSON object (keys: {keys}), expected a list of records, or one record a line")
    else:
        found = _lines(path, text, problems)
    records = []
    for line, value in found:
        if not isinstance(value, dict):
            problems.append(f"{path}, line {line}: a record must be a JSON object, got {describe(value)}")
        elif not _is_unicode(value):
            problems.append(f"{path}, line {line}: a string holds half a surrogate pair (\\ud800 to \\udfff), not text")
        else:
            records.append(Record(line, value))
    if not problems and not records:
        problems.append(f"{path}: no records in it, expected a JSON list of objects, or one object a line")
    if problems:
        raise InputError(shortened(problems))
    return records


def read_text(path: Path) -> str:
    """A UTF-8 file's text, without the byte order mark. Raises InputError as `read_records` does."""
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
    parent = path.parent
    if not parent.is_dir():
        missing = path
        while not missing.parent.is_dir() and missing.parent != missing:
            missing = missing.parent
        what = f"{path}: no such file, its folder {missing} does not exist"
        near = difflib.get_close_matches(missing.name, _names(missing.parent), 1)
        return f"{what}; did you mean {missing.parent / near[0]}?" if near else what
    near = difflib.get_close_matches(path.name, _names(parent), 1)
    if near:
        return f"{path}: no such file; did you mean {parent / near[0]}?"
    return f"{path}: no such file; nothing in {parent.resolve()} is named like it"


def describe(value: Any) -> str:
    """A JSON value in an error message: its kind, and the value itself, shortened."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if value is None:
        return "null"
    shown = json.dumps(value, ensure_ascii=True, default=str)
    return f"{kinds.get(type(value), type(value).__name__)} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def shortened(problems: Sequence[str]) -> tuple[str, ...]:
    """The first problems, and the number of the others."""
    if len(problems) <= MAX_PROBLEMS:
        return tuple(problems)
    return (*problems[:MAX_PROBLEMS], f"... and {len(problems) - MAX_PROBLEMS} more problems")


def _lines(path: Path, text: str, problems: list[str]) -> Iterator[tuple[int, Any]]:
    # Split at "\n" alone: str.splitlines also splits at characters that JSON strings may hold (U+2028).
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip(_BLANK):
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {number}, column {error.colno}: broken JSON: {error.msg}")
        except (RecursionError, ValueError) as error:  # nested without end; a number of thousands of digits
            problems.append(f"{path}, line {number}: unreadable JSON: {error}")


def _list_elements(path: Path, text: str, begin: int, problems: list[str]) -> Iterator[tuple[int, Any]]:
    """Elements one at a time, because only so does each know its line."""
    line = text.count("\n", 0, begin) + 1
    at = begin

    def advance(to: int) -> None:
        nonlocal line, at
        line, at = line + text.count("\n", at, to), to

    def skip_blanks(position: int) -> int:
        while position < len(text) and text[position] in _BLANK:
            position += 1
        return position

    def broken(expected: str) -> str:
        column = at - text.rfind("\n", 0, at)
        got = repr(text[at]) if at < len(text) else "the end of the file"
        return f"{path}, line {line}, column {column}: broken JSON: expected {expected}, got {got}"

    advance(skip_blanks(begin + 1))
    closed = text.startswith("]", at)
    while not closed:
        try:
            value, end = _DECODER.raw_decode(text, at)
        except json.JSONDecodeError as error:
            problems.append(f"{path}, line {error.lineno}, column {error.colno}: broken JSON: {error.msg}")
            return
        except (RecursionError, ValueError) as error:
            problems.append(f"{path}, line {line}: unreadable JSON: {error}")
            return
        yield line, value
        advance(skip_blanks(end))
        closed = text.startswith("]", at)
        if not closed:
            if not text.startswith(",", at):
                problems.append(broken("',' or ']' after a record"))
                return
            advance(skip_blanks(at + 1))
    advance(skip_blanks(at + 1))
    if at < len(text):
        problems.append(broken("nothing after the list"))


def _is_one_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (RecursionError, ValueError):
        return False


def _is_unicode(value: dict[str, Any]) -> bool:
    # JSON can spell half of a surrogate pair, which is no text and fails later in a tokenizer.
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _names(folder: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in folder.iterdir())
    except OSError:
        return []
