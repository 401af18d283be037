"""Layouts of edit files: records of any published layout become the same edit requests.

A new layout is one more entry of `LAYOUTS`: where each field of an `EditRequest` is in its records.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, TypeAdapter

from locft.data.edit_request import EditRequest, LocalityPrompt
from locft.data.record_files import FileRecord
from locft.data.record_layouts import FieldType, RecordFields, RecordLayout, Text, read_with_layout


@dataclass(frozen=True, kw_only=True)
class EditLayout(RecordLayout):
    """Paths of an edit's fields in a record; "" where the layout has no such field."""

    subject: str = "subject"
    prompt: str = "prompt"
    subject_mark: str = ""
    """Text in the prompt in whose place the subject goes."""
    target: str = "target"
    id: str = ""
    ground_truth: str = ""
    """The answer before the edit, a text."""
    truths: str = ""
    """Every true answer, a list of texts with the main one first; in place of `ground_truth`."""
    truth_required: bool = False
    rephrases: str = ""
    locality: tuple[str, str] = ("", "")
    """Prompts that the edit must not touch, and the answers to them."""
    ignored: tuple[str, ...] = ()
    """Fields that tell the layout from others and are not read."""

    @property
    def required(self) -> tuple[str, ...]:
        return (self.subject, self.prompt, self.target, *((self.ground_truth,) if self.truth_required else ()))

    @property
    def optional(self) -> tuple[str, ...]:
        paths = (self.id, *self.ignored, self.ground_truth, self.rephrases, self.truths, *self.locality)
        return tuple(path for path in paths if path and path not in self.required)


# fmt: off
LAYOUTS = (  # the first that recognises a record has it
    EditLayout(
        name="zsre", signs=("src",), prompt="src", target="alt", rephrases="rephrase",
        truths="answers",  # `pred` is another model's answer and `cond` repeats it: neither is a truth
        locality=("loc", "loc_ans"),  # `loc` keeps its "nq question: ", with which the published numbers were made
    ),
    EditLayout(
        name="counterfact-original", signs=("requested_rewrite",), id="case_id",
        subject="requested_rewrite.subject", prompt="requested_rewrite.prompt", subject_mark="{}",
        target="requested_rewrite.target_new.str",
        ground_truth="requested_rewrite.target_true.str", truth_required=True,
        rephrases="paraphrase_prompts",
        # The neighbours were chosen for having the same true answer.
        locality=("neighborhood_prompts[]", "requested_rewrite.target_true.str"),
    ),
    EditLayout(
        name="counterfact", never="target", id="case_id", target="target_new",
        signs=(
            "target_new ground_truth", "target_new case_id", "rephrase_prompt ground_truth", "rephrase_prompt case_id",
        ),
        ground_truth="ground_truth", truth_required=True,
        rephrases="rephrase_prompt", locality=("locality_prompt", "locality_ground_truth"),
    ),
    EditLayout(
        name="wikibigedit", never="target", signs=("target_new", "rephrase_prompt"), id="case_id", target="target_new",
        ground_truth="ground_truth",  # published without one
        rephrases="rephrase_prompt", locality=("locality_prompt", "locality_ground_truth"),
    ),
    EditLayout(
        name="qaedit", signs=("target rephrase source", "target rephrase locality[].loc"), id="id", ignored=("source",),
        rephrases="rephrase", locality=("locality[].loc", "locality[].loc_ans"),
    ),
    EditLayout(
        name="own", strict=True, signs=("subject prompt", "subject target", "prompt target"), id="id",
        ground_truth="ground_truth", rephrases="rephrases", locality=("locality[].prompt", "locality[].answer"),
    ),
)
# fmt: on


def _one_line(text: str) -> str:
    """Generation stops at a newline, so no answer of several lines could be produced."""
    return " ".join(part.strip() for part in text.splitlines() if part.strip())


def _present(items: tuple[str | None, ...]) -> tuple[str, ...]:
    return tuple(item for item in items if item is not None)


_Stripped = Annotated[Text, AfterValidator(str.strip)]
_Line = Annotated[Text, AfterValidator(_one_line)]
_NoneIfBlank = BeforeValidator(lambda value: None if isinstance(value, str) and not value.strip() else value)
_ListIfText = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)

_STRIPPED = FieldType("text", TypeAdapter(_Stripped), "")
_LINE = FieldType("text", TypeAdapter(_Line), "")
_IDENTITY = FieldType(
    "text or a whole number",
    TypeAdapter(Annotated[_Stripped, BeforeValidator(lambda value: str(value) if type(value) is int else value)]),
    "",
)
_TEXTS: FieldType[tuple[str, ...]] = FieldType("a list of texts", TypeAdapter(tuple[_Stripped, ...]), ())
_TEXT_OR_TEXTS: FieldType[tuple[str, ...]] = FieldType(
    "a list of texts",
    TypeAdapter(
        Annotated[tuple[Annotated[_Stripped | None, _NoneIfBlank], ...], _ListIfText, AfterValidator(_present)]
    ),
    (),
)


def read_edits(
    records: Sequence[FileRecord], source: str, earlier_problems: Sequence[str] = ()
) -> tuple[str, list[EditRequest], list[tuple[str, ...]]]:
    """(layout, edits, true answers of each edit) of a file's records. Ids are the file's own, "" if it has none.

    Raises InputError with every problem; `earlier_problems` are those found before.
    """
    layout, edits = read_with_layout(LAYOUTS, records, source, _read_edit, earlier_problems)
    return layout.name, [edit for edit, _ in edits], [truths for _, truths in edits]


def _read_edit(layout: EditLayout, fields: RecordFields) -> tuple[EditRequest, tuple[str, ...]]:
    subject = fields.get(layout.subject, _STRIPPED)
    prompt = fields.get(layout.prompt, _STRIPPED)
    if layout.subject_mark and prompt:
        if layout.subject_mark not in prompt:
            fields.wrong(layout.prompt, f"{layout.subject_mark} where the subject goes", prompt)
        prompt = prompt.replace(layout.subject_mark, subject)
    target = fields.get(layout.target, _LINE)
    truth = (fields.get if layout.truth_required else fields.optional)(layout.ground_truth, _LINE)
    known_truths = fields.optional(layout.truths, _TEXT_OR_TEXTS)
    truths = _present((truth, *map(_one_line, known_truths or ())))
    edit = EditRequest(
        id=fields.optional(layout.id, _IDENTITY) or "",
        subject=subject,
        prompt=prompt,
        target=target,
        ground_truth=truths[0] if truths else None,
        rephrases=fields.optional(layout.rephrases, _texts(fields)) or (),
        locality=_read_locality(layout, fields),
    )
    return edit, truths


def _read_locality(layout: EditLayout, fields: RecordFields) -> tuple[LocalityPrompt, ...]:
    prompt, answer = layout.locality
    list_path, is_list, prompt_inside = prompt.partition("[].")
    pairs: list[tuple[str | None, str | None]]
    if is_list:
        answer_inside = answer.removeprefix(list_path + "[].")
        pairs = []
        for item in fields.each(list_path, known=(prompt_inside, answer_inside)):
            read = item.get if fields.strict else item.optional
            pairs.append((read(prompt_inside, _STRIPPED), item.optional(answer_inside, _LINE)))
    elif prompt.endswith("[]"):
        texts = fields.optional(prompt.removesuffix("[]"), _texts(fields)) or ()
        pairs = [(text, fields.optional(answer, _LINE)) for text in texts]
    else:
        pairs = [(fields.optional(prompt, _STRIPPED), fields.optional(answer, _LINE))]
    return tuple(LocalityPrompt(text, of_data_set) for text, of_data_set in pairs if text is not None)


def _texts(fields: RecordFields) -> FieldType[tuple[str, ...]]:
    return _TEXTS if fields.strict else _TEXT_OR_TEXTS
