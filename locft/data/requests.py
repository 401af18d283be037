"""Edit sets: the edits of a file, a hub data set or the project's own, checked and selected.

A source is read whole and all its problems are told at once, because a user corrects a file, not a line. Edits that are
right in form can still be impossible (two give one prompt different targets) or pointless (the target is already true):
`EditFindings` counts them, nothing is dropped.
"""

import hashlib
import importlib.resources
import json
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from locft.data.answers import normalise_answer
from locft.data.edit_layouts import read_edits
from locft.data.edit_request import EditRequest
from locft.data.record_files import hub_records, missing_path, read_json_records
from locft.errors import InputError

BUILT_IN = ("atlas",)
"""Names of the edit sets that come with the project. A file of such a name is reached as ./atlas."""

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:.+)?")


@dataclass(frozen=True)
class EditFindings:
    """Edits of a set that cannot all hold, that change nothing, or that overlap.

    Two prompts are the same only if their texts are: to a model, another capital letter is another question, and so the
    ceiling is one that no editor can exceed. Two targets are the same if `normalise_answer` makes them equal, because
    that is how an answer is judged.
    """

    duplicates: int
    """Edits that repeat an earlier one: same prompt, same target."""
    contradictions: int
    """Edits whose prompt another edit gives a different target."""
    already_true: int
    """Edits whose target is one of the true answers that the file knows."""
    repeated_subjects: int
    """Edits about a subject that an earlier edit is about (case and spacing ignored)."""
    reachable: float
    """Highest possible reliability, in [0, 1]: of each prompt's targets only the most frequent one can hold."""

    def sentences(self) -> tuple[str, ...]:
        """The findings in one sentence each; none if there is nothing to say."""
        lines = []
        if self.contradictions:
            percent = f"{100 * self.reachable:.2f}%" if self.reachable < 0.9999 else f"{100 * self.reachable:.5f}%"
            lines.append(
                f"{self.contradictions} edits contradict another edit (same prompt, different target): "
                f"reliability can reach {percent} at most."
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
    """16 hexadecimal digits of the content without the ids: the same edits in another file or layout have the same."""
    findings: EditFindings
    """Of the selected edits."""

    def sample(self, count: int, seed: int) -> "EditSet":
        """A random sample of `count` of these edits, the same on every machine, in their order."""
        requests = tuple(self.requests[index] for index in _drawn(range(len(self.requests)), count, seed))
        findings = _findings(requests, [()] * count)
        return replace(self, requests=requests, fingerprint=_fingerprint(requests), findings=findings)


def load_edits(source: str, *, limit: int | None = None, sample_seed: int | None = None) -> EditSet:
    """Read and check a whole source, then select.

    `source` is a built-in name ("atlas"), a file (.json list or JSON lines), or a hub id ("owner/name" or
    "owner/name:split"). `limit` None takes all edits, as does a limit above their number; otherwise it takes the first
    ones, or with `sample_seed` a random sample, the same on every machine and in the order of the file.

    Raises `InputError` with every problem of the source (at most 20 are spelled out).
    """
    source = os.fspath(source)
    _check_selection(limit, sample_seed)
    layout, edits, truths = _read(source)
    edits = _with_ids(edits, layout)
    chosen: Sequence[int] = range(len(edits))
    if limit is not None and limit < len(edits):
        chosen = chosen[:limit] if sample_seed is None else _drawn(chosen, limit, sample_seed)
    requests = tuple(edits[index] for index in chosen)
    findings = _findings(requests, [truths[index] for index in chosen])
    return EditSet(requests, source, layout, _fingerprint(requests), findings)


def _drawn(indices: Sequence[int], count: int, seed: int) -> list[int]:
    """A random sample, the same on every machine, ascending."""
    return sorted(random.Random(seed).sample(indices, count))


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
    return EditFindings(
        duplicates=sum(group.total() - len(group) for group in groups),
        contradictions=sum(group.total() for group in groups if len(group) > 1),
        already_true=sum(
            normalise_answer(request.target) in map(normalise_answer, known)
            for request, known in zip(requests, truths, strict=True)
        ),
        repeated_subjects=len(requests) - len({" ".join(request.subject.casefold().split()) for request in requests}),
        reachable=sum(max(group.values()) for group in groups) / len(requests),
    )


def _fingerprint(requests: Sequence[EditRequest]) -> str:
    content = [
        (r.subject, r.prompt, r.target, r.ground_truth, r.rephrases, [(p.prompt, p.answer) for p in r.locality])
        for r in requests
    ]
    return hashlib.sha256(json.dumps(content, separators=(",", ":")).encode()).hexdigest()[:16]


def _with_ids(edits: Sequence[EditRequest], layout: str) -> list[EditRequest]:
    """Each edit with an id, the file's own if it has one; if a file repeats an id, the later ones get "#2", "#3"."""
    given = {edit.id for edit in edits}
    used: set[str] = set()
    named = []
    for number, edit in enumerate(edits, start=1):
        wanted = edit.id or f"{layout}-{number}"
        identity, copy = wanted, 1
        while identity in used or (identity in given and identity != edit.id):
            copy += 1
            identity = f"{wanted}#{copy}"
        used.add(identity)
        named.append(replace(edit, id=identity))
    return named


def _read(source: str) -> tuple[str, list[EditRequest], list[tuple[str, ...]]]:
    """(layout, edits, true answers of each edit) of a whole source."""
    if source in BUILT_IN:
        with importlib.resources.as_file(importlib.resources.files("locft.data") / f"{source}.jsonl") as path:
            return _read_file(path)
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        return _read_file(path)
    if _HUB_ID.fullmatch(source) and not source.lower().endswith((".json", ".jsonl", ".ndjson")):
        name, _, split = source.partition(":")
        return read_edits(hub_records(source, name, None, split or None), source)
    try:
        problem = missing_path(path)
    except OSError as error:  # a name too long for a file system
        problem = f"{source[:100]}: no such file: {error.strerror}"
    if "did you mean" not in problem:
        problem += f"; expected a .json or .jsonl file, a hub data set (owner/name), or {' or '.join(BUILT_IN)}"
    raise InputError(problem)


def _read_file(path: Path) -> tuple[str, list[EditRequest], list[tuple[str, ...]]]:
    records, problems = read_json_records(path)
    return read_edits(records, str(path), problems)
