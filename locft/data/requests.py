"""Edit sets: the edits of a file, a hub data set or the project's own, checked and selected.

A source is read whole and all its problems are reported at once, because a user corrects a file, not a line. Well-formed
edits can still be impossible (two give one prompt different targets) or pointless (the target is already true):
`EditFindings` counts them; none is dropped.
"""

import itertools
import json
import os
import random
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from locft.cache import digest
from locft.data.answers import normalise_answer
from locft.data.conversations import question_and_answer, turns_of
from locft.data.data_sets import source_records
from locft.data.edit_layouts import ID_KEYS, LIST_KEYS, edit_layouts, read_edits, read_marks
from locft.data.edit_request import EditRequest
from locft.data.fictitious import NAME as FICTITIOUS
from locft.data.fictitious import SUBJECTS, fictitious_edits
from locft.data.field_map import FieldMap
from locft.data.record_files import FileRecord, file_records
from locft.data.record_layouts import first_that_recognises, told_unread, top_level
from locft.errors import InputError, listed

BUILT_IN = ("atlas", FICTITIOUS)
"""Names of the edit sets that come with the project. A file of that name is reached as ./atlas."""

SHOWN = 8
"""Maximum number of ids named in a sentence."""
_NOTHING = ("", "false", "none", "null", "nan")
UNMARKED = {"retracted": (*_NOTHING, "no", "n", "f", "0", "0.0"), "superseded_by": _NOTHING}
"""Keys that mark a record of a ledger as an edit that is no longer active, and the values with which they mark nothing. An id
may be "0" or "no", so these say that the edit was superseded."""

_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/[\w.-]+)(?P<config>)(:(?P<split>.+))?")
_SOURCES = f"a .json, .jsonl, .csv or .parquet file, a hub data set (owner/name), or {' or '.join(BUILT_IN)}"


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
        ceiling = f"{self.reachable:.2%}" if self.reachable < 0.9999 else f"{self.reachable:.5%}"
        contradict = f"another edit (same prompt, different target), so reliability cannot exceed {ceiling}"
        said = (
            (self.contradictions, "contradicts", "contradict", contradict),
            (self.duplicates, "repeats", "repeat", "an earlier edit (same prompt, same target)"),
            (self.already_true, "is", "are", "already true: the target is among the known true answers"),
            (self.repeated_subjects, "is", "are", "about the subject of an earlier edit"),
        )
        return tuple(
            f"1 edit {verb} {what}." if count == 1 else f"{count} edits {verbs} {what}."
            for count, verb, verbs, what in said if count
        )  # fmt: skip


@dataclass(frozen=True)
class EditSet:
    """The selected edits of a source, in its order."""

    requests: tuple[EditRequest, ...]
    source: str
    truths: tuple[tuple[str, ...], ...]
    """All true answers that the source gives, for each edit."""
    layout: str = "own"
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

    @classmethod
    def made(cls, requests: Sequence[EditRequest], source: str) -> "EditSet":
        """A set of edits that are already read or made. source: where they are from."""
        return cls(tuple(requests), source, ((),) * len(requests), records=len(requests))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the content without the ids, 16 hexadecimal digits: the same in any file or layout with the same edits."""
        content = [
            (r.subject, r.prompt, r.target, r.ground_truth, r.rephrases, [(p.prompt, p.answer) for p in r.locality])
            # Only where there is some, so that fingerprints older than portability stay the same.
            + (([(p.prompt, p.answers) for p in r.portability],) if r.portability else ())
            for r in self.requests
        ]
        return digest(json.dumps(content, separators=(",", ":")))

    @cached_property
    def findings(self) -> EditFindings:
        counts = [[len(same) for same in targets.values()] for targets in self._targets.values()]
        subjects = [" ".join(request.subject.casefold().split()) for request in self.requests if request.subject]
        return EditFindings(
            duplicates=sum(sum(of_prompt) - len(of_prompt) for of_prompt in counts),
            contradictions=sum(sum(of_prompt) for of_prompt in counts if len(of_prompt) > 1),
            already_true=sum(
                normalise_answer(request.target) in map(normalise_answer, known)
                for request, known in zip(self.requests, self.truths, strict=True)
            ),
            repeated_subjects=len(subjects) - len(set(subjects)),
            reachable=sum(map(max, counts)) / max(1, len(self.requests)),
        )

    @cached_property
    def _targets(self) -> Mapping[str, Mapping[str, list[str]]]:
        """Prompt -> normalised target -> this target as each of the prompt's edits writes it."""
        found: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
        for request in self.requests:
            found[request.prompt][normalise_answer(request.target)].append(request.target)
        return {prompt: dict(targets) for prompt, targets in found.items()}

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
        several = {prompt: targets.values() for prompt, targets in self._targets.items() if len(targets) > 1}
        return {prompt: tuple(same[0] for same in targets) for prompt, targets in several.items()}

    def of(self, requests: Sequence[EditRequest]) -> "EditSet":
        """The set with these edits in place of its own."""
        return replace(self, requests=tuple(requests), truths=((),) * len(requests))

    def first(self, count: int) -> "EditSet":
        """The first `count` of these edits, or all if there are fewer; 0 takes all."""
        return self._at(range(len(self.requests))[: count or None])

    def shuffled(self, seed: int) -> "EditSet":
        """These edits in a random order, the same on every machine."""
        return self._at(random.Random(seed).sample(range(len(self.requests)), len(self.requests)))

    def _at(self, places: Sequence[int]) -> "EditSet":
        requests, truths = tuple(self.requests[at] for at in places), tuple(self.truths[at] for at in places)
        return replace(self, requests=requests, truths=truths)


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
    file = str(Path(__file__).with_name(f"{source}.jsonl")) if source in BUILT_IN else source
    records = source_records(file, lambda path: _file_records(path, fields), _HUB_ID, _SOURCES)
    if not {"prompt", "target"} & (fields or {}).keys():
        records = [question_and_answer(record, source) for record in records]
    by_mark: defaultdict[str, list[FileRecord]] = defaultdict(list)
    for record in records:
        by_mark[next((mark for mark in UNMARKED if is_marked(mark, record.value.get(mark))), "")].append(record)
    active = [replace(one, value={k: v for k, v in one.value.items() if k not in UNMARKED}) for one in by_mark[""]]
    if not active and not only_marked:
        expected = "expected at least one active edit"
        raise InputError(f"{source}: every record is marked as taken back or superseded; {expected}")
    whole = edit_set(active, source, fields) if active else EditSet.made((), source)
    retracted, superseded = (read_marks(by_mark[mark], fields) for mark in UNMARKED)
    whole = replace(whole, records=len(records), retracted=retracted, superseded=superseded)
    total = len(whole.requests)
    count = min(limit or total, total)
    return whole._at(range(count) if sample_seed is None else drawn_places(total, count, sample_seed))


def edit_set(records: Sequence[FileRecord], source: str, fields: FieldMap | None = None) -> EditSet:
    """All edits of these records. Raises InputError with every problem."""
    read = read_edits(records, source, fields)
    edits, truths = zip(*itertools.chain.from_iterable(read.values), strict=True)
    unread = {} if source in BUILT_IN else read.unread
    return EditSet(_with_ids(edits, read.layout.name), source, truths, read.layout.name, unread, len(records))


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
    return EditSet.made(list(itertools.islice(fictitious_edits(seed), count)), FICTITIOUS)


def own_record(request: EditRequest, truths: Sequence[str] = ()) -> dict[str, Any]:
    """The request as a record of the project's own layout, without empty fields."""

    def alone(texts: Sequence[str | None]) -> Any:
        return texts[0] if len(texts) == 1 else list(texts)

    record = {
        "id": request.id,
        "subject": request.subject,
        "prompt": request.prompt,
        "target": request.target,
        "ground_truth": alone(truths or (request.ground_truth,)),
        "rephrases": list(request.rephrases),
        "locality": [
            {"prompt": one.prompt} | ({"answer": one.answer} if one.answer else {}) for one in request.locality
        ],
        "portability": [{"prompt": one.prompt, "answer": alone(one.answers)} for one in request.portability],
    }
    return {key: value for key, value in record.items() if value}


def drawn_places(total: int, count: int, seed: int = 0) -> list[int]:
    """A random sample of 0 to total - 1, the same on every machine, ascending."""
    return sorted(random.Random(seed).sample(range(total), count))


def _check_selection(limit: int | None, sample_seed: int | None) -> None:
    problems = []
    if limit is not None and (type(limit) is not int or limit < 1):
        problems.append(f"limit: expected a whole number of at least 1, or none for all edits, got {limit!r}")
    if sample_seed is not None and type(sample_seed) is not int:
        problems.append(f"sample_seed: expected a whole number, or none for the first edits, got {sample_seed!r}")
    if problems:
        raise InputError(problems)


def free_id(wanted: str, taken: Collection[str]) -> str:
    """An id that is not taken: the wanted one, or the first of wanted#2, wanted#3, ... that is free."""
    copies = (f"{wanted}#{copy}" for copy in itertools.count(2))
    return next(one for one in itertools.chain([wanted], copies) if one not in taken)


def _with_ids(edits: Sequence[EditRequest], layout: str) -> tuple[EditRequest, ...]:
    """Each edit with an id, the file's own if it has one; if a file repeats an id, the later ones get "#2", "#3"."""
    taken = {edit.id for edit in edits}
    unused = taken - {""}
    named = []
    for number, edit in enumerate(edits, start=1):
        identity = edit.id if edit.id in unused else free_id(edit.id or f"{layout}-{number}", taken)
        unused.discard(identity)
        taken.add(identity)
        named.append(replace(edit, id=identity))
    return tuple(named)


def _file_records(path: Path, fields: FieldMap | None) -> list[FileRecord]:
    """The records of a file. An empty cell of a table is an absent field, and a whole number in one is text, as in CSV."""
    layouts = edit_layouts(fields)
    mapped = (
        key for name, keys in (fields or {}).items() for key in keys
        if name not in ("prompt", "target") or "." in key
    )  # fmt: skip
    lists = LIST_KEYS.union(top_level(mapped))
    texts = {name for layout in layouts for name in (layout.prompt, layout.target)}

    def is_record(value: Mapping[str, Any]) -> bool:
        """True also of an incomplete edit, whose list of questions must not be taken for the records."""
        known = first_that_recognises(value, layouts) or turns_of(value)
        return bool(known) or any(isinstance(value.get(name), str) for name in texts)

    def tidied(record: FileRecord) -> FileRecord:
        value = record.value
        if path.suffix.lower() in (".csv", ".tsv", ".parquet"):
            value = {
                key: str(cell) if type(cell) is int else cell for key, cell in value.items() if cell not in ("", None)
            }
        elif record.key is not None and "id" not in (fields or {}) and not any(name in value for name in ID_KEYS):
            value = {"id": record.key, **value}
        return replace(record, value=value)

    return [tidied(record) for record in file_records(path, lists, is_record)]
