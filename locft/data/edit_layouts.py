"""Layouts of edit files: the records of a file, whatever their keys, become the same `RawEdit`s.

Each layout in circulation is one adapter of a few lines and one row of `LAYOUTS`; a new one is added the same way. The
layout of a file is recognised from the keys of its records, and every record is then held to it.
"""

import difflib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from locft.data.record_files import describe


@dataclass(frozen=True)
class RawEdit:
    """An edit as its file gives it. Texts have no whitespace around them, answers are one line."""

    id: str
    """The file's own id or case_id, "" where it has none."""
    subject: str
    prompt: str
    target: str
    truths: tuple[str, ...]
    """Every answer the file calls true, the main one first."""
    rephrases: tuple[str, ...]
    locality: tuple[tuple[str, str | None], ...]
    """Prompts the edit must not touch, each with the file's answer."""


@dataclass(frozen=True)
class Layout:
    name: str
    read: "Callable[[_Fields], RawEdit]"
    recognise: Callable[[Mapping[str, Any]], bool]
    """Given the fields that are not null. Loose, so that a record with a field too few is told which."""
    needs: tuple[str, ...]
    optional: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.needs)}; optional {', '.join(self.optional)})"


def read_edits(records: Sequence[Mapping[str, Any]], places: Sequence[str]) -> tuple[str, list[RawEdit], list[str]]:
    """(layout, edits, problems) of a file's records. `places` says for messages where each record stands.

    Where there are problems, the edits are of no use and the layout may be "".
    """
    recognised = [layout_of(record) for record in records]
    votes = Counter(layout for layout in recognised if layout is not None)
    if not records:
        return "", [], []
    if not votes:  # one message for all records: they are of a kind
        got, known = _listed(records[0]), "; ".join(map(str, LAYOUTS))
        return "", [], [f"{places[0]}: unknown layout of edits, got the keys {got}; expected one of: {known}"]
    layout = votes.most_common(1)[0][0]  # of equally frequent ones, the first in the file
    problems: list[str] = []
    edits: list[RawEdit] = []
    first_place: dict[str, str] = {}
    for record, its_layout, place in zip(records, recognised, places, strict=True):
        if its_layout is not layout and (problem := _stranger(record, its_layout, layout)):
            problems.append(f"{place}: {problem}")
            continue
        edit = layout.read(_Fields(record, problems, place, strict=layout.name == "own"))
        if edit.id and edit.id in first_place and layout.name == "own":
            taken = first_place[edit.id]
            problems.append(f"{place}, field id: expected an id of its own, got {describe(edit.id)}, the id of {taken}")
        first_place.setdefault(edit.id, place)
        edits.append(edit)
    return layout.name, edits, problems


def layout_of(record: Mapping[str, Any]) -> Layout | None:
    filled = {key: value for key, value in record.items() if value is not None}
    return next((layout for layout in LAYOUTS if layout.recognise(filled)), None)


def _stranger(record: Mapping[str, Any], its_layout: Layout | None, layout: Layout) -> str | None:
    """Says that a record is of another layout than its file; None when it only lacks a field of the file's."""
    lacks = [key for key in layout.needs if key not in record]
    if not lacks or (its_layout is None and len(lacks) < len(layout.needs)):
        return None
    got = f"layout {its_layout.name}" if its_layout else f"the keys {_listed(record)}"
    return f"expected layout {layout.name} as elsewhere in the file, got {got} (it has no {', '.join(lacks)})"


class _Fields:
    """One JSON object while an adapter takes it apart: each getter returns a usable value and notes what is wrong."""

    def __init__(
        self, value: Mapping[str, Any], problems: list[str], place: str, *, path: str = "", strict: bool = False
    ):
        self.value = value
        self.problems = problems
        self.place = place
        self.path = path
        """Of the object in its record: "" for the record itself, "locality[0]." inside."""
        self.strict = strict
        """The project's own layout is strict; in the others a blank text stands for none, a text for a list of one."""

    def wrong(self, key: str, problem: str) -> None:
        self.problems.append(f"{self.place}, field {self.path}{key}: {problem}")

    def text(self, key: str) -> str:
        """A text that must be there; "" when it is not."""
        if key not in self.value:
            self.wrong(key, f"expected text, got no such field (the keys are {_listed(self.value)})")
            return ""
        return self._clean(key, self.value[key])

    def optional_text(self, key: str) -> str | None:
        return None if self._absent(self.value.get(key)) else self._clean(key, self.value[key])

    def answer(self, key: str) -> str:
        """A text that must be there, on one line: generation stops at a newline, so no more could be produced."""
        return _one_line(self.text(key))

    def optional_answer(self, key: str) -> str | None:
        text = self.optional_text(key)
        return None if text is None else _one_line(text)

    def texts(self, key: str) -> tuple[str, ...]:
        """A list of texts, empty when the field is absent."""
        value = self.value.get(key)
        if isinstance(value, str) and not self.strict:
            value = [value]
        items = enumerate(self._list(key, value, "texts"))
        return tuple(self._clean(f"{key}[{i}]", item) for i, item in items if self.strict or not self._absent(item))

    def answers(self, key: str) -> tuple[str, ...]:
        return tuple(_one_line(text) for text in self.texts(key))

    def objects(self, key: str) -> "list[_Fields]":
        """A list of objects, empty when the field is absent."""
        items = enumerate(self._list(key, self.value.get(key), "objects"))
        return [self._inner(f"{key}[{i}]", item) for i, item in items]

    def object(self, key: str) -> "_Fields":
        """An object that must be there."""
        if key not in self.value:
            self.wrong(key, f"expected an object, got no such field (the keys are {_listed(self.value)})")
            return _Fields({}, [], "")
        return self._inner(key, self.value[key])

    def id(self, key: str) -> str:
        """The record's own id as text, "" when it has none."""
        value = self.value.get(key)
        if self._absent(value):
            return ""
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._clean(key, value, "text or a whole number")

    def warn_of_misspelt(self, known: Sequence[str]) -> None:
        """Any key may carry the user's own notes, but one that is nearly a known key is that key, misspelt."""
        for key in self.value:
            near = difflib.get_close_matches(key.lower(), known, n=1, cutoff=0.85)
            if key not in known and near and near[0] not in self.value:
                self.wrong(_listed([key]), f"unknown key, did you mean {near[0]!r}?")

    def _absent(self, value: Any) -> bool:
        return value is None or (not self.strict and isinstance(value, str) and not value.strip())

    def _inner(self, name: str, value: Any) -> "_Fields":
        if isinstance(value, Mapping):
            return _Fields(value, self.problems, self.place, path=f"{self.path}{name}.", strict=self.strict)
        self.wrong(name, f"expected an object, got {describe(value)}")
        return _Fields({}, [], "")  # with a list of problems that nobody reads: one problem here is enough

    def _list(self, key: str, value: Any, of: str) -> Iterable[Any]:
        if value is None or isinstance(value, list):
            return value or ()
        self.wrong(key, f"expected a list of {of}, got {describe(value)}")
        return ()

    def _clean(self, key: str, value: Any, expected: str = "text") -> str:
        if not isinstance(value, str):
            self.wrong(key, f"expected {expected}, got {describe(value)}")
            return ""
        if not value.strip():
            self.wrong(key, f"expected {expected}, got {'only whitespace' if value else 'an empty text'}")
        return value.strip()


def _own(fields: _Fields) -> RawEdit:
    fields.warn_of_misspelt(("id", "subject", "prompt", "target", "ground_truth", "rephrases", "locality"))
    locality = fields.objects("locality")
    for item in locality:
        item.warn_of_misspelt(("prompt", "answer"))
    return RawEdit(
        id=fields.id("id"),
        subject=fields.text("subject"),
        prompt=fields.text("prompt"),
        target=fields.answer("target"),
        truths=_present(fields.optional_answer("ground_truth")),
        rephrases=fields.texts("rephrases"),
        locality=tuple((item.text("prompt"), item.optional_answer("answer")) for item in locality),
    )


def _zsre(fields: _Fields) -> RawEdit:
    # `pred` is another model's answer and `cond` repeats it: neither is the truth. `loc` keeps its "nq question: ",
    # with which the published numbers were made.
    return RawEdit(
        id="",
        subject=fields.text("subject"),
        prompt=fields.text("src"),
        target=fields.answer("alt"),
        truths=fields.answers("answers"),
        rephrases=fields.texts("rephrase"),
        locality=_pair(fields.optional_text("loc"), fields.optional_answer("loc_ans")),
    )


def _flat(fields: _Fields, truth: str | None) -> RawEdit:
    return RawEdit(
        id=fields.id("case_id"),
        subject=fields.text("subject"),
        prompt=fields.text("prompt"),
        target=fields.answer("target_new"),
        truths=_present(truth),
        rephrases=fields.texts("rephrase_prompt"),
        locality=_pair(fields.optional_text("locality_prompt"), fields.optional_answer("locality_ground_truth")),
    )


def _counterfact(fields: _Fields) -> RawEdit:
    return _flat(fields, fields.answer("ground_truth"))


def _wikibigedit(fields: _Fields) -> RawEdit:
    return _flat(fields, fields.optional_answer("ground_truth"))  # published without one


def _counterfact_original(fields: _Fields) -> RawEdit:
    rewrite = fields.object("requested_rewrite")
    subject, prompt = rewrite.text("subject"), rewrite.text("prompt")
    if prompt and "{}" not in prompt:
        rewrite.wrong("prompt", f"expected {{}} where the subject goes, got {describe(prompt)}")
    truth = rewrite.object("target_true").answer("str")
    return RawEdit(
        id=fields.id("case_id"),
        subject=subject,
        prompt=prompt.replace("{}", subject),
        target=rewrite.object("target_new").answer("str"),
        truths=(truth,),
        rephrases=fields.texts("paraphrase_prompts"),
        # The neighbours were chosen for having the same true answer.
        locality=tuple((text, truth) for text in fields.texts("neighborhood_prompts")),
    )


def _qaedit(fields: _Fields) -> RawEdit:
    return RawEdit(
        id=fields.id("id"),
        subject=fields.text("subject"),
        prompt=fields.text("prompt"),
        target=fields.answer("target"),
        truths=(),
        rephrases=fields.texts("rephrase"),
        locality=tuple(
            pair
            for item in fields.objects("locality")
            for pair in _pair(item.optional_text("loc"), item.optional_answer("loc_ans"))
        ),
    )


LAYOUTS = (  # the first that recognises a record has it
    Layout(
        name="zsre",
        read=_zsre,
        recognise=lambda r: "src" in r,
        needs=("subject", "src", "alt"),
        optional=("rephrase", "answers", "loc", "loc_ans"),
    ),
    Layout(
        name="counterfact-original",
        read=_counterfact_original,
        recognise=lambda r: "requested_rewrite" in r,
        needs=("requested_rewrite",),
        optional=("case_id", "paraphrase_prompts", "neighborhood_prompts"),
    ),
    Layout(
        name="counterfact",
        read=_counterfact,
        recognise=lambda r: _is_flat(r) and ("ground_truth" in r or "case_id" in r),
        needs=("subject", "prompt", "target_new", "ground_truth"),
        optional=("case_id", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    ),
    Layout(
        name="wikibigedit",
        read=_wikibigedit,
        recognise=lambda r: _is_flat(r),
        needs=("subject", "prompt", "target_new"),
        optional=("rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    ),
    Layout(
        name="qaedit",
        read=_qaedit,
        recognise=lambda r: "target" in r and "rephrase" in r and ("source" in r or _has_loc(r.get("locality"))),
        needs=("subject", "prompt", "target"),
        optional=("id", "source", "rephrase", "locality"),
    ),
    Layout(
        name="own",
        read=_own,
        recognise=lambda r: sum(key in r for key in ("subject", "prompt", "target")) >= 2,
        needs=("subject", "prompt", "target"),
        optional=("id", "ground_truth", "rephrases", "locality"),
    ),
)


def _is_flat(record: Mapping[str, Any]) -> bool:
    return "target" not in record and ("target_new" in record or "rephrase_prompt" in record)


def _has_loc(items: Any) -> bool:
    return isinstance(items, list) and any(isinstance(item, Mapping) and "loc" in item for item in items)


def _present(text: str | None) -> tuple[str, ...]:
    return () if text is None else (text,)


def _pair(prompt: str | None, answer: str | None) -> tuple[tuple[str, str | None], ...]:
    return () if prompt is None else ((prompt, answer),)


def _one_line(text: str) -> str:
    return " ".join(part.strip() for part in text.splitlines() if part.strip())


def _listed(keys: Iterable[str], most: int = 12) -> str:
    shown = [(key if key.isprintable() else repr(key))[:60] for key in keys]
    return (", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")) or "(none)"
