"""Records from JSON, JSON Lines, parquet and CSV files.

All problems of a file are reported at once. JSON lists and JSON Lines often come with each other's file extension, so
the content decides: a text that begins with "[" is a list of records, anything else is one record after another.
"""

import ast
import codecs
import csv
import io
import itertools
import json
import os
import re
import tokenize
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from locft.errors import InputError, one_line

MAX_PROBLEMS = 20
"""Problems of one file that are reported one by one; a file whose every line is wrong does not need 3000 messages."""

_BLANK = " \t\r\n"

RECORDS = (".jsonl", ".json", ".ndjson", ".csv", ".tsv", ".parquet")
"""Extensions of files of records."""
IsRecord = Callable[[Mapping[str, Any]], bool]
"""Tells whether an object is a record itself, and not a wrapper of records."""

_COMPRESSED = "a compressed file; unpack it"
_PICKLE = "a pickle, which may run code when it is read; save it as JSON Lines or parquet"
_NO_TEXT = {
    b"PAR1": "a parquet file, expected its name to end in .parquet",
    b"ARROW1": "an Arrow file; save it as parquet",
    b"PK\x03\x04": "a spreadsheet or a zip archive; save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "a spreadsheet; save it as CSV",
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd"), _COMPRESSED),
    **dict.fromkeys((b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"), _PICKLE),
    b"SQLite format 3": "a database; save the table as CSV",
    b"%PDF": "a PDF document, expected records",
    b"version https://git-lfs": "a Git LFS pointer; run `git lfs pull` to fetch the file itself",
    **dict.fromkeys((b"<!doctype", b"<!DOCTYPE", b"<html"), "a web page; download the file itself"),
}
"""First bytes of files that do not hold records as text, with what they are and what to do about them."""
_MARKED = {
    codecs.BOM_UTF32_LE: "utf-32", codecs.BOM_UTF32_BE: "utf-32", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16",
}  # fmt: skip
"""Byte order marks of encodings other than UTF-8, as in Excel's Unicode text. UTF-32 first: its mark begins with UTF-16's."""
_CONTAINER = re.compile(r"""\s*(\[\s*)*\{\s*['"]|\s*(\[\s*)+(['"]|array\(|nan\b|[-\d.\s]+\]\s*$)""")
"""How a cell begins that is meant as a list or an object, and not as a text such as "[Question] Who"."""


@dataclass(frozen=True)
class FileRecord:
    """One record of a file or table."""

    number: int
    """Counted from 1."""
    value: dict[str, Any]
    line: int | None = None
    """Line of the file, counted from 1; None for formats that do not say."""
    beside: tuple[str, ...] = ()
    """Keys of the file alongside the list of records."""
    key: str | None = None
    """Key of the record, in a file that is one object of records."""
    problem: str = ""
    """Why the record as a whole cannot be read, with its place; `value` is empty then."""

    @property
    def place(self) -> str:
        """Where the record is, for messages, such as "record 17 (line 30)"."""
        return f"record {self.number}" + (f" (line {self.line})" if self.line else "")


@dataclass(frozen=True)
class BrokenCell:
    """A cell of a table that looks like a list or an object but cannot be parsed. No field takes one, so it is a problem only
    in a column that is read."""

    text: str


def numbered(values: Iterable[Any], beside: tuple[str, ...] = ()) -> list[FileRecord]:
    """These values as the records of a file whose format has no lines."""
    return [FileRecord(number, value, beside=beside) for number, value in enumerate(values, 1)]


def file_records(
    path: Path,
    lists: Collection[str],
    is_record: IsRecord,
    no_header: Callable[[Sequence[str]], Sequence[str] | None] = lambda row: None,
) -> list[FileRecord]:
    """The records of a file: parquet, CSV (.csv, .tsv), else JSON. lists, no_header: see `_csv_records`. Raises InputError for
    a file that cannot be read or has no records."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet_records(path)
    if suffix in (".csv", ".tsv"):
        return _csv_records(path, lists, no_header)
    return read_json_records(path, is_record)


def read_json_records(path: Path, is_record: IsRecord = lambda value: False) -> list[FileRecord]:
    """The records of a JSON list or JSON Lines file; blank lines and a byte order mark are skipped. A file that is one object
    is unwrapped: its records are its only list of objects, or the objects under its keys.

    A broken line (with line and column) and a record that is not an object or not valid Unicode is a record with a problem.
    Raises InputError if the file is not text, is a broken list, has no records, or leaves open which of its lists they are.
    """
    text = read_text(path)
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip(_BLANK).startswith("["):
            raise InputError(_broken(path, error)) from None
        whole = None
    if isinstance(whole, list):
        found = numbered(whole)
    elif isinstance(whole, dict):
        found = _in_object(path, text, whole, is_record)
    else:
        found = _lines(path, text)
    if not found:
        raise InputError(f"{path}: no records in it, expected a JSON list of objects, or one object per line")
    return [_checked(path, record) for record in found]


def _checked(path: Path, record: FileRecord) -> FileRecord:
    """The record, with its problem if it is not an object or not valid Unicode."""
    if not isinstance(record.value, dict):
        problem = f"expected a JSON object, got {describe(record.value)}"
    elif not _is_unicode(record.value):
        problem = "lone surrogate in a string (\\ud800 to \\udfff)"
    else:
        return record
    return replace(record, value={}, problem=f"{path}, {record.place}: {problem}")


def _lines(path: Path, text: str) -> list[FileRecord]:
    """The records of a text with one JSON value per line, or over several lines each, as jq prints them."""
    found: list[FileRecord] = []
    # Split at "\n" alone: str.splitlines also splits at characters that JSON strings may hold (U+2028).
    filled = [(line, content) for line, content in enumerate(text.split("\n"), 1) if content.strip(_BLANK)]
    for number, (line, content) in enumerate(filled, 1):
        try:
            found.append(FileRecord(number, json.loads(content), line))
        except (ValueError, RecursionError) as error:
            found.append(FileRecord(number, {}, line, problem=_broken(path, error, line)))
    problems = [record.problem for record in found if record.problem]
    if problems and (stream := _one_after_another(text)):
        return stream
    if len(problems) == len(filled) > 1:
        kinds = "a JSON list of objects, one object per line, or a table whose name ends in .csv, .tsv or .parquet"
        raise InputError(f"{problems[0]}, and likewise on all {len(filled):,} lines; expected {kinds}")
    return found


def _one_after_another(text: str) -> list[FileRecord]:
    """The JSON values of a text that holds nothing else; none if it does."""
    decoder, blank, found, end, line = json.JSONDecoder(), re.compile(f"[{_BLANK}]*"), list[FileRecord](), 0, 1
    with suppress(ValueError, RecursionError):
        while (begin := blank.match(text, end).end()) < len(text):  # type: ignore[union-attr]  # it matches ""
            line += text.count("\n", end, begin)
            value, end = decoder.raw_decode(text, begin)
            found.append(FileRecord(len(found) + 1, value, line))
            line += text.count("\n", begin, end)
        return found
    return []


def _in_object(path: Path, text: str, whole: dict[str, Any], is_record: IsRecord) -> list[FileRecord]:
    """The records of a file that is one object: the rows of a table, what it wraps, or the object itself."""
    is_json = path.suffix.lower() == ".json"
    if is_json and (rows := _rows(whole, is_record)):
        return numbered(rows)
    # The only line of JSON Lines is a record, unless it holds a list of them.
    if not is_record(whole) and (is_json or _lists(whole) or "\n" in text.strip(_BLANK)):
        return _unwrapped(path, whole, is_record)
    return [FileRecord(1, whole, line=1 + text[: text.index("{")].count("\n"))]


def _lists(whole: Mapping[str, Any]) -> list[str]:
    """Keys under which there is a list of objects."""
    return [
        key for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]  # fmt: skip


def _unwrapped(path: Path, whole: dict[str, Any], is_record: IsRecord) -> list[FileRecord]:
    """The records in one object. Raises InputError if there are none, or more than one list of them."""
    lists_of_objects = _lists(whole)
    known = [key for key in lists_of_objects if is_record(whole[key][0])]
    keys = known if len(known) == 1 else lists_of_objects
    if len(keys) > 1:
        lists = ", ".join(f"{key} ({len(whole[key])})" for key in keys)
        raise InputError(
            f"{path}: one JSON object with {len(keys)} lists of records, {lists}; "
            "save the one you want to a file of its own"
        )
    if keys:
        return numbered(whole[keys[0]], beside=tuple(key for key in whole if key != keys[0]))
    inner = [key for key, value in whole.items() if isinstance(value, dict) and not is_record(value) and _lists(value)]
    if len(inner) == 1 and any(is_record(whole[inner[0]][key][0]) for key in _lists(whole[inner[0]])):
        return _unwrapped(path, whole[inner[0]], is_record)
    if len(whole) > 1 and all(isinstance(value, dict) for value in whole.values()):
        return [FileRecord(number, value, key=key) for number, (key, value) in enumerate(whole.items(), 1)]
    if len(whole) == 1 and isinstance(inside := next(iter(whole.values())), dict):
        return _unwrapped(path, inside, is_record)
    shown = ", ".join(list(whole)[:8]) or "none"
    raise InputError(f"{path}: one JSON object (keys: {shown}), expected a list of records, or one record per line")


def _rows(whole: Mapping[str, Any], is_record: IsRecord) -> list[dict[str, Any]]:
    """The records of a table whose columns are lists, or objects as pandas writes them by default; [] if it is not one."""
    columns = list(whole.values())
    places: Collection[Any] = ()
    if len(columns) > 1 and all(isinstance(column, list) and len(column) == len(columns[0]) for column in columns):
        places = range(len(columns[0]))
    elif len(columns) > 1 and all(isinstance(one, dict) and one.keys() == columns[0].keys() for one in columns):
        places = columns[0]
    rows = [{name: column[place] for name, column in whole.items()} for place in places]
    return rows if rows and is_record(rows[0]) else []


def _parquet_records(path: Path) -> list[FileRecord]:
    """The rows of a parquet file. Raises InputError if it cannot be read or has none."""
    import pyarrow  # here, because few files need it
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as parquet: {one_line(error)}") from None
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return numbered(rows)


def _csv_records(
    path: Path, lists: Collection[str], no_header: Callable[[Sequence[str]], Sequence[str] | None]
) -> list[FileRecord]:
    """The rows of a CSV file, whose first line names the columns. Cells are separated by commas, semicolons, tabs or vertical bars.

    lists: columns (or patterns of them, "para_question*") whose cells may hold a list or an object, as JSON or as Python
        writes it; all other cells are texts. One that cannot be parsed, such as an array that pandas wrote, is a `BrokenCell`.
    no_header: given the first row, returns the names of the columns if that row is itself a record, else None.

    Raises InputError with every row that has too few or too many cells.
    """
    text = read_text(path)
    delimiter = max(",;\t|", key=lambda char: _regular(text, char))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    rows: list[tuple[int, list[str]]] = []  # each with the line on which it begins
    broken: list[str] = []
    line = 1
    try:
        for row in reader:
            rows += [(line, row)] if row else []
            line = reader.line_num + 1
    except csv.Error as error:
        broken = [f"{path}, line {reader.line_num}: broken CSV: {error}"]
    first = [name.strip() for name in rows[0][1]] if rows else []
    header = (no_header(first) if first else None) or first
    if twice := [name for name, count in Counter(header).items() if name and count > 1]:
        raise InputError(f"{path}, line {rows[0][0]}: the header names {', '.join(twice)} more than once")
    rows[:1] = [] if header is first else [(rows[0][0], first)]
    problems = [
        f"{path}, line {line}: {len(row)} cells, but the header has {len(header)}"
        for line, row in rows if len(row) != len(header)
    ] + broken  # fmt: skip
    if problems or not rows:
        raise InputError(shortened(problems or [f"{path}: no rows below the header line"]))
    parsed = {name for name in header if name in lists or any(fnmatchcase(name, one) for one in lists)}
    return [
        FileRecord(
            number,
            {key: _parsed(cell) if key in parsed else cell for key, cell in zip(header, row, strict=True) if key},
            line,
        )
        for number, (line, row) in enumerate(rows, 1)
    ]


def _regular(text: str, delimiter: str) -> tuple[bool, int]:
    """How well a delimiter fits: whether the first rows all have equally many cells, two or more, and how many the first has."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        counts = [len(row) for row in itertools.islice(reader, 20) if row]
    except csv.Error:
        return False, 0
    return len(set(counts)) == 1 and counts[0] > 1, counts[0] if counts else 0


def read_text(path: Path) -> str:
    """A file's text without its byte order mark, decoded as UTF-8 unless the mark says otherwise.

    Raises InputError if the path does not exist (with the nearest name that does), is a folder, or holds bytes that are
    not text (with line and offset).
    """
    if os.path.isdir(path):  # pathlib's fails on overlong names
        raise InputError(f"{path}: is a folder, expected a file{_one_inside(path)}")
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(missing_path(path)) from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    if kind := next((kind for magic, kind in _NO_TEXT.items() if raw.startswith(magic)), None):
        raise InputError(f"{path}: got {kind}")
    encoding = next((name for mark, name in _MARKED.items() if raw.startswith(mark)), "utf-8-sig")
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        got = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        wanted = encoding.removesuffix("-sig").upper()
        raise InputError(f"{path}, line {line}: not {wanted}: {got}; save it as UTF-8") from None
    if "\0" in text[:1000]:
        raise InputError(
            f"{path}: not text: it contains zero bytes (a binary file, or UTF-16 without a byte order mark); "
            "save it as UTF-8"
        )
    return text


def missing_path(path: Path) -> str:
    """The message that a path does not exist, with the nearest name that does."""
    missing, folder = path, path.parent
    while not os.path.isdir(folder) and folder != missing:
        missing, folder = folder, folder.parent
    problem = f"{path}: no such file" + (f", its folder {missing} does not exist" if missing != path else "")
    names: list[str] = []
    with suppress(OSError):
        names = sorted(entry.name for entry in folder.iterdir())
    if near := get_close_matches(missing.name, names, 1):
        return f"{problem}; did you mean {folder / near[0]}?"
    return problem if missing != path else f"{problem}; nothing in {folder.resolve()} has a similar name"


def _one_inside(folder: Path) -> str:
    """Names a file of records in a folder, as in a clone of a data set's repository; empty if there is none."""
    with suppress(OSError):
        inside = sorted(
            file for file in folder.rglob("*") if file.suffix.lower() in RECORDS and ".git" not in file.parts
        )
        return f", such as {inside[0]}" if inside else ""
    return ""


def describe(value: Any) -> str:
    """A JSON value in an error message: its kind, and the value itself, shortened."""
    kinds = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", int: "a number", float: "a number"}
    if isinstance(value, BrokenCell):
        hint = "pandas writes arrays without commas: save the table as JSON Lines or parquet"
        return f"a list or an object that cannot be parsed ({hint}), {describe(value.text)}"
    if value is None:
        return "null"
    if isinstance(value, str) and not value.strip():
        return "only whitespace" if value else "an empty text"
    shown = json.dumps(value, ensure_ascii=False, default=str)
    if not shown.isprintable():  # half a surrogate pair, direction marks
        shown = json.dumps(value, default=str)
    return f"{kinds.get(type(value), type(value).__name__)} {shown if len(shown) <= 60 else shown[:57] + '...'}"


def shortened(problems: Sequence[str]) -> tuple[str, ...]:
    """The first problems, and the number of the others."""
    if len(problems) <= MAX_PROBLEMS:
        return tuple(problems)
    return (*problems[:MAX_PROBLEMS], f"... and {len(problems) - MAX_PROBLEMS} more problems")


def _broken(path: Path, error: Exception, line: int | None = None) -> str:
    """The message for a text that json cannot read; `line` if the text is that line of the file."""
    if isinstance(error, json.JSONDecodeError):
        return f"{path}, line {line or error.lineno}, column {error.colno}: broken JSON: {error.msg}"
    place = f"{path}, line {line}" if line else str(path)
    return f"{place}: unreadable JSON: {error}"  # nested too deeply, or a number with thousands of digits


def _parsed(cell: str) -> Any:
    """The list or object in a cell, a `BrokenCell` if it only looks like one, otherwise its text."""
    for parse in (json.loads, _python_value) if cell.lstrip()[:1] in ("[", "{") else ():
        try:
            return parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
            continue
    return BrokenCell(cell) if _CONTAINER.match(cell) else cell


def _python_value(cell: str) -> Any:
    """The value of a Python literal. Raises ValueError for texts without a comma between them, as in arrays that pandas wrote:
    Python would join them into one."""
    value = ast.literal_eval(cell)
    tokens = tokenize.generate_tokens(io.StringIO(cell.strip()).readline)
    kinds = [token.type for token in tokens if token.type != tokenize.NL]
    if (tokenize.STRING, tokenize.STRING) in itertools.pairwise(kinds):
        raise ValueError("texts without a comma between them")
    return value


def _is_unicode(value: dict[str, Any]) -> bool:
    """False if a string holds half of a surrogate pair: JSON can spell it, but a tokenizer fails on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
