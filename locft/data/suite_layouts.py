"""Layouts of benchmark files: records of any published layout become the same scorable items.

Prompts and scoring rules are those in common use (as in lm-evaluation-harness, zero-shot), so that the numbers can be
compared with published ones. A new layout is one more entry of `LAYOUTS`.
"""

import functools
import itertools
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from locft.data.answers import space_before_answer
from locft.data.capability_item import CapabilityItem, Rule
from locft.data.record_files import FileRecord
from locft.data.record_layouts import (
    TEXT,
    VERBATIM,
    ReadRecords,
    RecordFields,
    RecordLayout,
    first_that_recognises,
    read_with_layout,
    top_level,
    value_at,
)

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
NO_ANSWERS = (-1, "-1", "", None)
"""Placeholders for the right choice in splits that are published without answers."""
ASKED = ("question", "query", "passage", "article", "context")
"""Keys whose texts the model has to be shown: a layout that does not read one of them is not that of the file."""


def _spaced(choice: str) -> str:
    return " " + choice.strip()


@dataclass(frozen=True, kw_only=True)
class BenchmarkLayout(RecordLayout):
    """Where the parts of a question are in a record, and how they are shown to the model."""

    texts: tuple[str, ...] = ()
    """Keys of the texts that make up the context."""
    optional_texts: tuple[str, ...] = ()
    """Keys of further texts, "" if absent."""
    context: str | Callable[[Mapping[str, str]], str] = ""
    """A template over the texts, or a function of them."""
    choices: str | tuple[str, ...] = ()
    """Path of the list of choices, or one key per choice. If empty, the model gives the last word of the context."""
    more_choices: bool = False
    """Further choices may come under the letters that follow."""
    answer: str | int = 0
    """Path of the right choice's number, counted from 0, or the number itself."""
    labels: str = ""
    """Path of the choices' labels, if the answer is one of these instead of a number."""
    lettered: bool = False
    """The choices are given letters, among which the model chooses; the answer may be a letter too."""
    shown: Callable[[str], str] = _spaced
    """The form in which a choice follows the context."""
    rule: Rule = "sum"

    @property
    def required(self) -> tuple[str, ...]:
        choices = (self.choices,) if isinstance(self.choices, str) else self.choices
        return (*self.texts, *choices, *((self.answer,) if isinstance(self.answer, str) else ()))

    @property
    def optional(self) -> tuple[str, ...]:
        return (*self.optional_texts, *(("id",) if self.strict else ()))


def _without_wikihow_marks(text: str) -> str:
    """Without the markup that HellaSwag's WikiHow half keeps from its pages, such as [header], [title] and [step]."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ").strip()


def _hellaswag_context(texts: Mapping[str, str]) -> str:
    context = texts["ctx"] if "ctx" in texts else f"{texts['ctx_a']} {texts['ctx_b'].capitalize()}"
    activity = texts["activity_label"]
    return _without_wikihow_marks(f"{activity}: {context}" if activity else context)


def _hellaswag_ending(ending: str) -> str:
    return _spaced(_without_wikihow_marks(ending) or ending)


# fmt: off
_COLUMNS = BenchmarkLayout(  # one option per column, as in tables of MMLU and CMMLU
    name="MMLU", signs=("question A B answer",), texts=("question",), context="{question}", choices=("A", "B"),
    more_choices=True, answer="answer", lettered=True,
)
_HELLASWAG = BenchmarkLayout(
    name="HellaSwag", signs=("ctx_a endings",), texts=("ctx_a",), optional_texts=("ctx_b", "activity_label"),
    context=_hellaswag_context, choices="endings", answer="label", shown=_hellaswag_ending, rule="mean",
)

_ARC = BenchmarkLayout(
    name="ARC", signs=("question choices answerKey",), texts=("question",), context="Question: {question}\nAnswer:",
    choices="choices.text", labels="choices.label", answer="answerKey",
)

LAYOUTS = (  # the first that recognises a record counts
    # This project's own. A single choice must be predicted exactly (a last word); choices have their leading space.
    BenchmarkLayout(
        name="own", strict=True, signs=("context choices answer",), texts=("context",), context="{context}",
        choices="choices", answer="answer", shown=str,
    ),
    BenchmarkLayout(  # whole sentences are compared
        name="BLiMP", signs=("sentence_good sentence_bad",), choices=("sentence_good", "sentence_bad"), shown=str,
    ),
    BenchmarkLayout(
        name="PIQA", signs=("goal sol1 sol2",), texts=("goal",), context="Question: {goal}\nAnswer:",
        choices=("sol1", "sol2"), answer="label",
    ),
    _HELLASWAG,
    replace(_HELLASWAG, signs=("ctx endings",), texts=("ctx",), optional_texts=("activity_label",)),
    BenchmarkLayout(
        name="SciQ", signs=("question correct_answer distractor1",), texts=("question",), optional_texts=("support",),
        context=lambda texts: f"{texts['support'].strip()}\nQuestion: {texts['question']}\nAnswer:".lstrip(),
        choices=("distractor1", "distractor2", "distractor3", "correct_answer"), answer=3,
    ),
    BenchmarkLayout(
        name="OpenBookQA", signs=("question_stem choices",), texts=("question_stem",), context="{question_stem}",
        choices="choices.text", labels="choices.label", answer="answerKey", rule="mean",
    ),
    _ARC,
    replace(_ARC, signs=("question choices.label answer",), answer="answer"),
    BenchmarkLayout(
        name="MMLU", signs=("question choices answer",), texts=("question",), context="{question}",
        choices="choices", answer="answer", lettered=True,
    ),
    BenchmarkLayout(
        name="MMLU-Pro", signs=("question options answer",), texts=("question",), context="{question}",
        choices="options", answer="answer", lettered=True,
    ),
    _COLUMNS,
    replace(
        _COLUMNS, signs=("Question A B Answer",), texts=("Question",), context="{Question}", answer="Answer",
    ),
    BenchmarkLayout(
        name="LAMBADA", signs=("text",), texts=("text",), context="{text}", shown=str,
        only="text domain id idx",  # any table of texts has a column "text": alongside "label", say, it is no cloze
    ),
)
# fmt: on
LIST_KEYS = top_level(layout.choices for layout in LAYOUTS if isinstance(layout.choices, str))
"""Keys that may hold lists or objects, which a table writes into one cell."""


def read_items(records: Sequence[FileRecord], task: str, source: str) -> ReadRecords[BenchmarkLayout, CapabilityItem]:
    """The items of a file's records. Raises InputError with every problem."""
    are_texts = functools.cache(lambda: _answers_are_texts(records))  # of the whole file, and few files ask
    read = read_with_layout(
        LAYOUTS, records, source, lambda layout, fields: _read_item(layout, fields, are_texts), _advice
    )
    items = [
        replace(item, task=task, id=item.id or f"{Path(source).stem}:{record.line or record.number}")
        for item, record in zip(read.values, records, strict=True)
    ]
    return replace(read, values=items)


def glued_items(read: ReadRecords[BenchmarkLayout, CapabilityItem]) -> list[CapabilityItem]:
    """The items whose choices lack the space between them and the context: in the project's own layout nothing adds one."""
    return [
        item for item in read.values if read.layout.strict and _is_word(item.context[-1:])
        and all(_is_word(choice[:1]) and space_before_answer(item.context, choice) for choice in item.choices)
    ]  # fmt: skip


def _is_word(char: str) -> bool:
    return char != "" and unicodedata.category(char)[0] in "LMN"


def _advice(record: FileRecord) -> str:
    """Advice for records without an answer, and for tables whose first line is probably not a header."""
    if empty := [key for key in ("answer", "answerKey", "label") if record.value.get(key, "") is None]:
        return f"; {empty[0]} is null, and a split without answers cannot be scored"
    named = all(re.fullmatch(r"[A-Za-z_][\w .-]{0,30}", str(key)) for key in record.value)
    return (
        "" if named else "; if the first line is already a question, add a header line with the column names above it"
    )


def columns_without_header(row: Sequence[str]) -> tuple[str, ...] | None:
    """The columns of a table whose first row is already a question, as MMLU is published: question, options, letter of
    the right one, perhaps with a number first. None if the row is a header."""
    number = ("",) if row[0].isdecimal() else ()
    options = [*LETTERS[: max(0, len(row) - len(number) - 2)]]
    named = {"question", "answer"} & {cell.lower() for cell in row} or options == row[-len(options) - 1 : -1]
    if len(options) < 2 or row[-1] not in options or named:
        return None
    return (*number, "question", *options, "answer")


def _read_item(layout: BenchmarkLayout, fields: RecordFields, are_texts: Callable[[], bool | None]) -> CapabilityItem:
    """The item without its task, and without an id if the record has none. are_texts: see `_answers_are_texts`."""
    texts = {key: fields.text(key, VERBATIM if layout.strict else TEXT) for key in layout.texts}
    texts |= {key: fields.optional(key) or "" for key in layout.optional_texts}
    context = layout.context.format(**texts) if isinstance(layout.context, str) else layout.context(texts)
    if layout.choices:
        choices = _choices(layout, fields)
    else:
        context, last_word = _split_last_word(layout.texts[0], context, fields)
        choices = (last_word,)
    answer = layout.answer
    if isinstance(answer, str):
        answer = _answer(layout, answer, choices, fields, are_texts)
    if layout.lettered:
        if len(choices) > len(LETTERS):
            fields.wrong(str(layout.choices), f"at most {len(LETTERS)} choices, one letter each", list(choices))
        options = "".join(f"\n{letter}. {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False))
        context, choices = f"{context.strip()}{options}\nAnswer:", tuple(LETTERS[: len(choices)])
    identity = (fields.optional("id") if layout.strict else None) or ""
    _refuse_unshown(layout, fields)
    rule: Rule = "exact" if len(choices) == 1 else layout.rule
    return CapabilityItem("", identity, context, tuple(map(layout.shown, choices)), answer, rule)


def _refuse_unshown(layout: BenchmarkLayout, fields: RecordFields) -> None:
    """Report the texts of a question that the layout does not read."""
    into = f"put its text into {layout.texts[0]}, or remove" if layout.texts else "remove"
    for key in fields.unread():
        value = fields.look(key)
        texts = [one for one in (value if isinstance(value, list) else [value]) if isinstance(one, str)]
        if key.lower() in ASKED and any(char.isalpha() for text in texts for char in text):
            fields.tell(key, f"layout {layout.name} does not show it to the model; {into} the key")


def _choices(layout: BenchmarkLayout, fields: RecordFields) -> tuple[str, ...]:
    if isinstance(layout.choices, str):
        return fields.texts(layout.choices, 1 if layout.strict else 2)
    more = LETTERS[len(layout.choices) :] if layout.more_choices else ""
    further = itertools.takewhile(lambda text: text is not None, map(fields.optional, more))
    return (*map(fields.text, layout.choices), *map(str, further))


def _answers_are_texts(records: Sequence[FileRecord]) -> bool | None:
    """Whether answers such as "2", where the choices are numbers too, are texts of choices (True) or indices (False): what
    every answer of the file can be, if some cannot be the other. None if that does not decide it."""
    texts, indices = [], []
    for record in records:
        layout = first_that_recognises(record.value, LAYOUTS)
        if layout is not None and isinstance(layout.answer, str) and not layout.labels:
            choices = _choices(layout, RecordFields(record.value, record.place))
            value = value_at(record.value, layout.answer)
            texts.append(isinstance(value, str) and choices.count(value) == 1)
            indices.append(_index(value, choices) is not None)
    return all(texts) if all(texts) != all(indices) else None


def _index(value: Any, choices: Sequence[str]) -> int | None:
    """The index that a number, or the digits of one, is among the choices."""
    whole = type(value) in (int, float) and value == value // 1  # 2.0, from a column with missing values
    if whole or (isinstance(value, str) and re.fullmatch(r"[0-9]{1,3}", value)):
        return int(value) if 0 <= int(value) < (len(choices) or len(LETTERS)) else None
    return None


def _answer(
    layout: BenchmarkLayout,
    path: str,
    choices: Sequence[str],
    fields: RecordFields,
    are_texts: Callable[[], bool | None],
) -> int:
    """Index of the right choice, given as a label, a number, its digits (as in tables of the hub), a letter or its text."""
    value = fields.find(path, "the number of the right choice")
    if value is ...:
        return 0
    if layout.labels:
        labels = fields.texts(layout.labels, 2)
        if choices and labels and len(labels) != len(choices):
            fields.wrong(layout.labels, f"{len(choices)} labels, one per choice", labels)
        elif labels and value not in labels:
            fields.wrong(path, f"one of {', '.join(labels)}", value)
        return labels.index(value) if value in labels else 0
    letters = [*LETTERS[: len(choices)]] if layout.lettered else []
    as_index = _index(value, choices)
    as_text = choices.index(value) if isinstance(value, str) and choices.count(value) == 1 else None
    if as_index is not None and as_text is not None and as_index != as_text:
        texts = are_texts()
        if texts is None:
            clear = "letter of the right choice" if layout.lettered else "number of the right choice as a JSON number"
            hint = "these digits are the number of one choice and the text of another"
            fields.wrong(path, f"the {clear} ({hint})", value)
        return as_index if texts is False else as_text
    bare = value.strip(" ().").upper() if isinstance(value, str) else None
    as_letter, loosely = (letters.index(one) if one in letters else None for one in (value, bare))
    found = [index for index in (as_index, as_letter, as_text, loosely) if index is not None]
    if not found:
        hint = " (a split without answers cannot be scored)" if value in NO_ANSWERS else ""
        last = f", 0 to {len(choices) - 1}" if choices else ""
        wanted = f"the number of the right choice{last}, {'its letter ' * layout.lettered}or its text{hint}"
        fields.wrong(path, wanted, value)
    return found[0] if found else 0


def _split_last_word(key: str, text: str, fields: RecordFields) -> tuple[str, str]:
    """(what precedes the last word, the word with its leading space)."""
    split = re.fullmatch(r"(.*\S)(\s+)(\S+)\s*", text, re.DOTALL)
    if split is None:
        if text:
            fields.wrong(key, "two or more words, the last of which is to be predicted", text)
        return "", text
    # A last word on a line of its own is predicted after the line break, not together with it.
    before, gap, word = split.groups()
    return (before, " " + word) if gap == " " else (before + gap, word)
