"""Edit sets: the edits of a file, a hub data set or the project's own, checked and selected.

A source is read whole and all its problems are reported at once, because a user corrects a file, not a line. Well-formed
edits can still be impossible (two give one prompt different targets) or pointless (the target is already true):
`EditFindings` counts them; none is dropped.
"""

import hashlib
import importlib.resources
import itertools
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from locft.data.answers import normalise_answer
from locft.data.conversations import question_and_answer, turns_of
from locft.data.data_sets import hub_records, is_saved, saved_records
from locft.data.edit_layouts import ID_KEYS, LIST_KEYS, edit_layouts, read_edits, read_marks
from locft.data.edit_request import EditRequest
from locft.data.fictitious import NAME as FICTITIOUS
from locft.data.fictitious import SUBJECTS, fictitious_facts
from locft.data.field_map import FieldMap
from locft.data.record_files import RECORDS, FileRecord, file_records, missing_path
from locft.data.record_layouts import told_unread, top_level
from locft.errors import InputError, listed

BUILT_IN = ("atlas", FICTITIOUS)
"""Names of the edit sets that come with the project. A file of that name is reached as ./atlas."""

SHOWN = 8
"""Maximum number of ids named in a sentence."""
_NOTHING = ("", "false", "none", "null", "nan")
UNMARKED = {"retracted": (*_NOTHING, "no", "n", "f", "0", "0.0"), "superseded_by": _NOTHING}
"""Keys that mark a record of a ledger as an edit that is no longer active, and the values with which they mark nothing. An id
may be "0" or "no", so these say that the edit was superseded."""

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:.+)?")
_TABLES = (".csv", ".tsv", ".parquet")


@dataclass(frozen=True)
class EditFindings:
    """Edits of a set that cannot all hold, that change nothing, or that overlap.

    Two prompts are the same only if their texts are: to a model, a different capital letter makes a different question. So
    `reachable` is a ceiling that no editor can exceed. Two targets are the same if `normalise_answer` makes them equal, because
    that is how an answer is judged.
    """

    duplicates: int
    """Edits that repeat an earlier one: same prompt, same target."""
    contradictions: int
    """Edits whose prompt another edit gives a different target."""
    already_true: int
    """Edits whose target is one of the true answers that the file gives."""
    repeated_subjects: int
    """Edits about a subject that an earlier edit is about (case and spacing ignored)."""
    reachable: float
    """Highest possible reliability, in [0, 1]: of each prompt's targets only the most frequent one can hold."""

    def sentences(self) -> tuple[str, ...]:
        """One sentence per finding; none if there is nothing to say."""
        lines = []
        if self.contradictions:
            percent = f"{100 * self.reachable:.2f}%" if self.reachable < 0.9999 else f"{100 * self.reachable:.5f}%"
            lines.append(
                f"{self.contradictions} edits contradict another edit (same prompt, different target), "
                f"so reliability cannot exceed {percent}."
            )
        if self.duplicates:
            verb = "edit repeats" if self.duplicates == 1 else "edits repeat"
            lines.append(f"{self.duplicates} {verb} an earlier edit (same prompt, same target).")
        if self.already_true:
            verb = "edit is" if self.already_true == 1 else "edits are"
            lines.append(f"{self.already_true} {verb} already true: the target is among the known true answers.")
        if self.repeated_subjects:
            verb = "edit is" if self.repeated_subjects == 1 else "edits are"
            lines.append(f"{self.repeated_subjects} {verb} about the subject of an earlier edit.")
        return tuple(lines)


@dataclass(frozen=True)
class EditSet:
    """The selected edits of a source, in its order."""

    requests: tuple[EditRequest, ...]
    source: str
    layout: str
    fingerprint: str
    """Hash of the content without the ids, 16 hexadecimal digits: the same in any file or layout with the same edits."""
    findings: EditFindings
    """Findings for the selected edits."""
    truths: tuple[tuple[str, ...], ...] = ()
    """All true answers that the source gives, for each edit."""
    unread: Mapping[str, int] = field(default_factory=dict)
    """Paths of keys in the source that no field of an edit is read from, and in how many records they occur; 0 for a
    key alongside the list of records."""
    records: int = 0
    """Number of records in the whole source."""
    retracted: tuple[tuple[str, str], ...] = ()
    """(id, prompt) of the records that the source marks as taken back, "" for one that a record lacks. They are not in
    `requests`."""
    superseded: tuple[tuple[str, str], ...] = ()
    """The same for records whose `superseded_by` names a later edit."""

    def sentences(self) -> tuple[str, ...]:
        """The findings and what was not read, in one sentence each; none if there is nothing to say."""
        gone = {"taken back": self.retracted, "superseded by a later edit": self.superseded}
        marked = {fate: [identity or prompt for identity, prompt in marks] for fate, marks in gone.items()}
        return (
            *self.findings.sentences(),
            *(f"Left out, marked as {fate}: {listed(names, SHOWN)}." for fate, names in marked.items() if names),
            *([f"Not read: {told_unread(self.unread, self.records)}."] if self.unread else ()),
        )

    def contradictions(self) -> dict[str, tuple[str, ...]]:
        """Prompts that get more than one target, with their targets."""
        targets: dict[str, dict[str, str]] = {}
        for request in self.requests:
            targets.setdefault(request.prompt, {}).setdefault(normalise_answer(request.target), request.target)
        return {prompt: tuple(found.values()) for prompt, found in targets.items() if len(found) > 1}

    def of(self, requests: Sequence[EditRequest]) -> "EditSet":
        """The set with these edits in place of its own."""
        made = EditSet.made(requests, self.source)
        return replace(self, requests=made.requests, fingerprint=made.fingerprint, findings=made.findings)

    def sample(self, count: int, seed: int) -> "EditSet":
        """A random sample of `count` of these edits, the same on every machine, in their original order."""
        return self._at(drawn_places(len(self.requests), count, seed))

    def first(self, count: int) -> "EditSet":
        """The first `count` of these edits; 0 takes all."""
        return self._at(range(count or len(self.requests)))

    def shuffled(self, seed: int) -> "EditSet":
        """These edits in a random order, the same on every machine."""
        return self._at(random.Random(seed).sample(range(len(self.requests)), len(self.requests)))

    def _at(self, places: Sequence[int]) -> "EditSet":
        if list(places) == list(range(len(self.requests))):
            return self
        requests = tuple(self.requests[index] for index in places)
        truths = tuple(self.truths[index] for index in places) if self.truths else ((),) * len(places)
        findings = _findings(requests, truths)
        return replace(self, requests=requests, fingerprint=_fingerprint(requests), findings=findings, truths=truths)

    @classmethod
    def made(cls, requests: Sequence[EditRequest], source: str) -> "EditSet":
        """A set of edits that are already read or made. source: where they are from."""
        truths = ((),) * len(requests)
        findings = _findings(requests, truths)
        return cls(tuple(requests), source, "own", _fingerprint(requests), findings, truths, records=len(requests))


def load_edits(
    source: str,
    *,
    limit: int | None = None,
    sample_seed: int | None = None,
    fields: FieldMap | None = None,
    only_marked: bool = False,
) -> EditSet:
    """Read and check a whole source, then select.

    `source` is a built-in name ("atlas", or "fictitious": the first `limit` facts that are made with the seed
    `sample_seed`, 0 by default; `locft.data.fictitious`), a file (JSON, JSON Lines, CSV or parquet), or a hub id ("owner/name" or
    "owner/name:split"). `fields` says under which keys its records have what no layout finds (`locft.data.field_map`).
    `limit` None takes all edits, as does a limit above their number; otherwise it takes the first ones, or with
    `sample_seed` a random sample, the same on every machine and in the order of the file. Records that are marked as
    `retracted`, or `superseded_by` another, as in a ledger, are not taken as edits. only_marked: accept a source that holds
    nothing but these.

    Raises `InputError` with every problem of the source (at most 20 are spelled out).
    """
    source = os.fspath(source)
    _check_selection(limit, sample_seed)
    if source == FICTITIOUS:
        return _fictitious(limit, sample_seed or 0, fields)
    records, problems = _records(source, fields)
    if not {"prompt", "target"} & (fields or {}).keys():
        read = [question_and_answer(record, source) for record in records]
        records = [one for one in read if isinstance(one, FileRecord)]
        problems = [*problems, *(one for one in read if isinstance(one, str))]
    active, *gone = _by_fate(records)
    if records and not active and not problems:
        if not only_marked:
            raise InputError(
                f"{source}: every record is marked as taken back or superseded; expected at least one active edit"
            )
        whole = EditSet.made((), source)
    else:
        whole = edit_set(active, source, problems, fields)
    retracted, superseded = (read_marks(group, fields) for group in gone)
    whole = replace(whole, records=len(records), retracted=retracted, superseded=superseded)
    count = len(whole.requests) if limit is None else min(limit, len(whole.requests))
    if sample_seed is not None and count < len(whole.requests):
        return whole.sample(count, sample_seed)
    return whole.first(count)


def edit_set(
    records: Sequence[FileRecord], source: str, problems: Sequence[str] = (), fields: FieldMap | None = None
) -> EditSet:
    """All edits of these records. problems: those found earlier. Raises InputError with every problem."""
    read, edits, truths = read_edits(records, source, problems, fields)
    requests = tuple(_with_ids(edits, read.layout.name))
    unread = dict.fromkeys(records[0].beside, 0) | read.unread if source not in BUILT_IN else {}
    found = _findings(requests, truths)
    return EditSet(
        requests, source, read.layout.name, _fingerprint(requests), found, tuple(truths), unread, len(records)
    )


def _by_fate(records: Sequence[FileRecord]) -> tuple[list[FileRecord], list[FileRecord], list[FileRecord]]:
    """Records by how a ledger marks them: active (with empty marks removed), taken back, superseded."""
    active: list[FileRecord] = []
    retracted: list[FileRecord] = []
    superseded: list[FileRecord] = []
    for record in records:
        by = {name for name in UNMARKED if is_marked(name, record.value.get(name))}
        if not by and UNMARKED.keys() & record.value.keys():
            record = replace(record, value={key: value for key, value in record.value.items() if key not in UNMARKED})
        (retracted if "retracted" in by else superseded if by else active).append(record)
    return active, retracted, superseded


def is_marked(name: str, value: Any) -> bool:
    """Whether this value of a key of `UNMARKED` marks an edit as no longer active."""
    return value is not None and str(value).strip().casefold() not in UNMARKED[name]


def _fictitious(count: int | None, seed: int, fields: FieldMap | None) -> EditSet:
    problems = [f"{FICTITIOUS}: these edits are generated, not read, so there is nothing to map"] if fields else []
    if count is None or count > SUBJECTS:
        got = "no limit" if count is None else f"{count:,}"
        problems.append(
            f"{FICTITIOUS}: these edits are generated, so a limit is required: got {got}, expected edits.limit "
            f"(or --limit) from 1 to {SUBJECTS:,}"
        )
    if problems:
        raise InputError(problems)
    return EditSet.made([fact.request for fact in itertools.islice(fictitious_facts(seed), count)], FICTITIOUS)


def own_record(request: EditRequest, truths: Sequence[str] = ()) -> dict[str, Any]:
    """The request as a record of the project's own layout, without empty fields."""
    known = list(truths) or request.ground_truth
    record = {
        "id": request.id,
        "subject": request.subject,
        "prompt": request.prompt,
        "target": request.target,
        "ground_truth": known[0] if isinstance(known, list) and len(known) == 1 else known,
        "rephrases": list(request.rephrases),
        "locality": [
            {"prompt": one.prompt} | ({"answer": one.answer} if one.answer else {}) for one in request.locality
        ],
        "portability": [
            {"prompt": one.prompt, "answer": one.answers[0] if len(one.answers) == 1 else list(one.answers)}
            for one in request.portability
        ],
    }
    return {key: value for key, value in record.items() if value}


def drawn_places(total: int, count: int, seed: int = 0) -> list[int]:
    """A random sample of 0 to total - 1, the same on every machine, ascending."""
    return sorted(random.Random(seed).sample(range(total), count))


def _check_selection(limit: int | None, sample_seed: int | None) -> None:
    problems = []
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        problems.append(f"limit: expected a whole number of at least 1, or none for all edits, got {limit!r}")
    if sample_seed is not None and (not isinstance(sample_seed, int) or isinstance(sample_seed, bool)):
        problems.append(f"sample_seed: expected a whole number, or none for the first edits, got {sample_seed!r}")
    if problems:
        raise InputError(problems)


def _findings(requests: Sequence[EditRequest], truths: Sequence[tuple[str, ...]]) -> EditFindings:
    targets_of: dict[str, Counter[str]] = {}
    for request in requests:
        targets_of.setdefault(request.prompt, Counter())[normalise_answer(request.target)] += 1
    groups = targets_of.values()
    subjects = [" ".join(request.subject.casefold().split()) for request in requests if request.subject]
    return EditFindings(
        duplicates=sum(group.total() - len(group) for group in groups),
        contradictions=sum(group.total() for group in groups if len(group) > 1),
        already_true=sum(
            normalise_answer(request.target) in map(normalise_answer, known)
            for request, known in zip(requests, truths, strict=True)
        ),
        repeated_subjects=len(subjects) - len(set(subjects)),
        reachable=sum(max(group.values()) for group in groups) / max(1, len(requests)),
    )


def _fingerprint(requests: Sequence[EditRequest]) -> str:
    """Portability is included only where there is some, so that fingerprints older than portability stay the same."""
    content = [
        (r.subject, r.prompt, r.target, r.ground_truth, r.rephrases, [(p.prompt, p.answer) for p in r.locality])
        + (([(p.prompt, p.answers) for p in r.portability],) if r.portability else ())
        for r in requests
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


def free_id(wanted: str, taken: Callable[[str], bool]) -> str:
    """An id that is not taken: the wanted one, or the first of wanted#2, wanted#3, ... that is free."""
    identity, copy = wanted, 1
    while taken(identity):
        copy += 1
        identity = f"{wanted}#{copy}"
    return identity


def _with_ids(edits: Sequence[EditRequest], layout: str) -> list[EditRequest]:
    """Each edit with an id, the file's own if it has one; if a file repeats an id, the later ones get "#2", "#3"."""
    given = {edit.id for edit in edits}
    used: set[str] = set()
    named = []
    for number, edit in enumerate(edits, start=1):

        def taken(identity: str, own: str = edit.id) -> bool:
            return identity in used or (identity in given and identity != own)

        identity = free_id(edit.id or f"{layout}-{number}", taken)
        used.add(identity)
        named.append(replace(edit, id=identity))
    return named


def _records(source: str, fields: FieldMap | None) -> tuple[list[FileRecord], list[str]]:
    """(records, problems with individual ones) of a whole source."""
    if source in BUILT_IN:
        with importlib.resources.as_file(importlib.resources.files("locft.data") / f"{source}.jsonl") as path:
            return _file_records(path, fields)
    path = Path(os.path.expanduser(source))
    if is_saved(path):
        return saved_records(path), []
    if os.path.exists(path):
        return _file_records(path, fields)
    if "://" in source:
        raise InputError(
            f"{source}: URLs are not supported; download the file and give its path, "
            "or name a hub data set as owner/name"
        )
    if _HUB_ID.fullmatch(source) and not source.lower().endswith(RECORDS):
        name, _, split = source.partition(":")
        return hub_records(source, name, None, split or None), []
    try:
        problem = missing_path(path)
    except OSError as error:  # a name too long for a file system
        problem = f"{source[:100]}: no such file: {error.strerror}"
    if "did you mean" not in problem:
        kinds = "a .json, .jsonl, .csv or .parquet file, a hub data set (owner/name)"
        problem += f"; expected {kinds}, or {' or '.join(BUILT_IN)}"
    raise InputError(problem)


def _file_records(path: Path, fields: FieldMap | None) -> tuple[list[FileRecord], list[str]]:
    """(records, problems with individual ones) of a file. An empty cell of a table is an absent field."""
    layouts = edit_layouts(fields)
    mapped = (
        key for name, keys in (fields or {}).items() for key in keys
        if name not in ("prompt", "target") or "." in key
    )  # fmt: skip
    lists = LIST_KEYS.union(top_level(mapped))
    texts = {name for layout in layouts for name in (layout.prompt, layout.target)}

    def is_record(value: Mapping[str, Any]) -> bool:
        """True also of an incomplete edit, whose list of questions must not be taken for the records."""
        known = any(layout.recognises(value) for layout in layouts) or turns_of(value) is not None
        return known or any(isinstance(value.get(name), str) for name in texts)

    records, problems = file_records(path, lists=lists, is_record=is_record)
    if "id" not in (fields or {}):
        records = [
            record
            if record.key is None or any(name in record.value for name in ID_KEYS)
            else replace(record, value={"id": record.key, **record.value})
            for record in records
        ]
    if path.suffix.lower() in _TABLES:
        records = [
            replace(record, value={key: _cell(cell) for key, cell in record.value.items() if cell not in ("", None)})
            for record in records
        ]
    return records, problems


def _cell(value: Any) -> Any:
    """A cell of a table, a whole number as text, as CSV has it."""
    return str(value) if type(value) is int else value
