"""Benchmark records, in the field layouts in which they are published, to scorable items.

Prompts and scoring rules are those in common use (as in lm-evaluation-harness, zero-shot), so that the numbers can be
compared with published ones. What the model must know lies in the choices; they carry the space that leads them.
"""

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from locft.errors import InputError
from locft.data.record_files import describe

Rule = Literal["sum", "mean", "exact"]
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class CapabilityItem:
    """One question with its possible answers."""

    task: str
    id: str
    """Unique within the task."""
    context: str
    """What precedes every choice; empty where whole sentences are compared."""
    choices: tuple[str, ...]
    """With their leading space."""
    answer: int
    """Index of the right choice."""
    rule: Rule
    """How a choice is scored. sum: log-likelihood of its tokens. mean: that divided by its characters (without the
    space that leads it), for choices of uneven length. exact: there is one choice, right when each of its tokens is the
    most likely one, given the true tokens before it."""


@dataclass(frozen=True)
class Layout:
    """A benchmark's fields and how they become an item."""

    name: str
    keys: frozenset[str]
    """A record that has these is of this layout."""
    read: Callable[["_Fields"], tuple[str, Sequence[str], int, Rule] | None]
    """(context, choices, answer, rule); None where a field is wrong."""
    only: frozenset[str] | None = None
    """A record that has other keys than these is not of this layout. None: other keys are ignored."""


def detect_layout(keys: Sequence[str], where: str) -> Layout:
    """The layout with these keys. Raises InputError that names the keys and the known layouts."""
    for layout in LAYOUTS:
        if layout.keys <= set(keys) and (layout.only is None or set(keys) <= layout.only):
            return layout
    known = "; ".join(f"{layout.name} ({', '.join(sorted(layout.keys))})" for layout in LAYOUTS)
    raise InputError(f"{where}: unknown layout, its keys are {', '.join(map(str, keys)) or 'none'}. Known: {known}")


def read_item(layout: Layout, value: Mapping[str, Any], task: str, default_id: str, where: str) -> CapabilityItem:
    """One record as an item. Raises InputError with every wrong field (got, expected)."""
    fields = _Fields(value, where)
    found = layout.read(fields)
    own_id = fields.optional_text("id") if layout is OWN else None
    if fields.problems or found is None:
        raise InputError(fields.problems)
    context, choices, answer, rule = found
    return CapabilityItem(task, own_id or default_id, context, tuple(choices), answer, rule)


class _Fields:
    """Typed access to a record's fields that notes what is wrong and goes on, so that all of it is told."""

    def __init__(self, value: Mapping[str, Any], where: str):
        self.value, self.where, self.problems = value, where, []

    def wrong(self, key: str, expected: str) -> None:
        if key in self.value:
            self.problems.append(f"{self.where}: field {key!r}: got {describe(self.value[key])}, expected {expected}")
            return
        near = difflib.get_close_matches(key, [name for name in self.value if isinstance(name, str)], 1)
        hint = f" (there is {near[0]!r})" if near else ""
        self.problems.append(f"{self.where}: field {key!r} is missing{hint}, expected {expected}")

    def text(self, key: str, blank: bool = False) -> str:
        value = self.value.get(key)
        if not isinstance(value, str) or not (blank or value.strip()):
            self.wrong(key, "text")
            return ""
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if self.value.get(key) is not None else None

    def texts(self, key: str, at_least: int = 2) -> tuple[str, ...]:
        """A list of texts that are not blank."""
        value = self.value.get(key)
        if not _is_texts(value) or len(value) < at_least:
            self.wrong(key, f"a list of {at_least} or more texts")
            return ()
        return tuple(value)

    def index(self, key: str, count: int, letters: bool = False) -> int:
        """The right choice's number, 0 is the first; also as a text, as the hub's tables have it, or as a letter."""
        value = self.value.get(key)
        if isinstance(value, str):
            if letters and len(value) == 1 and value in LETTERS:
                value = LETTERS.index(value)
            elif re.fullmatch(r"[0-9]{1,3}", value):
                value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < count:
            hidden = key in self.value and value in (-1, "-1", "", None)
            hint = " (a split without answers cannot be scored)" if hidden else ""
            self.wrong(key, f"the number of the right choice, 0 to {count - 1}{hint}")
            return 0
        return value


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) and text.strip() for text in value)


def _labelled_choices(fields: _Fields) -> tuple[tuple[str, ...], int]:
    """`choices` {text: [...], label: [...]} and `answerKey`, the label of the right one."""
    choices = fields.value.get("choices")
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (None, None)
    if not (_is_texts(texts) and _is_texts(labels) and len(texts) == len(labels) >= 2):
        fields.wrong("choices", 'an object {"text": [...], "label": [...]} of two lists of the same length, 2 or more')
        return (), 0
    key = fields.value.get("answerKey")
    if key not in labels:
        fields.wrong("answerKey", f"one of {', '.join(labels)}")
        return (), 0
    return tuple(texts), labels.index(key)


def _spaced(choices: Sequence[str]) -> tuple[str, ...]:
    return tuple(" " + choice.strip() for choice in choices)


def _own(fields: _Fields):
    context, choices = fields.text("context", blank=True), fields.texts("choices", at_least=1)
    answer = fields.index("answer", max(1, len(choices)))
    return context, choices, answer, "exact" if len(choices) == 1 else "sum"


def _arc(fields: _Fields):
    question = fields.text("question")
    choices, answer = _labelled_choices(fields)
    return f"Question: {question}\nAnswer:", _spaced(choices), answer, "sum"


def _openbookqa(fields: _Fields):
    stem = fields.text("question_stem")
    choices, answer = _labelled_choices(fields)
    return stem, _spaced(choices), answer, "mean"


def _mmlu(fields: _Fields):
    question, choices = fields.text("question"), fields.texts("choices")
    if len(choices) > len(LETTERS):
        fields.wrong("choices", f"at most {len(LETTERS)} texts, each gets a letter")
    answer = fields.index("answer", len(choices) or 4, letters=True)
    options = "".join(f"\n{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices))
    return f"{question.strip()}{options}\nAnswer:", _spaced(LETTERS[: len(choices)]), answer, "sum"


def _sciq(fields: _Fields):
    support = fields.text("support", blank=True).strip() if fields.value.get("support") is not None else ""
    question = fields.text("question")
    choices = [fields.text(key) for key in ("distractor1", "distractor2", "distractor3", "correct_answer")]
    return f"{support}\nQuestion: {question}\nAnswer:".lstrip(), _spaced(choices), 3, "sum"


def _piqa(fields: _Fields):
    goal, choices = fields.text("goal"), [fields.text("sol1"), fields.text("sol2")]
    return f"Question: {goal}\nAnswer:", _spaced(choices), fields.index("label", 2), "sum"


def _hellaswag(fields: _Fields):
    if "ctx_a" in fields.value:
        second = fields.text("ctx_b", blank=True) if fields.value.get("ctx_b") is not None else ""
        context = f"{fields.text('ctx_a')} {second.capitalize()}"
    else:
        context = fields.text("ctx")
    activity = fields.optional_text("activity_label")
    endings = fields.texts("endings")
    answer = fields.index("label", len(endings) or 4)
    context = _without_wikihow_marks(f"{activity}: {context}" if activity else context)
    return context, _spaced([_without_wikihow_marks(ending) or ending for ending in endings]), answer, "mean"


def _without_wikihow_marks(text: str) -> str:
    """HellaSwag's WikiHow half keeps marks of its pages such as [header], [title] and [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _blimp(fields: _Fields):
    # Whole sentences are compared, so nothing leads them.
    good, bad = fields.text("sentence_good"), fields.text("sentence_bad")
    return "", (good, bad), 0, "sum"


def _lambada(fields: _Fields):
    text = fields.text("text")
    split = re.fullmatch(r"(.*\S)(\s+)(\S+)\s*", text, re.DOTALL)
    if split is None:
        if text:
            fields.wrong("text", "two or more words, the last of which is asked for")
        return None
    # A last word on a line of its own is asked for behind the line break, not together with it.
    before, gap, word = split.groups()
    return (before, (" " + word,), 0, "exact") if gap == " " else (before + gap, (word,), 0, "exact")


OWN = Layout("own", frozenset({"context", "choices", "answer"}), _own)
"""This project's own: {"id"?, "context", "choices": [...], "answer": index}, choices with their leading space. A single
choice must be predicted exactly (a last word)."""

LAYOUTS: tuple[Layout, ...] = (
    OWN,
    Layout("BLiMP", frozenset({"sentence_good", "sentence_bad"}), _blimp),
    Layout("PIQA", frozenset({"goal", "sol1", "sol2"}), _piqa),
    Layout("HellaSwag", frozenset({"ctx", "endings"}), _hellaswag),
    Layout("HellaSwag", frozenset({"ctx_a", "endings"}), _hellaswag),
    Layout("SciQ", frozenset({"question", "correct_answer", "distractor1"}), _sciq),
    Layout("OpenBookQA", frozenset({"question_stem", "choices"}), _openbookqa),
    Layout("ARC", frozenset({"question", "choices", "answerKey"}), _arc),
    Layout("MMLU", frozenset({"question", "choices", "answer"}), _mmlu),
    # Any table of texts has a column "text": with others such as "label" it is no last-word cloze.
    Layout("LAMBADA", frozenset({"text"}), _lambada, only=frozenset({"text", "domain", "id", "idx"})),
)
