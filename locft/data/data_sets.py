"""Where records come from: files, data sets on the Hugging Face hub, and those that its library saved to a folder."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from locft.data.record_files import RECORDS, FileRecord, missing_path, numbered
from locft.errors import InputError, one_line

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files that `save_to_disk` writes into the folder of a data set, and into that of one whose splits are subfolders."""


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of the library `datasets` wrote this folder."""
    return any(os.path.isfile(folder / name) for name in (_SAVED, _SAVED_SPLITS))  # pathlib's fails on overlong names


def source_records(
    source: str,
    read_file: Callable[[Path], list[FileRecord]],
    hub_id: re.Pattern[str],
    expected: str,
    preferred: Sequence[str] = (),
) -> list[FileRecord]:
    """The records of a file, of a data set on the hub, or of one that was saved to a folder; at least one.

    hub_id: form of a hub data set, with the groups `name`, `config` and `split`. expected: what a source may be, for messages.
    preferred: where a data set has several splits and none is named, the first of these that it has is read; an only split is
    always read. Raises InputError.
    """
    path = Path(os.path.expanduser(source))
    if is_saved(path):
        return _saved_records(path, preferred)
    if os.path.exists(path):  # pathlib's fails on overlong names
        return read_file(path)
    if "://" in source:
        raise InputError(
            f"{source}: URLs are not supported; download the file and give its path, "
            "or name a hub data set as owner/name"
        )
    if (named := hub_id.fullmatch(source)) and not source.lower().endswith(RECORDS):
        return _hub_records(source, named["name"], named["config"] or None, named["split"], preferred)
    problem = missing_path(path)
    raise InputError(problem if "did you mean" in problem else f"{problem}; expected {expected}")


def _saved_records(folder: Path, preferred: Sequence[str]) -> list[FileRecord]:
    """The rows of a data set that `save_to_disk` wrote to a folder."""
    try:
        import datasets  # here, because it takes a second and few need it

        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the libraries beneath raise many unrelated types for an incomplete folder
        raise InputError(f"{folder}: not readable as a saved data set: {one_line(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = _one_split(str(folder), loaded, preferred, str(folder / "{}"))
    return _rows(str(folder), loaded)


def _hub_records(
    source: str, name: str, config: str | None, split: str | None, preferred: Sequence[str]
) -> list[FileRecord]:
    """The rows of the data set `name` on the hub. Raises InputError, which says what was tried and what to do offline."""
    try:
        import datasets  # here, because it takes a second and only this needs it

        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # the libraries beneath have separate classes for "no such data set" and "no network"
        raise InputError(
            f"{source}: no such file here, and the hub gave no data set {name!r} (config {config or 'default'}, split "
            f"{split or 'not named'}): {type(error).__name__}: {one_line(error)}. Without a network, name a local "
            "file with its records, or load it once with a network and set HF_HUB_OFFLINE=1 to use that copy"
        ) from None
    if split is None:
        loaded = _one_split(source, loaded, preferred, f"{name}:{f'{config}:' if config else ''}{{}}")
    return _rows(source, loaded)


def _one_split(source: str, splits: Mapping[str, Any], preferred: Sequence[str], written: str) -> Any:
    """The first preferred split that exists, or the only one. written: how a user names a split."""
    found = [name for name in preferred if name in splits] or (list(splits) if len(splits) == 1 else [])
    if not found:
        choices = ", ".join(map(written.format, splits))
        raise InputError(f"{source}: name one of its {len(splits)} splits: {choices}")
    return splits[found[0]]


def _rows(source: str, rows: Any) -> list[FileRecord]:
    if not len(rows):
        raise InputError(f"{source}: no records in it")
    return numbered(rows)
