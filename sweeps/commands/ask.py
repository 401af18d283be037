"""The command `locft ask`: what a model says to a prompt, before and after an edit. Registered in `sweeps.commands.cli`."""

from typing import TYPE_CHECKING, Annotated

import typer

from locft.errors import InputError
from sweeps.commands.console import print_json, say
from sweeps.commands.options import DELTA_HELP, JsonOption, LoadOptions, ModelArgument, UriOption

if TYPE_CHECKING:
    from locft.model.models import LoadedModel


def ask(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue, or questions.")],
    load: LoadOptions,
    delta: Annotated[str | None, typer.Option(help=f"{DELTA_HELP} Its answers stand beside the model's own.")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Length limit of an answer.")] = 64,
    tracking_uri: UriOption = None,
    as_json: JsonOption = False,
) -> None:
    """Ask MODEL each PROMPT, as it is and through the chat template, before and after an edit.

    Answers are greedy and end with their line.
    """
    from locft.model.delta import applied
    from sweeps.tracking.registry import load_delta

    if empty := [number for number, prompt in enumerate(prompts, 1) if not prompt.strip()]:
        raise InputError(f"PROMPT {', '.join(map(str, empty))}: got nothing, expected a text")
    change = load_delta(delta, tracking_uri) if delta else None
    loaded = load.load(model)
    if change:
        change.require_base(model, loaded.fingerprint)
    answers = _answers(loaded, prompts, tokens, "before")
    if change:
        with applied(loaded, change):
            after = _answers(loaded, prompts, tokens, "after")
        answers = [{**one, **other} for one, other in zip(answers, after, strict=True)]
    if as_json:
        position = change.position if change else None
        return print_json(
            {"model": model, "position": position, "answers": [{"after": None, **one} for one in answers]}
        )
    for place, one in enumerate(answers):
        if place == 0 or answers[place - 1]["prompt"] != one["prompt"]:
            say(("\n" if place else "") + one["prompt"], "bold")
        for label in ("before", "after") if change else ("before",):
            say("  ".join(["", f"{one['format']:<4}", *([f"{label:<6}"] if change else []), one[label]]))


def _answers(loaded: "LoadedModel", prompts: list[str], tokens: int, label: str) -> list[dict[str, str]]:
    """prompt, format and answer (under `label`), for every format of the tokenizer. Raises InputError for prompts that do not
    fit."""
    from locft.measure.generation import line_answers
    from locft.train.formats import CHAT, RAW, available

    forms = available(loaded.tokenizer, (RAW, CHAT))
    by_form = [line_answers(loaded, prompts, tokens, form) for form in forms]
    return [
        {"prompt": prompt, "format": form, label: answer}
        for prompt, *answers in zip(prompts, *by_form, strict=True)
        for form, answer in zip(forms, answers, strict=True)
    ]
