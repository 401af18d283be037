"""Records from parquet and CSV files and from data sets of the Hugging Face hub."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from locft.data.record_files import FileRecord, read_text, shortened
from locft.errors import InputError, one_line


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


def _json(cell: str) -> Any:
    """The cell's value, or its text if that is no JSON: the readers of fields say what was expected."""
    try:
        return json.loads(cell)
    except (ValueError, RecursionError):
        return cell
