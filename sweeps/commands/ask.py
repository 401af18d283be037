"""The command `locft ask`: what a model says to a prompt, before and after an edit. Registered in `sweeps.commands.cli`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated

import typer

from locft.errors import InputError
from sweeps.commands.console import print_json, say
from sweeps.commands.options import DELTA_HELP, JsonOption, LoadOptions, ModelArgument, UriOption

if TYPE_CHECKING:
    from locft.model.models import LoadedModel


@dataclass(frozen=True)
class Asked:
    """A prompt in a format, and the answers to it."""

    prompt: str
    format: str
    before: str
    after: str | None
    """None without a delta."""


def ask(
    model: ModelArgument,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to go on with, or questions.")],
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
    before, after = list(_answers(loaded, prompts, tokens)), None
    if change:
        with applied(loaded, change):
            after = list(_answers(loaded, prompts, tokens))
    found = [
        Asked(prompt, form, answer, after[place][2] if after else None)
        for place, (prompt, form, answer) in enumerate(before)
    ]
    if as_json:
        position = change.position if change else None
        return print_json({"model": model, "position": position, "answers": [asdict(asked) for asked in found]})
    for place, asked in enumerate(found):
        if place == 0 or found[place - 1].prompt != asked.prompt:
            say(("\n" if place else "") + asked.prompt, "bold")
        for label, answer in (("before", asked.before), ("after", asked.after)):
            if answer is not None:
                say("  ".join(["", f"{asked.format:<4}", *([f"{label:<6}"] if change else []), answer]))


def _answers(loaded: "LoadedModel", prompts: list[str], tokens: int) -> Iterator[tuple[str, str, str]]:
    """Prompt, format and answer, for every format that the tokenizer has. Raises InputError for prompts that do not fit."""
    from locft.measure.generation import line_answers
    from locft.train.formats import CHAT, RAW, available

    forms = available(loaded.tokenizer, (RAW, CHAT))
    answers = [line_answers(loaded, prompts, tokens, form) for form in forms]
    for prompt, *of_forms in zip(prompts, *answers, strict=True):
        yield from ((prompt, form, answer) for form, answer in zip(forms, of_forms, strict=True))
