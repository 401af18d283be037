"""Layouts of edit files: records of any published layout become the same edit requests.

A layout is an entry of `LAYOUTS`, which says where prompt and target are. Everything else (subject, true answers,
rephrases, questions for locality and portability) is found under the names that data sets commonly use for it, whatever
the layout, and in any form: one text or a list, pairs of keys, lists of objects, groups of these.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from locft.data.edit_request import EditRequest, LocalityPrompt, PortabilityPrompt
from locft.data.field_map import FieldMap
from locft.data.record_files import FileRecord, shortened
from locft.data.record_layouts import (
    TEXT,
    FieldType,
    ReadRecords,
    RecordFields,
    RecordLayout,
    first_that_recognises,
    read_with_layout,
    top_level,
    value_at,
)
from locft.errors import InputError, did_you_mean

TrueAnswers = tuple[str, ...]
"""All answers to an edit's prompt that the source gives as true before the edit."""

_REPHRASES = (
    "rephrases", "rephrasings", "para_question*", "para_prompt*",
    *(word + rest for word in ("rephrase", "rephrased", "paraphrase", "paraphrased")
      for rest in ("", "_prompt", "_prompts", "_question", "_questions")),
    "paraphrases",
)  # fmt: skip
_ASKED = ("prompt", "prompts", "question", "questions")


ID_KEYS = ("id", "case_id", "fact_id")


@dataclass(frozen=True)
class QuestionKeys:
    """Keys of questions and of their answers, each of which holds a text or a list."""

    prompt: str
    answers: tuple[str, ...] = ()
    """Key of the one answer, or of one for each prompt ("a|b": the first of these that is there), then keys of its other
    names. Empty: the questions are objects that hold both prompt and answer, in any lists and groups."""


@dataclass(frozen=True, kw_only=True)
class EditLayout(RecordLayout):
    """Paths of an edit's fields in a record. Where a field has several, the first that is filled counts; for true
    answers, rephrases and questions, all do."""

    prompt: str = "prompt"
    target: str = "target"
    more_prompt: str = ""
    """Text that follows the prompt on a line of its own."""
    edits: str = ""
    """Path of the object, or list of objects, with the edits of a record; the rest of the record is about all of them."""
    marked: bool = False
    """Every prompt has a {} that its subject replaces. In other layouts, a prompt may have one."""
    id: tuple[str, ...] = ID_KEYS
    subject: tuple[str, ...] = ("subject", "concept")
    truths: tuple[str, ...] = ("ground_truth", "target_true", "target_old", "true_answer", "old_answer")
    """True answers before the edit, the main one first."""
    rephrases: tuple[str, ...] = _REPHRASES
    locality: tuple[QuestionKeys, ...] = (
        QuestionKeys("locality"),
        QuestionKeys("loc", ("loc_ans",)),
        QuestionKeys("loc_prompt", ("loc_ans|loc_answer",)),
        *(
            QuestionKeys(f"locality_{word}", ("locality_ground_truth|locality_answer|locality_answers",))
            for word in _ASKED
        ),
        # The neighbours of CounterFact were chosen for having the same true answer.
        QuestionKeys("neighborhood_prompts", ("requested_rewrite.target_true",)),
    )
    portability: tuple[QuestionKeys, ...] = (
        QuestionKeys("portability"),
        *(
            QuestionKeys(f"portability_{word}", ("portability_ground_truth|portability_answer|portability_answers",))
            for word in _ASKED
        ),
        QuestionKeys("mhop", ("mhop_ans",)),
        QuestionKeys("questions", ("new_answer", "new_answer_alias")),
        QuestionKeys("sub_question", ("sub_answer",)),
        *(QuestionKeys(f"question_{hops}hop", (f"answer_{hops}hop",)) for hops in range(2, 7)),
    )

    @property
    def required(self) -> tuple[str, ...]:
        inside = f"{self.edits}." if self.edits else ""
        return inside + self.prompt, inside + self.target

    @property
    def optional(self) -> tuple[str, ...]:
        names = (*self.id, *self.subject, *self.truths, *self.rephrases, "locality", "portability")
        return tuple(name for name in names if name not in self.required)

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.required)})"


# fmt: off
LAYOUTS = (  # the first that recognises a record counts
    EditLayout(  # `loc` keeps its "nq question: ", which the published numbers were measured with
        name="zsre", signs=("src",), prompt="src", target="alt", truths=("answers",),
    ),
    EditLayout(  # CounterFact, and MQuAKE with a list of edits in each record
        name="counterfact-original", signs=("requested_rewrite",), edits="requested_rewrite", target="target_new",
        marked=True, rephrases=(*_REPHRASES, "question"),
    ),
    EditLayout(
        name="question-target", never="prompt", signs=("question target_new",), prompt="question", target="target_new",
    ),
    EditLayout(
        name="counterfact", never="target", target="target_new",
        signs=(
            "target_new ground_truth", "target_new case_id", "rephrase_prompt ground_truth", "rephrase_prompt case_id",
        ),
    ),
    EditLayout(
        name="wikibigedit", never="target", target="target_new", signs=("target_new rephrase_prompt",),
    ),
    EditLayout(  # and data sets written like it
        name="knowedit", never="target", target="target_new", signs=("prompt target_new",),
    ),
    EditLayout(name="qaedit", signs=("target rephrase source", "target rephrase locality[].loc")),
    EditLayout(name="own", strict=True, signs=("subject prompt", "subject target", "prompt target")),
    EditLayout(name="wikibio", signs=("text labels",), prompt="text", target="labels"),
    EditLayout(name="wikibigedit-qa", signs=("update ans",), prompt="update", target="ans"),
    EditLayout(name="hallueditbench", signs=("subject object question",), prompt="question", target="object"),
    EditLayout(name="question-answer", signs=("question answer",), prompt="question", target="answer"),
    EditLayout(
        name="instruction", signs=("instruction output",), prompt="instruction", more_prompt="input", target="output",
    ),
    EditLayout(
        name="instruction", signs=("instruction response",), prompt="instruction", more_prompt="context", target="response",
    ),
    *(
        EditLayout(name=f"{prompt}-{target}", signs=(f"{prompt} {target}",), prompt=prompt, target=target)
        for prompt, target in (("prompt", "completion"), ("prompt", "response"), ("query", "response"), ("input", "output"))
    ),
)
# fmt: on

_MARK = "{}"
_PROMPT_KEYS = ("prompt", "question", "loc", "cloze", "New Question")
_ANSWER_KEYS = ("answer", "ground_truth", "loc_ans", "New Answer", "answers", "target", "ans", "expected_answer")
_ALIAS_KEYS = ("answer_alias", "answer_aliases", "aliases")
LIST_KEYS = frozenset(top_level((
    "target_new", "answers", *EditLayout.truths, *_REPHRASES, *(layout.edits for layout in LAYOUTS if layout.edits),
    *(
        key
        for keys in EditLayout.locality + EditLayout.portability
        for key in (keys.prompt, *(name for names in keys.answers for name in names.split("|")))
    ),
)))  # fmt: skip
"""Keys, or patterns of them, that may hold lists or objects, which a table writes into one cell."""


def _stripped(value: Any) -> str | None:
    text = TEXT.read(value)
    return text and text.strip()


def _one_line(value: Any) -> str | None:
    """The text on one line: generation stops at a newline, so an answer of several lines could not be produced."""
    text = TEXT.read(value)
    return text and " ".join(part.strip() for part in text.splitlines() if part.strip())


_STRIPPED, _LINE = FieldType(_stripped), FieldType(_one_line)
_IDENTITY = FieldType(lambda value: _stripped(str(value) if type(value) is int else value), "text or a whole number")


def read_edits(
    records: Sequence[FileRecord], source: str, fields: FieldMap | None
) -> ReadRecords[EditLayout, list[tuple[EditRequest, TrueAnswers]]]:
    """The edits of each of a file's records. Ids are the file's own, "" if it has none; the edits of one record share its id.

    Raises InputError with every problem.
    """
    problems = [record.problem for record in records if record.problem]
    values = [record.value for record in records if not record.problem]
    unmapped = []
    for name, keys in (fields or {}).items() if values else ():
        if missing := [key for key in keys if not any(value_at(value, key) is not None for value in values)]:
            known = f"the keys are {', '.join(values[0])}{did_you_mean(missing[0], values[0])}"
            unmapped.append(f"{source}: map: {name}: no record has {', '.join(missing)} ({known})")
    if unmapped:
        raise InputError(shortened([*problems, *unmapped]))
    return read_with_layout(
        edit_layouts(fields), records, source, _read_record, lambda record: _advice(record.value, source)
    )


def read_marks(records: Sequence[FileRecord], fields: FieldMap | None = None) -> tuple[tuple[str, str], ...]:
    """(id, prompt) of each edit in records that mark edits as no longer in force, read as far as they can be: either is ""
    if there is none. If there is neither, the id is the record's place."""
    layouts = edit_layouts(fields)
    usual = next((layout for layout in layouts if layout.strict), layouts[0])
    marks: list[tuple[str, str]] = []
    for record in records:
        layout = first_that_recognises(record.value, layouts) or usual
        edits = _read_record(layout, RecordFields(record.value, record.place))
        named = [(edit.id, edit.prompt) for edit, _ in edits if edit.id or edit.prompt]
        marks += named or [(record.place, "")]
    return tuple(marks)


def edit_layouts(fields: FieldMap | None = None) -> tuple[EditLayout, ...]:
    """The layouts, with the paths of a field map in place of theirs; a single one if the map says where prompt or target is."""
    if not fields:
        return LAYOUTS
    keys = {"subject": "subject", "id": "id", "ground_truth": "truths", "rephrases": "rephrases"}
    changes: dict[str, Any] = {keys[name]: tuple(fields[name]) for name in keys.keys() & fields.keys()}
    for name in ("locality", "portability"):
        prompts = fields.get(f"{name}.prompt", fields.get(name, ()))
        answers = tuple(fields.get(f"{name}.answer", ()))
        own = [(key,) for key in answers] if len(answers) == len(prompts) else [answers] * len(prompts)
        if prompts:
            changes[name] = tuple(map(QuestionKeys, prompts, own))
    if "prompt" in fields or "target" in fields:
        (prompt,), (target,) = fields.get("prompt", ("prompt",)), fields.get("target", ("target",))
        return (EditLayout(name="map", signs=(prompt, target), prompt=prompt, target=target, **changes),)
    return tuple(replace(layout, **changes) for layout in LAYOUTS)


def _advice(record: Mapping[str, Any], source: str) -> str:
    """Suggests a field map for records like this one, as far as it can be guessed from their keys."""
    texts = [key for key, value in record.items() if isinstance(value, str) and value.strip()]
    texts += [
        f"{key}.{inner}"
        for key, value in record.items() if isinstance(value, Mapping)
        for inner, text in value.items() if isinstance(text, str)
    ]  # fmt: skip
    texts = [key for key in texts if not key.lower().endswith(("id", "type", "source"))]

    def likeliest(words: Sequence[str], but: str = "") -> str:
        near = [key for word in words for key in texts if word in key.lower() and key != but]
        return next((key for key in texts if key in words and key != but), next(iter(near), "KEY"))

    prompt = likeliest(("prompt", "question", "query", "instruction", "input", "cloze", "text", "src"))
    target = likeliest(
        ("target", "new", "answer", "output", "response", "completion", "chosen", "label", "object", "alt"), prompt
    )
    return (
        f"; if the edit is stored under other keys, name them: edits: {{source: {source}, map: {{prompt: {prompt}, "
        f"target: {target}}}}} in a study file, or --map prompt={prompt} --map target={target}"
    )


def _read_record(layout: EditLayout, fields: RecordFields) -> list[tuple[EditRequest, TrueAnswers]]:
    """The edits of a record, each with its true answers. Rephrases and questions for the whole record go to the first."""
    if not layout.edits:
        return [_read_edit(layout, fields, fields, (fields,))]
    value = fields.look(layout.edits)
    several = isinstance(value, list) and value
    edits: list[tuple[EditRequest, TrueAnswers]] = []
    for index, item in enumerate(value if several else [value]):
        at = f"{layout.edits}[{index}]" if several else layout.edits
        if isinstance(item, Mapping):
            inside = fields.inside(at, item, ())
            edits.append(_read_edit(layout, inside, fields, (inside,) if edits else (inside, fields)))
        else:
            fields.wrong(at, "an object", item)
    return edits


def _read_edit(
    layout: EditLayout, fields: RecordFields, record: RecordFields, holders: Sequence[RecordFields]
) -> tuple[EditRequest, TrueAnswers]:
    """fields: the object with the edit. holders: the objects with rephrases and questions for it."""
    truths = tuple(text for name in layout.truths for text in _answers(fields, name, fields.look(name)))
    subject = _first(layout.subject, fields, _STRIPPED)

    def asked(keys: Sequence[QuestionKeys], scored: bool) -> list[tuple[str, tuple[str, ...]]]:
        return [found for holder in holders for one in keys for found in _questions(holder, one, scored)]

    edit = EditRequest(
        id=_first(layout.id, record, _IDENTITY),
        subject=subject,
        prompt=_prompt(layout, fields, subject),
        target=_target(layout.target, fields),
        ground_truth=truths[0] if truths else None,
        rephrases=tuple(_filled(text, subject) for holder in holders for text in _rephrases(layout, holder)),
        locality=tuple(
            LocalityPrompt(text, answers[0] if answers else None) for text, answers in asked(layout.locality, False)
        ),
        portability=tuple(PortabilityPrompt(text, answers) for text, answers in asked(layout.portability, True)),
    )
    return edit, truths


def _first(paths: Sequence[str], fields: RecordFields, kind: FieldType) -> str:
    return next((text for path in paths if (text := fields.optional(path, kind)) is not None), "")


def _prompt(layout: EditLayout, fields: RecordFields, subject: str) -> str:
    prompt = fields.text(layout.prompt, _STRIPPED)
    if more := fields.optional(layout.more_prompt, _STRIPPED):
        prompt = f"{prompt}\n{more}"
    if layout.marked and prompt:
        fields.text(layout.subject[0], _STRIPPED)
        if _MARK not in prompt:
            expected = f"{_MARK} where the subject goes (this prompt is already filled in, as in a results file)"
            fields.wrong(layout.prompt, expected, prompt)
    return prompt.replace(_MARK, subject) if layout.marked else _filled(prompt, subject)


def _filled(text: str, subject: str) -> str:
    """The text with the subject in place of its only {}, unless it names the subject already."""
    return text.replace(_MARK, subject) if subject and text.count(_MARK) == 1 and subject not in text else text


def _target(path: str, fields: RecordFields) -> str:
    """The target: a text, an object with the text under "str", or, except in our own layout, a list of one text."""
    value = fields.look(path)
    if isinstance(value, list) and len(value) == 1 and not fields.strict:
        path, value = f"{path}[0]", value[0]
    elif isinstance(value, Mapping):
        path, value = f"{path}.str", value.get("str")
    if isinstance(value, str) and "\n" in value.strip():
        fields.leave_out(path, "(its line breaks: an answer ends at the first one)")
    if value is None and not path.endswith("]"):
        return fields.text(path, _LINE)  # which distinguishes null from a missing field
    return fields.checked(path, _digits(fields, value), _LINE)


def _digits(fields: RecordFields, value: Any) -> Any:
    """Except in our own layout, a whole number as its digits, such as a year in a table; anything else as it is."""
    whole = type(value) in (int, float) and not fields.strict and value == value // 1
    return str(int(value)) if whole else value


def _rephrases(layout: EditLayout, fields: RecordFields) -> Iterator[str]:
    for name in layout.rephrases:
        for path in (key for key in fields.value if fnmatchcase(str(key), name)) if "*" in name else (name,):
            yield from _texts(fields, path, fields.look(path))


def _questions(fields: RecordFields, keys: QuestionKeys, scored: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Prompts and their answers. scored: a question without an answer is of no use and is left out."""
    value = fields.look(keys.prompt)
    if not keys.answers:
        yield from _in_objects(fields, keys.prompt, value, scored)
        return
    main = next((key for key in keys.answers[0].split("|") if fields.look(key) is not None), "")
    given = fields.look(main)
    if value is None or value == []:
        return
    if scored and given is None:
        return fields.leave_out(keys.prompt, "without an answer")
    aliases = [text for name in keys.answers[1:] for text in _answers(fields, name, fields.look(name))]
    count = len(value) if isinstance(value, list) else 1
    one_each = isinstance(given, list) and isinstance(value, list) and (count > 1 or len(given) == 1)
    if one_each and len(given) != count:
        return fields.wrong(main, f"{count} answers, one for each of {keys.prompt}", given)
    for index in range(count):
        at, inside = (f"[{index}]", value[index]) if isinstance(value, list) else ("", value)
        answer = _answers(fields, main + at, given[index]) if one_each else _answers(fields, main, given)
        if answer or not scored:
            for text in _texts(fields, keys.prompt + at, inside):
                yield text, (*answer, *aliases)
        elif inside:
            fields.leave_out(keys.prompt + at, "without an answer")


def _in_objects(fields: RecordFields, at: str, value: Any, scored: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The questions in a value: objects, lists and groups of objects, or texts."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _in_objects(fields, f"{at}[{index}]", item, scored)
    elif isinstance(value, Mapping):
        inside = fields.inside(at, value, (*_PROMPT_KEYS, *_ANSWER_KEYS, *_ALIAS_KEYS))
        prompt = next((key for key in _PROMPT_KEYS if key in value), None)
        if prompt is not None:
            yield from _questions(inside, QuestionKeys(prompt, ("|".join(_ANSWER_KEYS), *_ALIAS_KEYS)), scored)
        elif value and all(item is None or isinstance(item, list | Mapping) for item in value.values()):
            for group, item in value.items():
                yield from _in_objects(fields, f"{at}.{group}", item, scored)
        elif value and fields.strict:
            inside.text(_PROMPT_KEYS[0], _STRIPPED)
    elif isinstance(value, str) and scored:
        return
    elif value is not None:
        for text in _texts(fields, at, value):
            yield text, ()


def _texts(fields: RecordFields, path: str, value: Any, kind: FieldType = _STRIPPED) -> list[str]:
    """The texts in a value: a text, an object with the text under "str", or lists of these. Except in our own layout,
    blank texts count as absent, and answers may be whole numbers."""
    if isinstance(value, list):
        return [text for index, item in enumerate(value) for text in _texts(fields, f"{path}[{index}]", item, kind)]
    if isinstance(value, Mapping) and "str" in value:
        return _texts(fields, f"{path}.str", value["str"], kind)
    if fields.is_absent(value):
        return []
    text = fields.checked(path, _digits(fields, value) if kind is _LINE else value, kind)
    return [text] if text else []


def _answers(fields: RecordFields, path: str, value: Any) -> list[str]:
    """An answer and its other names."""
    return _texts(fields, path, value, _LINE)
