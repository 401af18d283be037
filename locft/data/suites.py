"""Capability suites: the built-in probes, and real benchmarks from files or the Hugging Face hub.

Nothing here depends on a model: a suite is text, the same for every model, with a fingerprint.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from locft.cache import digest
from locft.data.capability_item import CapabilityItem, spread
from locft.data.data_sets import is_saved, source_records
from locft.data.record_files import RECORDS, FileRecord, file_records, read_json_records, read_text, shortened
from locft.data.record_layouts import first_that_recognises, told_unread
from locft.data.suite_layouts import LAYOUTS, LIST_KEYS, columns_without_header, glued_items, read_items
from locft.errors import InputError, did_you_mean

DATA_FOLDER = Path(__file__).parent
SUITES = ("probes",)
MAX_PROSE_CHARACTERS = 1_000_000
"""Only this much of a longer text is used; no measurement takes more."""
PREFERRED_SPLITS = ("test", "validation", "train")

_TEXTS = (".txt", ".md")
_TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(?::(?P<config>[\w.+-]*))?(?::(?P<split>[\w.+\[\]%:-]+))?")


@dataclass(frozen=True)
class CapabilityTask:
    """A named list of items whose accuracy is one number."""

    name: str
    items: tuple[CapabilityItem, ...]

    @property
    def chance(self) -> float:
        """Accuracy of guessing: mean over items of 1 / number of choices, 0 for items without a choice among several."""
        return sum(1 / len(item.choices) for item in self.items if len(item.choices) > 1) / len(self.items)


@dataclass(frozen=True)
class Suite:
    """What capability is measured on."""

    tasks: tuple[CapabilityTask, ...]
    prose: tuple[str, ...]
    """Running text for drift and perplexity."""
    fingerprint: str
    """Hash of all items and the prose, 16 hexadecimal digits; where they were read from does not matter."""
    notices: tuple[str, ...] = ()
    """What the files of the tasks have that is not read, or is probably not meant so, a sentence each."""

    @property
    def fingerprints(self) -> dict[str, str]:
        """The same of the `items` and of the `prose` alone."""
        return {"items": _fingerprint(self.tasks, ""), "prose": _fingerprint((), "".join(self.prose))}


def load_suite(
    suite: str | None = "probes",
    tasks: Mapping[str, str] | None = None,
    limit: int | None = None,
    prose: str | None = None,
    *,
    lm_eval: Sequence[str] = (),
    lm_eval_path: str | None = None,
) -> Suite:
    """The built-in suite, real benchmarks under names of the caller's choice, or both.

    suite: "probes", or None for the named tasks alone.
    tasks: name -> file (.jsonl, .json, .parquet, .csv), folder of such files (one task), or hub data set
        "owner/name[:config[:split]]" (without a split: test, else validation, else train).
    limit: maximum number of items per task, evenly spaced over it (so that a sorted or grouped file is sampled fairly) and
        always the same ones.
    lm_eval: tasks or groups of lm-evaluation-harness, each one task here (`harness_tasks.read_tasks`).
    lm_eval_path: folder with more of its task files.
    prose: plain text file, or records with the field "text" (file or hub data set); None takes the built-in prose.

    Raises InputError with the problems of all tasks and the prose at once.
    """
    problems: list[str] = []

    @contextmanager
    def collecting() -> Iterator[None]:
        try:
            yield
        except InputError as error:
            problems.extend(error.problems)

    named: dict[str, Sequence[CapabilityItem]] = {}
    text, notices = "", list[str]()
    if limit is not None and limit < 1:
        problems.append(f"capability limit: got {limit}, expected 1 or more items per task")
    if suite is not None and suite not in SUITES:
        near = did_you_mean(str(suite), SUITES)
        problems.append(f"capability suite: got {suite!r}, expected one of {', '.join(SUITES)}, or none{near}")
    elif suite is not None:
        named |= _read_probes()
    elif not tasks and not lm_eval:
        problems.append("capability: neither a suite nor tasks are named, so nothing would be measured")
    for name, source in (tasks or {}).items():
        if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
            problems.append(f"capability task name: got {name!r}, expected letters, digits, '_', '-' and '.'")
        elif name in named:
            problems.append(f"capability task {name!r}: suite {suite!r} has a task of this name, choose another")
        else:
            with collecting():
                named[name], told = _read_task(name, source)
                notices += told
    with collecting():
        read = harness_tasks().read_tasks(lm_eval, lm_eval_path, limit) if lm_eval else {}
        named |= {f"{name}-lm-eval" if name in named else name: items for name, items in read.items()}
    with collecting():
        text = _read_prose(str(DATA_FOLDER / "prose.txt") if prose is None else prose)
    if problems:
        raise InputError(problems)
    found = tuple(CapabilityTask(name, spread(items, limit)) for name, items in named.items())
    return Suite(found, (text,), _fingerprint(found, text), tuple(notices))


def harness_tasks() -> ModuleType:
    """`locft.data.harness_tasks`. Raises InputError where lm-evaluation-harness is not installed."""
    try:
        from locft.data import harness_tasks
    except ModuleNotFoundError as error:
        raise InputError(
            f"lm-evaluation-harness is not installed here ({error}); `pip install lm-eval` brings it, as does the extra "
            "`harness` of locft-sweeps"
        ) from None
    return harness_tasks


def _read_probes() -> dict[str, list[CapabilityItem]]:
    """The built-in items by task."""
    path = DATA_FOLDER / "probes.jsonl"
    by_task: dict[str, list[FileRecord]] = {}
    for record in read_json_records(path):
        by_task.setdefault(record.value["task"], []).append(record)
    return {name: read_items(records, name, str(path)).values for name, records in by_task.items()}


def _read_task(task: str, source: str) -> tuple[list[CapabilityItem], list[str]]:
    """Its items, and notices about its files."""
    what = f"capability task {task!r}"
    problems: list[str] = []
    notices: list[str] = []
    items: list[CapabilityItem] = []
    layouts: dict[str, str] = {}
    unread: Counter[str] = Counter()
    for where in _files(what, source):
        try:
            read = read_items(_records(where), task, where)
        except InputError as error:
            problems += error.problems
            continue
        layouts.setdefault(read.layout.name, where)
        items += read.values
        unread.update(read.unread)
        if glued := glued_items(read):
            seam = f"choices follow the context directly, as in {glued[0].context[-12:] + glued[0].choices[0]!r}"
            if len(glued) == len(read.values):
                problems.append(f"{where}: {seam}: begin each with a space")
            else:
                places = f"{len(glued):,} of {len(read.values):,} items, the first being {glued[0].id}"
                notices.append(f"{what}: {seam}, in {places}: begin each with a space, unless it is the end of a word")
    if len(layouts) > 1:
        mixed = ", ".join(f"{where} is {layout}" for layout, where in layouts.items())
        problems.append(f"{what}: one task, but its files have different layouts: {mixed}")
    if problems:
        raise InputError(shortened(problems))
    if unread:
        notices.insert(0, f"{what}: not read: {told_unread(unread, len(items))}")
    return items, notices


def _read_prose(source: str) -> str:
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() in _TEXTS:
        text = read_text(path)
    else:
        records = _records(source)
        needed = 'prose needs a field "text" that holds text; its keys are'
        if problems := [
            record.problem or f"{source}, {record.place}: {needed} {', '.join(record.value)}"
            for record in records if not isinstance(record.value.get("text"), str)
        ]:  # fmt: skip
            raise InputError(shortened(problems))
        text = "\n".join(record.value["text"].rstrip("\n") for record in records)
    if not text.strip():
        raise InputError(f"{source}: no text in it; drift and perplexity need some prose")
    return text[:MAX_PROSE_CHARACTERS]


def _files(what: str, source: str) -> tuple[str, ...]:
    """The sources that a task is read from: the source itself, or the files of the folder that it names."""
    if not isinstance(source, str) or not source.strip():
        raise InputError(f"{what}: got {source!r}, expected a file, a folder or a hub data set")
    path = Path(os.path.expanduser(source))
    if path.suffix.lower() in _TEXTS:
        raise InputError(f"{what}: {source} is plain text, which has no right answers; name it as prose instead")
    if not os.path.isdir(path) or is_saved(path):  # pathlib's fails on overlong names
        return (source,)
    files = tuple(str(file) for file in sorted(path.iterdir()) if file.suffix.lower() in RECORDS)
    if not files:
        raise InputError(f"{what}: folder {source} has no file ending in {', '.join(RECORDS)}")
    return files


def _records(source: str) -> list[FileRecord]:
    """The records of a file or data set. Raises InputError."""

    def is_record(value: Mapping[str, Any]) -> bool:
        return isinstance(value.get("text"), str) or first_that_recognises(value, LAYOUTS) is not None

    def read_file(path: Path) -> list[FileRecord]:
        if path.suffix.lower() not in RECORDS and not path.is_dir():
            raise InputError(f"{path}: got a file ending in {path.suffix!r}, expected one of {', '.join(RECORDS)}")
        return file_records(path, LIST_KEYS, is_record, columns_without_header)

    expected = f"a file ending in {', '.join(RECORDS)}, or a hub data set (owner/name)"
    return source_records(source, read_file, _HUB_ID, expected, PREFERRED_SPLITS)


def _content(item: CapabilityItem) -> dict[str, Any]:
    """What identifies an item: not its id and its task's folder, which say where it is from, nor empty fields that were
    added after the first fingerprints."""
    content = {key: value for key, value in asdict(item).items() if value or key not in ("contexts", "generation")}
    if item.generation:
        generation = asdict(item.generation) | {"folder": None}
        content["generation"] = {key: value for key, value in generation.items() if value or key != "scoring"}
    return content | {"id": None}


def _fingerprint(tasks: Sequence[CapabilityTask], text: str) -> str:
    content = [[_content(item) for item in task.items] for task in tasks], text
    return digest(json.dumps(content, sort_keys=True))
