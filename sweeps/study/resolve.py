"""From a study to everything it names: the model's structure, the edits, the capability items, and the plan.

Reads, never runs or writes. Imports inside functions keep PyTorch and transformers out of commands that need neither.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from locft.errors import InputError
from locft.train.formats import CHAT, RAW, asked, available, parse_formats, put
from sweeps.study.plan import PreparedStudy, check_against_model, idle_axes, make_plan
from sweeps.study.schema import Study
from sweeps.study.trial_types import StudyFacts, every_asked_place

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from locft.data.edit_request import EditRequest
    from locft.data.requests import EditSet
    from locft.data.suites import Suite

T = TypeVar("T")

SENTENCE_TOKENS = 12
"""Usual length of a generated answer in tokens, for estimates."""


def prepare(study: Study) -> PreparedStudy:
    """Resolve a study. Raises one InputError with the problems of model, edits and capability files together."""
    from locft.limits import check_limits
    from locft.model.models import folder_fingerprint, folder_setup, load_structure, load_tokenizer, model_folder
    from locft.model.positions import list_positions, n_layers
    from locft.model.precision import training_precision

    problems: list[str] = []

    def attempt(step: Callable[[], T]) -> T | None:
        try:
            return step()
        except InputError as error:
            problems.extend(error.problems)
            return None

    structure = attempt(lambda: load_structure(study.model))
    positions = attempt(lambda: list_positions(structure)) if structure is not None else None
    modules: dict[int, list[str]] = {}
    for info in positions or ():
        modules.setdefault(info.position.layer, []).append(info.position.module)
    if positions:
        attempt(lambda: check_against_model(study, n_layers(structure), modules))
    named, wanted = study.edits, study.capability
    edits = attempt(named.load)
    if edits:
        attempt(lambda: _check_counts(study, len(edits.requests)))
    suite = attempt(wanted.load)
    if problems:
        raise InputError(problems)
    tokenizer = load_tokenizer(study.model)
    study, left_out = _with_formats_of(study, tokenizer)
    notices = (*(suite.notices if suite else ()), *left_out, *idle_axes(study))
    sizes = {str(info.position): info.size for info in positions}
    layer_sizes = [size for position, size in sizes.items() if position.endswith(".layer")]
    head = structure.get_output_embeddings()
    folder = model_folder(study.model)
    facts = StudyFacts(
        model_fingerprint=folder_fingerprint(folder),
        model_setup=folder_setup(folder),
        data_fingerprint=_data_fingerprint(edits, suite, study),
        n_layers=n_layers(structure),
        modules_by_layer=modules,
        n_edits=len(edits.requests),
        most_asked=named.asked,
        precision=training_precision(study.trial_device) if study.precision == "auto" else study.precision,
        parameters=sum(parameter.numel() for parameter in structure.parameters()),
        layer_parameters=sum(layer_sizes) // len(layer_sizes),
        head_parameters=head.weight.numel() if head is not None else 0,
        vocabulary=head.weight.shape[0] if head is not None else len(tokenizer),
        trained_parameters=sizes,
        **_token_counts(tokenizer, edits, suite, study, partial(check_limits, structure, tokenizer, study.model)),
    )
    return PreparedStudy(study, facts, make_plan(study, facts), edits, suite, notices)


def _with_formats_of(study: Study, tokenizer: "PreTrainedTokenizerBase") -> tuple[Study, tuple[str, ...]]:
    """The study without the formats that the model's tokenizer lacks, and notices of what was left out."""
    given = {
        "space.train_formats": [parse_formats(text) for text in study.space.train_formats],
        "ask_formats": [study.ask_formats],
    }
    trained = [",".join(available(tokenizer, formats)) for formats in given["space.train_formats"]]
    space = study.space.model_copy(update={"train_formats": tuple(dict.fromkeys(trained))})
    changed = study.model_copy(update={"space": space, "ask_formats": asked(tokenizer, study.ask_formats)})
    lacking = (
        [] if tokenizer.chat_template else [name for name, texts in given.items() if any(CHAT in t for t in texts)]
    )
    return changed, no_chat(study.model, lacking)


def no_chat(model: str, fields: Sequence[str]) -> tuple[str, ...]:
    """The notice that the chat format is left out. fields: the fields or options that name it; if none does, there is no notice."""
    named = " and ".join(fields)
    return (f"{named}: the tokenizer of {model} has no chat template, so {CHAT} is left out",) if fields else ()


def _check_counts(study: Study, edits: int) -> None:
    """Raises InputError if a trial would take more edits than there are."""
    if beyond := [count for count in study.space.edit_count if count > edits]:
        raise InputError(
            f"space.edit_count: got {max(beyond):,}, but {study.edits.source} has {edits:,} edits here; expected no more"
        )


def _data_fingerprint(edits: "EditSet", suite: "Suite | None", study: Study) -> str:
    """Formats are hashed only if they are not raw alone, and a sample only if there is one, so that earlier ids stay valid."""
    tokens = study.capability.prose_tokens
    parts: list[Any] = [edits.fingerprint, suite.fingerprint if suite else None, tokens if suite else None]
    parts += [] if tuple(study.ask_formats) == (RAW,) else [list(study.ask_formats)]
    parts += [{"asked": study.edits.asked}] if study.edits.asked and study.edits.asked < len(edits.requests) else []
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _token_counts(
    tokenizer: "PreTrainedTokenizerBase",
    edits: "EditSet",
    suite: "Suite | None",
    study: Study,
    check: Callable[[list[tuple[list[int], int]]], None],
) -> dict[str, Any]:
    """Tokens that training and measuring read, for the estimate. check: takes pairs of a text's tokens and the number of tokens
    that may be generated after it."""
    from locft.measure.generation import NEW_TOKENS

    def count(texts: list[str], new_tokens: int = 0) -> int:
        ids = tokenizer(texts)["input_ids"] if texts else []
        check([(one, new_tokens) for one in ids])
        return sum(map(len, ids))

    def rows(form: str, edits: "Sequence[EditRequest]") -> list[str]:
        return [f"{put(tokenizer, request.prompt, form)[0]} {request.target}." for request in edits]

    def answered(form: str) -> list[str]:
        return rows(form, asked) + [put(tokenizer, prompt, form)[0] for prompt in rephrased]

    requests = edits.requests
    places = every_asked_place(study.space.edit_count, len(requests), study.edits.asked)
    asked = requests if places is None else [requests[at] for at in places]
    rephrased = [prompt for request in asked for prompt in request.rephrases]
    rephrased += [follows.prompt for request in asked for follows in request.portability]
    questions = [unrelated.prompt for request in asked for unrelated in request.locality]
    questions += [question for form in study.ask_formats for question in answered(form)]
    items = [item for task in (suite.tasks if suite else ()) for item in task.items]
    choices = [context + choice for item in items for context, choice in item.texts]
    trained = {form for text in study.space.train_formats for form in parse_formats(text)}
    raw = count(rows(RAW, requests))
    return {
        "edit_tokens": raw,
        "evaluation_tokens": count(questions, NEW_TOKENS) + SENTENCE_TOKENS * len(questions),
        "capability_tokens": count(choices) + (2 * study.capability.prose_tokens if suite else 0),
        "generated_tokens": sum(item.generation.tokens for item in items if item.generation),
        "n_asked": len(asked),
        "row_sizes": {form: count(rows(form, requests)) / raw for form in sorted(trained - {RAW})},
    }
