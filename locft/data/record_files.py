"""Records from JSON, JSON Lines, parquet and CSV files and from data sets of the Hugging Face hub.

Every problem of a file is told at once. A JSON list and JSON Lines often come under the other one's ending, so the
content decides: a text that begins with "[" is a list of records, anything else is one record a line.
"""

import ast
import csv
import io
import itertools
import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from locft.errors import InputError, one_line

MAX_PROBLEMS = 20
"""Problems of one file that are told one by one; a file whose every line is wrong needs no 3000 messages."""

_BLANK = " \t\r\n"
_NO_TEXT = {
    b"PAR1": "a parquet file, expected its name to end in .parquet",
    b"PK\x03\x04": "a spreadsheet or a zip archive; save it as CSV, or unpack it",
    b"\xd0\xcf\x11\xe0": "a spreadsheet; save it as CSV",
    b"\x1f\x8b": "a compressed file; unpack it",
    b"BZh": "a compressed file; unpack it",
}
"""How files begin that are no text, and what to do about them."""


@dataclass(frozen=True)
class FileRecord:
    """One record of a file or table."""

    number: int
    """Counted from 1."""
    value: dict[str, Any]
    line: int | None = None
    """Line of the file, counted from 1; None for formats that do not tell it."""
    beside: tuple[str, ...] = ()
    """Keys of the file that stand beside the list of records."""
    key: str | None = None
    """Its own, in a file that is one object of records."""

    @property
    def place(self) -> str:
        """For messages, such as "record 17 (line 30)"."""
        return f"record {self.number}" + (f" (line {self.line})" if self.line else "")


def file_records(
    path: Path,
    *,
    lists: Collection[str] = (),
    is_record: Callable[[Mapping[str, Any]], bool] = lambda value: False,
    no_header: Callable[[Sequence[str]], Sequence[str] | None] = lambda row: None,
) -> tuple[list[FileRecord], list[str]]:
    """(records, problems with single ones) of a file: parquet, CSV (.csv, .tsv), else JSON. The options are those of
    `csv_records` and `read_json_records`. Raises InputError for a file that cannot be read."""
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return parquet_records(path), []
    if suffix in (".csv", ".tsv"):
        return csv_records(path, lists, no_header=no_header), []
    return read_json_records(path, is_record)


def read_json_records(
    path: Path, is_record: Callable[[Mapping[str, Any]], bool] = lambda value: False
) -> tuple[list[FileRecord], list[str]]:
    """(records, problems) of a JSON list or JSON Lines file; blank lines and a byte order mark are skipped.

    A file that is one object is unwrapped: its records are its only list of objects, or the objects under its keys.
    is_record: whether such an object is a record itself.

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
    elif (whole := _one_object(text)) is not None and not is_record(whole) and _is_wrapper(path, text, whole):
        try:
            found = _unwrapped(path, whole, is_record)
        except InputError as error:
            problems += error.problems
    elif whole is not None:
        line = 1 + text[: len(text) - len(text.lstrip())].count("\n")
        found = [FileRecord(1, whole, line)]
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


def _is_wrapper(path: Path, text: str, whole: Mapping[str, Any]) -> bool:
    """Whether one object is a file of records instead of the only line of one."""
    return path.suffix.lower() == ".json" or bool(_lists(whole)) or "\n" in text.strip(_BLANK)


def _lists(whole: Mapping[str, Any]) -> list[str]:
    """Keys under which there is a list of objects."""
    return [
        key for key, value in whole.items()
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value)
    ]  # fmt: skip


def _unwrapped(path: Path, whole: dict[str, Any], is_record: Callable[[Mapping[str, Any]], bool]) -> list[FileRecord]:
    """The records in one object. Raises InputError if there are none, or more than one list of them."""
    lists_of_objects = _lists(whole)
    known = [key for key in lists_of_objects if is_record(whole[key][0])]
    keys = known if len(known) == 1 else lists_of_objects
    if len(keys) > 1:
        lists = ", ".join(f"{key} ({len(whole[key])})" for key in keys)
        raise InputError(f"{path}: one JSON object with {len(keys)} lists of records, {lists}; save the one to read")
    if keys:
        beside = tuple(key for key in whole if key != keys[0])
        return [FileRecord(number, value, beside=beside) for number, value in enumerate(whole[keys[0]], 1)]
    if len(whole) > 1 and all(isinstance(value, dict) for value in whole.values()):
        return [FileRecord(number, value, key=key) for number, (key, value) in enumerate(whole.items(), 1)]
    if len(whole) == 1 and isinstance(inside := next(iter(whole.values())), dict):
        return _unwrapped(path, inside, is_record)
    shown = ", ".join(list(whole)[:8])
    raise InputError(f"{path}: one JSON object (keys: {shown}), expected a list of records, or one record a line")


def parquet_records(path: Path) -> list[FileRecord]:
    """The rows of a parquet file. Raises InputError if it cannot be read or has none."""
    import pyarrow  # here, because few files need it
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as parquet: {one_line(error)}") from None
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return [FileRecord(number, row) for number, row in enumerate(rows, 1)]


def csv_records(
    path: Path,
    lists: Collection[str],
    *,
    no_header: Callable[[Sequence[str]], Sequence[str] | None] = lambda row: None,
) -> list[FileRecord]:
    """The rows of a CSV file, whose first line names the columns. Cells are separated by commas, semicolons or tabs.

    lists: columns whose cells may hold a list or an object, as JSON or as Python writes it; all other cells are texts.
    no_header: given the first row, the names of the columns if that is a record itself, else None.

    Raises InputError with every row that has too few or too many cells.
    """
    text = read_text(path)
    delimiter = max(",;\t", key=lambda char: _regular(text, char))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    problems: list[str] = []
    records: list[FileRecord] = []
    header: list[str] = []
    line = 1
    try:
        for row in reader:
            begun, line = line, reader.line_num + 1
            if not row:
                continue
            if not header:
                header = list(no_header(row) or row)
                if twice := [name for name, count in Counter(header).items() if name and count > 1]:
                    raise InputError(f"{path}, line {begun}: the header names {', '.join(twice)} more than once")
                if header == row:
                    continue
            if len(row) != len(header):
                problems.append(f"{path}, line {begun}: {len(row)} cells, but the header has {len(header)}")
            else:
                cells = zip(header, row, strict=True)
                value = {key: _parsed(cell) if key in lists else cell for key, cell in cells if key}
                records.append(FileRecord(len(records) + 1, value, begun))
    except csv.Error as error:
        problems.append(f"{path}, line {reader.line_num}: broken CSV: {error}")
    if not problems and not records:
        problems.append(f"{path}: no rows below the header line")
    if problems:
        raise InputError(shortened(problems))
    return records


def _regular(text: str, delimiter: str) -> tuple[bool, int]:
    """How well a delimiter fits: whether the first rows have equally many cells, more than one, and how many the first has."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
        counts = [len(row) for row in itertools.islice(reader, 20) if row]
    except csv.Error:
        return False, 0
    return len(set(counts)) == 1 and counts[0] > 1, counts[0] if counts else 0


def hub_records(
    source: str, name: str, config: str | None, split: str | None, preferred: Sequence[str] = ()
) -> list[FileRecord]:
    """The rows of the data set `name` on the Hugging Face hub; `source` is what the user wrote.

    Without a split it is the first of the preferred ones that the data set has, or its only one. Raises InputError with
    what was tried and what to do offline.
    """
    try:
        import datasets  # here, because it takes a second and only this needs it

        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the libraries beneath have a class each for "no such data set" and "no network"
        raise InputError(
            f"{source}: no such file here, and the hub gave no data set {name!r} (config {config or 'default'}, split "
            f"{split or 'not named'}): {type(error).__name__}: {one_line(error)}. Without a network, name a local "
            "file with its records, or load it once with a network and set HF_HUB_OFFLINE=1 to use that copy"
        ) from None
    if split is None:
        splits = [name for name in preferred if name in loaded] or (list(loaded) if len(loaded) == 1 else [])
        if not splits:
            choices = ", ".join(f"{name}:{f'{config}:' if config else ''}{split}" for split in loaded)
            raise InputError(f"{source}: name one of its {len(loaded)} splits: {choices}")
        loaded = loaded[splits[0]]
    if not len(loaded):
        raise InputError(f"{source}: no records in it")
    return [FileRecord(number, row) for number, row in enumerate(loaded, 1)]


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
    if kind := next((kind for magic, kind in _NO_TEXT.items() if raw.startswith(magic)), None):
        raise InputError(f"{path}: got {kind}")
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


def _one_object(text: str) -> dict[str, Any] | None:
    """The object that a whole text is."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _parsed(cell: str) -> Any:
    """The list or object in a cell, or its text if there is none: the readers of fields say what was expected."""
    for parse in (json.loads, ast.literal_eval) if cell.lstrip()[:1] in ("[", "{") else ():
        try:
            return parse(cell)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return cell


def _is_unicode(value: dict[str, Any]) -> bool:
    """False if a string holds half of a surrogate pair: JSON can spell it, but a tokenizer fails on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
