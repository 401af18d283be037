"""Records from JSON, JSON Lines, parquet and CSV files and from data sets of the Hugging Face hub.

Every problem of a file is told at once. A JSON list and JSON Lines often come under the other one's ending, so the
content decides: a text that begins with "[" is a list of records, anything else is one record a line.
"""

import csv
import io
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from locft.errors import InputError, one_line

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


def csv_records(path: Path, json_columns: Sequence[str]) -> list[FileRecord]:
    """The rows below a CSV file's header line. Cells of the JSON columns hold a list or an object as JSON.

    Raises InputError with every row that has too few or too many cells.
    """
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
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
                header = row
            elif len(row) != len(header):
                problems.append(f"{path}, line {begun}: {len(row)} cells, but the header has {len(header)}")
            else:
                cells = zip(header, row, strict=True)
                value = {key: _json(cell) if key in json_columns else cell for key, cell in cells}
                records.append(FileRecord(len(records) + 1, value, begun))
    except csv.Error as error:
        problems.append(f"{path}, line {reader.line_num}: broken CSV: {error}")
    if not problems and not records:
        problems.append(f"{path}: no rows below the header line")
    if problems:
        raise InputError(shortened(problems))
    return records


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


def _json(cell: str) -> Any:
    """The cell's value, or its text if that is no JSON: the readers of fields say what was expected."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell


def _is_unicode(value: dict[str, Any]) -> bool:
    """False if a string holds half of a surrogate pair: JSON can spell it, but a tokenizer fails on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
