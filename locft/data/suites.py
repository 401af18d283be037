"""Capability suites: the built-in probes, and real benchmarks from files or the Hugging Face hub.

Nothing here knows a model: a suite is text, the same for every model, with a fingerprint.
"""

import csv
import difflib
import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from locft.data.suite_layouts import CapabilityItem, Layout, detect_layout, read_item
from locft.errors import InputError
from locft.data.record_files import Record, missing_path, read_records, read_text, shortened

DATA_FOLDER = Path(__file__).parent
SUITES = ("probes",)
MAX_PROSE_CHARACTERS = 1_000_000
"""More prose than any measurement takes is not read: of a longer text, this much from its beginning."""

_TABLES = (".jsonl", ".json", ".parquet", ".csv")
_TEXTS = (".txt", ".md")
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.+-]*))?(?::(?P<split>[\w.+\[\]%:-]+))?")


@dataclass(frozen=True)
class Task:
    """A named list of items whose accuracy is one number."""

    name: str
    items: tuple[CapabilityItem, ...]

    @property
    def chance(self) -> float:
        """Accuracy of guessing: mean of 1 / number of choices; an item of the rule exact counts 0."""
        return sum(0.0 if item.rule == "exact" else 1 / len(item.choices) for item in self.items) / len(self.items)


@dataclass(frozen=True)
class Suite:
    """What capability is measured on."""

    tasks: tuple[Task, ...]
    prose: tuple[str, ...]
    """Running text for drift and perplexity."""
    fingerprint: str
    """16 hexadecimal digits over all items and the prose; where they were read from does not matter."""


def load_suite(
    suite: str | None = "probes",
    tasks: Mapping[str, str] | None = None,
    limit: int | None = None,
    prose: str | None = None,
) -> Suite:
    """The built-in suite, real benchmarks under names of one's own, or both.

    suite: "probes", or None for the named tasks alone.
    tasks: name -> file (.jsonl, .json, .parquet, .csv), folder of such files (one task), or hub data set
        "owner/name[:config[:split]]" (without a split: test, else validation, else train).
    limit: at most so many items of each task, evenly spaced over it (a sorted or grouped file is sampled fairly), and
        always the same ones.
    prose: plain text file, or records with the field "text" (file or hub data set); None takes the built-in prose.

    Raises InputError with the problems of all tasks and the prose at once.
    """
    problems: list[str] = []
    named: dict[str, tuple[CapabilityItem, ...]] = {}
    text = ""

    def attempt(read):
        try:
            return read()
        except InputError as error:
            problems.extend(error.problems)

    if limit is not None and limit < 1:
        problems.append(f"capability limit: got {limit}, expected 1 or more items a task")
    if suite is not None and suite not in SUITES:
        near = difflib.get_close_matches(str(suite), SUITES, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        problems.append(f"capability suite: got {suite!r}, expected one of {', '.join(SUITES)}, or none{hint}")
    elif suite is not None:
        named |= attempt(_read_probes) or {}
    elif not tasks:
        problems.append("capability: neither a suite nor tasks are named, nothing would be measured")
    for name, source in (tasks or {}).items():
        if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
            problems.append(f"capability task name: got {name!r}, expected letters, digits, '_', '-' and '.'")
        elif name in named:
            problems.append(f"capability task {name!r}: suite {suite!r} has a task of this name, choose another")
        else:
            named[name] = attempt(lambda: _read_task(name, source)) or ()
    text = attempt(lambda: _read_prose(str(DATA_FOLDER / "prose.txt") if prose is None else prose))
    if problems:
        raise InputError(problems)
    found = tuple(Task(name, _spread(items, limit)) for name, items in named.items())
    return Suite(found, (text,), _fingerprint(found, text))


def _read_probes() -> dict[str, tuple[CapabilityItem, ...]]:
    path = DATA_FOLDER / "probes.jsonl"
    by_task: dict[str, list[Record]] = {}
    for record in read_records(path):
        by_task.setdefault(str(record.value.get("task")), []).append(record)
    where, unit = str(path), "line"
    return {name: _to_items(_layout(where, unit, found), name, where, unit, found) for name, found in by_task.items()}


def _read_task(task: str, source: str) -> tuple[CapabilityItem, ...]:
    problems: list[str] = []
    items: list[CapabilityItem] = []
    layouts: dict[str, str] = {}
    for path in _files(f"capability task {task!r}", source):
        try:
            where, unit, records = _records(path)
            layout = _layout(where, unit, records)
            layouts.setdefault(layout.name, where)
            items += _to_items(layout, task, where, unit, records)
        except InputError as error:
            problems += error.problems
    if len(layouts) > 1:
        mixed = ", ".join(f"{where} is {layout}" for layout, where in layouts.items())
        problems.append(f"capability task {task!r}: one task, but its files have different layouts: {mixed}")
    if problems:
        raise InputError(shortened(problems))
    return tuple(items)


def _layout(where: str, unit: str, records: list[Record]) -> Layout:
    """The layout of a file is that of its first record."""
    return detect_layout(list(records[0].value), f"{where}, {unit} {records[0].line}")


def _to_items(layout: Layout, task: str, where: str, unit: str, records: list[Record]) -> tuple[CapabilityItem, ...]:
    problems: list[str] = []
    items: dict[str, CapabilityItem] = {}
    for record in records:
        place = f"{where}, {unit} {record.line}"
        try:
            item = read_item(layout, record.value, task, f"{Path(where).stem}:{record.line}", place)
        except InputError as error:
            problems += error.problems
            continue
        if item.id in items:
            problems.append(f"{place}: id {item.id!r} is taken by an earlier item of task {task!r}")
        items[item.id] = item
    if problems:
        raise InputError(shortened(problems))
    return tuple(items.values())


def _read_prose(source: str) -> str:
    path = Path(source).expanduser()
    if path.suffix.lower() in _TEXTS:
        text = read_text(path)
    else:
        where, unit, records = _records(source)
        wrong = [record for record in records if not isinstance(record.value.get("text"), str)]
        if wrong:
            keys = ", ".join(map(str, wrong[0].value))
            place = f"{where}, {unit} {wrong[0].line}"
            raise InputError(f"{place}: prose needs the field 'text' with text, its keys are {keys}")
        text = "\n".join(record.value["text"].rstrip("\n") for record in records)
    if not text.strip():
        raise InputError(f"{source}: no text in it; drift and perplexity need some prose")
    return text[:MAX_PROSE_CHARACTERS]


def _files(what: str, source: str) -> tuple[str, ...]:
    """The sources a task is read from: itself, or the files of the folder it names."""
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"{what}: got {source!r}, expected a file, a folder or a hub data set")
    path = Path(source).expanduser()
    if path.suffix.lower() in _TEXTS:
        raise InputError(f"{what}: {source} is plain text, which has no right answers; name it as prose instead")
    if not path.is_dir():
        return (source,)
    files = tuple(str(file) for file in sorted(path.iterdir()) if file.suffix.lower() in _TABLES)
    if not files:
        raise InputError(f"{what}: folder {source} has no file ending in {', '.join(_TABLES)}")
    return files


def _records(source: str) -> tuple[str, str, list[Record]]:
    """(where it came from, what its records are counted in, records), at least one."""
    path = Path(source).expanduser()
    suffix = path.suffix.lower()
    hub = _HUB_ID.fullmatch(source)
    if not path.exists() and hub and suffix not in _TABLES:
        return source, "row", _hub_records(source, hub["name"], hub["config"] or None, hub["split"])
    if not path.exists():
        raise InputError(missing_path(path))
    if path.is_dir():
        raise InputError(f"{path}: is a folder, expected a file")
    if suffix == ".parquet":
        return str(path), "row", _parquet_records(path)
    if suffix == ".csv":
        return str(path), "line", _csv_records(path)
    if suffix not in _TABLES:
        raise InputError(f"{path}: got a file ending in {suffix!r}, expected one of {', '.join(_TABLES)}")
    return str(path), "line", read_records(path)


def _parquet_records(path: Path) -> list[Record]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as parquet: {_first_line(error)}") from None
    if not rows:
        raise InputError(f"{path}: no rows in it")
    return [Record(number, row) for number, row in enumerate(rows, 1)]


def _csv_records(path: Path) -> list[Record]:
    """Rows under a header line. Lists and objects are written as JSON in their cell."""
    reader = csv.reader(io.StringIO(read_text(path), newline=""), strict=True)
    problems: list[str] = []
    records: list[Record] = []
    header: list[str] | None = None
    line = 1
    try:
        for row in reader:
            begun, line = line, reader.line_num + 1
            if not row:
                continue
            if header is None:
                header = row
            elif len(row) != len(header):
                problems.append(f"{path}, line {begun}: {len(row)} cells, but the header has {len(header)}")
            else:
                records.append(Record(begun, {key: _cell(key, text) for key, text in zip(header, row)}))
    except csv.Error as error:
        problems.append(f"{path}, line {reader.line_num}: broken CSV: {error}")
    if not problems and not records:
        problems.append(f"{path}: no rows below the header line")
    if problems:
        raise InputError(shortened(problems))
    return records


def _cell(key: str, text: str):
    if key in ("choices", "endings"):
        try:
            return json.loads(text)
        except (ValueError, RecursionError):
            return text
    return text


def _hub_records(source: str, name: str, config: str | None, split: str | None) -> list[Record]:
    """Rows of a hub data set. Raises InputError with what was tried, what came of it and what to do offline."""
    try:
        import datasets

        loaded = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # every library beneath has its own class for "no such data set" and "no network"
        tried = f"hub data set {name!r} (config {config or 'default'}, split {split or 'not named'})"
        raise InputError(
            f"{source}: no such path here, and not to be had as {tried}: {type(error).__name__}: {_first_line(error)}. "
            f"Without a network: download its files on another machine and name their path ({', '.join(_TABLES)})"
        ) from None
    if split is None:
        splits = [name for name in ("test", "validation", "train") if name in loaded]
        if not splits:
            raise InputError(f"{source}: name a split behind a colon, it has {', '.join(loaded)}")
        loaded = loaded[splits[0]]
    if not len(loaded):
        raise InputError(f"{source}: no rows in it")
    return [Record(number, row) for number, row in enumerate(loaded.to_list(), 1)]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0]


def _spread(items: tuple[CapabilityItem, ...], limit: int | None) -> tuple[CapabilityItem, ...]:
    if limit is None or limit >= len(items):
        return items
    return tuple(items[index * len(items) // limit] for index in range(limit))


def _fingerprint(tasks: tuple[Task, ...], text: str) -> str:
    content = [[asdict(item) | {"id": None} for item in task.items] for task in tasks], text  # ids may name the file
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
