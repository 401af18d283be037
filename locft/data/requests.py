"""Edit requests: what is to be written into a model, read from a file, a hub data set or the project's own edits.

A source is read whole and all its problems are told at once, because a user corrects a file, not a line. What is right
in form can still be impossible (two edits give one prompt two targets) or idle (the target is already true): that is
counted in `EditFindings`, never dropped.
"""

import hashlib
import importlib.resources
import json
import os
import random
import re
import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locft.data.edit_layouts import RawEdit, read_edits
from locft.data.edit_request import EditRequest, LocalityPrompt
from locft.data.record_files import missing_path, read_records, read_text, shortened
from locft.errors import InputError

BUILT_IN = ("atlas",)
"""Names of the edit sets that come with the project. A file of such a name is reached as ./atlas."""

_HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+(:.+)?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
ARTICLES = frozenset({"a", "an", "the"})
_ARTICLES = re.compile(r"\b(a|an|the)\b")


@dataclass(frozen=True)
class EditFindings:
    """What an edit set asks for that is impossible, idle or entangled.

    Two prompts are the same when they are the same text: to a model, another capital letter is another question, so
    only this gives a ceiling that no editor can exceed. Two targets are the same when `normalise_answer` makes them
    equal, because that is how an answer is judged.
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
    """Ceiling of reliability, in [0, 1]: of each prompt's targets only the most frequent one can hold."""

    def sentences(self) -> tuple[str, ...]:
        """The findings for a reader, one sentence each; empty when there is nothing to say."""
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
        """A random sample of so many of these edits, the same on every machine, in their order."""
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
    layout, edits = _read(source)
    ids = _ids(edits, layout)
    chosen: Sequence[int] = range(len(edits))
    if limit is not None and limit < len(edits):
        chosen = chosen[:limit] if sample_seed is None else _drawn(chosen, limit, sample_seed)
    requests = tuple(_request(edits[i], ids[i]) for i in chosen)
    findings = _findings(requests, [edits[i].truths for i in chosen])
    return EditSet(requests, source, layout, _fingerprint(requests), findings)


def normalise_answer(text: str) -> str:
    """The form in which two answers are compared, as in SQuAD: lower case, no punctuation, no articles, single spaces.

    A step that would leave nothing is not taken, so "A" (the letter), "The The" or "!" stay distinct answers instead of
    equalling an empty one. Unicode is composed first (one é). Applying it twice changes nothing.
    """
    lower = unicodedata.normalize("NFC", text.lower())
    bare = unicodedata.normalize("NFC", lower.translate(_PUNCTUATION))
    for candidate in (_ARTICLES.sub(" ", bare), bare):
        if words := candidate.split():
            return " ".join(words)
    return " ".join(lower.split())


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


def _request(edit: RawEdit, identity: str) -> EditRequest:
    return EditRequest(
        id=identity,
        subject=edit.subject,
        prompt=edit.prompt,
        target=edit.target,
        ground_truth=edit.truths[0] if edit.truths else None,
        rephrases=edit.rephrases,
        locality=tuple(LocalityPrompt(prompt, answer) for prompt, answer in edit.locality),
    )


def _ids(edits: Sequence[RawEdit], layout: str) -> list[str]:
    """One id each, the file's own where it has one. A benchmark may repeat its ids: the later ones get "#2", "#3"."""
    given = {edit.id for edit in edits}
    used: set[str] = set()
    ids = []
    for number, edit in enumerate(edits, start=1):
        wanted = edit.id or f"{layout}-{number}"
        identity, copy = wanted, 1
        while identity in used or (identity in given and identity != edit.id):
            copy += 1
            identity = f"{wanted}#{copy}"
        used.add(identity)
        ids.append(identity)
    return ids


def _read(source: str) -> tuple[str, list[RawEdit]]:
    """(layout, edits) of a whole source."""
    if source in BUILT_IN:
        with importlib.resources.as_file(importlib.resources.files("locft.data") / f"{source}.jsonl") as path:
            return _read_file(path)
    path = Path(os.path.expanduser(source))
    if os.path.exists(path):
        return _read_file(path)
    if _HUB_ID.fullmatch(source) and not source.lower().endswith((".json", ".jsonl", ".ndjson")):
        return _checked(*_hub_table(source))
    try:
        problem = missing_path(path)
    except OSError as error:  # a name too long for a file system
        problem = f"{source[:100]}: no such file: {error.strerror}"
    if "did you mean" not in problem:
        problem += f"; expected a .json or .jsonl file, a hub data set (owner/name), or {' or '.join(BUILT_IN)}"
    raise InputError(problem)


def _read_file(path: Path) -> tuple[str, list[RawEdit]]:
    try:
        records = read_records(path)
    except InputError as error:
        lines = _sound_lines(path)
        return _checked([value for _, value in lines], [f"{path}, line {line}" for line, _ in lines], error.problems)
    places = [
        # The line is enough to find a record, unless it is one of several on it.
        f"{path}, line {record.line}" + ("" if record.line == number else f" (record {number})")
        for number, record in enumerate(records, start=1)
    ]
    return _checked([record.value for record in records], places)


def _sound_lines(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The readable lines of a JSON Lines file some of whose lines are broken, so that their problems are told too."""
    try:
        text = read_text(path)
    except InputError:
        return []
    found = []
    for number, line in enumerate(text.split("\n") if not text.lstrip().startswith("[") else (), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append((number, value))
    return found


def _hub_table(source: str) -> tuple[list[dict[str, Any]], list[str]]:
    """(records, places) of a data set of the Hugging Face hub, "owner/name" or "owner/name:split"."""
    name, _, split = source.partition(":")
    try:
        import datasets  # here, because it takes a second and only this needs it

        data = datasets.load_dataset(name, split=split or None)
        if not split and len(data) == 1:
            (data,) = data.values()
        elif not split:
            choices = ", ".join(f"{name}:{key}" for key in data)
            raise InputError(f"{source}: expected a data set with one split, got {len(data)}; choose one of {choices}")
        rows = list(data)
    except InputError:
        raise
    except Exception as error:  # library, network and decoders have a class each; the user's next step is the same
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"{source}: no such file here, and not to be had as data set {name!r} of the Hugging Face hub "
            f"(split {split or 'not named'}): {type(error).__name__}: {reason}. Without a network, name a local .json "
            "or .jsonl file with its records, or load it once with a network and set HF_HUB_OFFLINE=1 to use that copy"
        ) from None
    if not rows:
        raise InputError(f"{source}: no records in it, expected at least one edit")
    return rows, [f"{source}, record {number}" for number in range(1, len(rows) + 1)]


def _checked(
    records: Sequence[dict[str, Any]], places: Sequence[str], earlier_problems: Sequence[str] = ()
) -> tuple[str, list[RawEdit]]:
    layout, edits, problems = read_edits(records, places)
    if earlier_problems or problems:
        raise InputError(shortened((*earlier_problems, *problems)))
    return layout, edits
