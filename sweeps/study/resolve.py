"""From a study to everything it names: the model's structure, the edits, the capability items, and the plan.

Reads, never runs or writes. Imports inside functions keep PyTorch and transformers out of commands that need neither.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Any

from locft.cache import digest
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

SENTENCE_TOKENS = 12
"""Usual length of a generated answer in tokens, for estimates."""


def prepare(study: Study) -> PreparedStudy:
    """Resolve a study. Raises one InputError with the problems of model, edits and capability files together."""
    from torch import Size

    from locft.curvature import factor_bytes
    from locft.limits import check_limits
    from locft.model.models import folder_fingerprint, folder_setup, load_structure, load_tokenizer, model_folder
    from locft.model.positions import list_positions, n_layers
    from locft.model.precision import training_precision

    problems: list[str] = []
    modules = defaultdict[int, list[str]](list)
    with _problems_into(problems):
        structure = load_structure(study.model)
        positions = list_positions(structure)
        for info in positions:
            modules[info.position.layer].append(info.position.module)
        check_against_model(study, n_layers(structure), modules)
    with _problems_into(problems):
        edits = study.edits.load()
        if beyond := [count for count in study.space.edit_count if count > len(edits.requests)]:
            there = f"{study.edits.source} has {len(edits.requests):,} edits here"
            raise InputError(f"space.edit_count: got {max(beyond):,}, but {there}; expected no more")
    with _problems_into(problems):
        suite = study.capability.load()
    if problems:
        raise InputError(problems)
    tokenizer = load_tokenizer(study.model)
    study, left_out = _with_formats_of(study, tokenizer)
    notices = (*(suite.notices if suite else ()), *left_out, *idle_axes(study))
    sizes = {str(info.position): info.size for info in positions}
    head, folder = structure.get_output_embeddings(), model_folder(study.model)
    facts = StudyFacts(
        model_fingerprint=folder_fingerprint(folder),
        model_setup=folder_setup(folder),
        data_fingerprint=_data_fingerprint(edits, suite, study),
        n_layers=n_layers(structure),
        modules_by_layer=dict(modules),
        n_edits=len(edits.requests),
        most_asked=study.edits.asked,
        precision=training_precision(study.trial_device) if study.precision == "auto" else study.precision,
        parameters=sum(parameter.numel() for parameter in structure.parameters()),
        layer_parameters=int(fmean(size for position, size in sizes.items() if position.endswith(".layer"))),
        head_parameters=head.weight.numel() if head is not None else 0,
        vocabulary=head.weight.shape[0] if head is not None else len(tokenizer),
        trained_parameters=sizes,
        factor_bytes={
            str(info.position): sum(factor_bytes(Size(shape)) for shape in info.shapes) for info in positions
        },
        **_token_counts(tokenizer, edits, suite, study, partial(check_limits, structure, tokenizer, study.model)),
    )
    return PreparedStudy(study, facts, make_plan(study, facts), edits, suite, notices)


@contextmanager
def _problems_into(problems: list[str]) -> Iterator[None]:
    """Collects the problems of an InputError instead of raising it."""
    try:
        yield
    except InputError as error:
        problems += error.problems


def _with_formats_of(study: Study, tokenizer: "PreTrainedTokenizerBase") -> tuple[Study, tuple[str, ...]]:
    """The study without the formats that the model's tokenizer lacks, and notices of what was left out."""
    trained = [parse_formats(text) for text in study.space.train_formats]
    found = dict.fromkeys(",".join(available(tokenizer, formats)) for formats in trained)
    space = study.space.model_copy(update={"train_formats": tuple(found)})
    changed = study.model_copy(update={"space": space, "ask_formats": asked(tokenizer, study.ask_formats)})
    given = {"space.train_formats": sum(trained, ()), "ask_formats": study.ask_formats}
    return changed, no_chat(study.model, tokenizer, given)


def no_chat(model: str, tokenizer: "PreTrainedTokenizerBase", given: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The notice that the chat format is left out, if the tokenizer lacks it. given: fields or options, and their formats."""
    named = "" if tokenizer.chat_template else " and ".join(name for name, formats in given.items() if CHAT in formats)
    return (f"{named}: the tokenizer of {model} has no chat template, so {CHAT} is left out",) if named else ()


def _data_fingerprint(edits: "EditSet", suite: "Suite | None", study: Study) -> str:
    """Formats are hashed only if they are not raw alone, and a sample only if there is one, so that earlier ids stay valid."""
    tokens = study.capability.prose_tokens
    parts: list[Any] = [edits.fingerprint, suite.fingerprint if suite else None, tokens if suite else None]
    parts += [] if tuple(study.ask_formats) == (RAW,) else [list(study.ask_formats)]
    parts += [{"asked": study.edits.asked}] if study.edits.asked and study.edits.asked < len(edits.requests) else []
    return digest(json.dumps(parts))


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

    requests = edits.requests
    places = every_asked_place(study.space.edit_count, len(requests), study.edits.asked)
    asked = requests if places is None else [requests[at] for at in places]
    rephrased = [prompt for request in asked for prompt in request.rephrases]
    rephrased += [follows.prompt for request in asked for follows in request.portability]
    questions = [unrelated.prompt for request in asked for unrelated in request.locality]
    for form in study.ask_formats:
        questions += rows(form, asked) + [put(tokenizer, prompt, form)[0] for prompt in rephrased]
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
