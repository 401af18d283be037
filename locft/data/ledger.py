"""The ledger of an edit: every edit that was ever made into one delta, when it arrived, and what became of it.

It is stored alongside the delta as JSON Lines in the project's own layout, with some extra keys, so it is an edit file
like any other. A delta is cumulative: it holds all active edits together, relative to the untouched base.
"""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from locft.data.answers import normalise_answer
from locft.data.edit_request import EditRequest
from locft.data.record_files import read_json_records
from locft.data.requests import SHOWN, UNMARKED, edit_set, free_id, is_marked, own_record
from locft.errors import InputError, did_you_mean, listed

FILE_NAME = "ledger.jsonl"


@dataclass(frozen=True)
class LedgerEntry:
    """One edit and its fate."""

    request: EditRequest
    arrived: str
    """Time of arrival, ISO 8601 in UTC."""
    superseded_by: str | None = None
    """The id of the later edit that took its place."""
    retracted: str | None = None
    """Time at which it was taken back."""

    @property
    def active(self) -> bool:
        return self.superseded_by is None and self.retracted is None

    def to_record(self) -> dict:
        fate = {"superseded_by": self.superseded_by, "retracted": self.retracted}
        return own_record(self.request) | {"arrived": self.arrived} | {k: v for k, v in fate.items() if v is not None}


@dataclass(frozen=True)
class Arrival:
    """The result of adding new edits and retractions to a ledger."""

    ledger: "Ledger"
    new: tuple[EditRequest, ...]
    """Edits to train: those that are not in the ledger already."""
    retracted: tuple[EditRequest, ...]
    """Edits that were active and are taken back."""
    sentences: tuple[str, ...]
    """What a user should know, in one sentence each."""


@dataclass(frozen=True)
class Ledger:
    """All entries in order of arrival. Ids are unique."""

    entries: tuple[LedgerEntry, ...] = ()

    @property
    def active(self) -> tuple[EditRequest, ...]:
        """The edits that the delta is to hold."""
        return tuple(entry.request for entry in self.entries if entry.active)

    @classmethod
    def of(cls, requests: Sequence[EditRequest], when: str) -> "Ledger":
        """The ledger of edits that all arrived at once, as they are: contradictions are found by `EditFindings`."""
        return cls(tuple(LedgerEntry(request, when) for request in requests))

    def add(
        self,
        requests: Sequence[EditRequest],
        when: str,
        without: Sequence[str] = (),
        marked: Sequence[tuple[str, str]] = (),
    ) -> Arrival:
        """The ledger after an arrival.

        A new edit supersedes an active one that has its prompt, as prompt or as a rephrase, and another target. One that is
        already active is left out, unless its prompt is also active with another target: then it takes the place of both. An
        id that is taken gets "#2", "#3".
        without: ids of active edits to take back, before the new ones are added; edits with the same prompt and target go
        with them. marked: (id, prompt) of edits that a file marks as taken back, either of them ""; with a prompt, edits of
        this prompt are meant, whatever the id of others. Those that are not active are reported.
        Raises InputError with every id of `without` that is not in the ledger or not active.
        """
        gone, stale = self._marked(marked)
        gone |= self._retracted(without)
        repeats = self._repeats(gone)
        gone |= set(repeats)
        entries: dict[str, LedgerEntry] = {}
        asking: defaultdict[str, list[str]] = defaultdict(list)  # prompt or rephrase -> ids of its edits

        def enter(entry: LedgerEntry) -> None:
            entries[entry.request.id] = entry
            for text in {entry.request.prompt, *entry.request.rephrases}:
                asking[text].append(entry.request.id)

        for entry in self.entries:
            enter(replace(entry, retracted=when) if entry.request.id in gone else entry)
        new, superseded, known, renamed = [], [], [], []
        for request in requests:
            asked = [entries[one] for one in asking[request.prompt] if entries[one].active]
            of_prompt = [one for one in asked if one.request.prompt == request.prompt]
            rivals = [one for one in asked if normalise_answer(one.request.target) != normalise_answer(request.target)]
            if of_prompt and not any(one in rivals for one in of_prompt):
                known.append(request.id)
                continue
            given = request.id
            request = replace(request, id=free_id(given, entries))
            renamed += [f"{given} as {request.id}"] if request.id != given else []
            beaten = [one for one in asked if one in of_prompt or one in rivals]
            entries |= {one.request.id: replace(one, superseded_by=request.id) for one in beaten}
            superseded += [f"{one.request.id} by {request.id}" for one in beaten]
            enter(LedgerEntry(request, when))
            new.append(request)
        return Arrival(
            Ledger(tuple(entries.values())),
            tuple(request for request in new if entries[request.id].active),
            tuple(entry.request for entry in self.entries if entry.request.id in gone),
            (
                *_told(superseded, "Superseded by a later edit of the same prompt or a rephrase"),
                *_told(known, "Already learnt, not trained again"),
                *_told(renamed, "Added under another id, because the ledger has theirs"),
                *_told(sorted(gone.difference(repeats)), "Taken back"),
                *_told(repeats, "Taken back with these, because prompt and target are the same"),
                *_told(stale, "Marked as taken back, but not active in the ledger"),
            ),
        )

    def _marked(self, marked: Sequence[tuple[str, str]]) -> tuple[set[str], list[str]]:
        """(ids of the active edits that are meant by marks, names of the marks that mean none)."""
        of_prompt: defaultdict[str, set[str]] = defaultdict(set)
        for one in self.active:
            of_prompt[one.prompt].add(one.id)
        ids = {one.id for one in self.active}
        gone: set[str] = set()
        stale = []
        for identity, prompt in marked:
            meant = of_prompt[prompt] if prompt else ids & {identity}
            gone |= meant & {identity} or meant
            if not meant:
                stale.append(f"{identity} (there with another prompt)" if identity in ids else identity or prompt)
        return gone, stale

    def _repeats(self, gone: set[str]) -> list[str]:
        """Ids of the other active edits that have both prompt and target of one of these."""
        targets: defaultdict[str, set[str]] = defaultdict(set)
        for one in self.active:
            if one.id in gone:
                targets[one.prompt].add(normalise_answer(one.target))
        return [
            one.id for one in self.active
            if one.id not in gone and one.prompt in targets and normalise_answer(one.target) in targets[one.prompt]
        ]  # fmt: skip

    def _retracted(self, without: Sequence[str]) -> set[str]:
        fate = {entry.request.id: entry for entry in self.entries}
        problems = []
        for wanted in without:
            if wanted not in fate:
                near = did_you_mean(wanted, list(fate))
                problems.append(f"--without: got {wanted!r}, expected the id of an edit in the ledger{near}")
            elif not fate[wanted].active:
                how = "taken back" if fate[wanted].retracted else f"superseded by {fate[wanted].superseded_by}"
                problems.append(f"--without: got {wanted!r}, which was already {how}")
        if problems:
            raise InputError(problems)
        return set(without)

    def text(self) -> str:
        """The file's content."""
        return "".join(json.dumps(entry.to_record(), ensure_ascii=False) + "\n" for entry in self.entries)

    @classmethod
    def load(cls, folder: Path) -> "Ledger":
        """Raises InputError if there is none, or if it is damaged."""
        path = folder / FILE_NAME
        if not path.is_file():
            raise InputError(
                f"{folder}: there is no {FILE_NAME} next to the delta, expected a folder that `locft edit` wrote; "
                "make the edit again to continue it"
            )
        # A lone record may hold lists of objects, which are not the records.
        records = read_json_records(path, is_record=lambda value: True)
        requests = edit_set(records, str(path)).requests
        entries = []
        for request, record in zip(requests, records, strict=True):
            arrived = record.value.get("arrived")
            fate = {name: record.value[name] for name in UNMARKED if is_marked(name, record.value.get(name))}
            if not isinstance(arrived, str):
                raise InputError(f"{path}, {record.place}, field arrived: expected a time, got {arrived!r}")
            entries.append(LedgerEntry(request, arrived, **fate))
        return cls(tuple(entries))


def _told(ids: Sequence[str], what: str) -> list[str]:
    return [f"{what}: {listed(ids, SHOWN)}."] if ids else []
