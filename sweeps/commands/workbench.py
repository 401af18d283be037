"""What a command needs to measure an edit: the model, the edits and the capability items, loaded and checked together."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from analysis.stats.wording import plural, seconds
from locft.errors import InputError
from sweeps.commands.console import notice
from sweeps.commands.options import FORMATS, LoadOptions

if TYPE_CHECKING:
    from locft.data.edit_request import EditRequest
    from locft.data.requests import EditSet
    from locft.data.suites import Suite
    from locft.model.models import LoadedModel
    from locft.workbench import Workbench
    from sweeps.study.schema import Capability

BYTES = 4
"""Typical length of a token in UTF-8."""


def workbench(
    model: str,
    load: LoadOptions,
    requests: "EditSet",
    capability: "Capability",
    ask_formats: Sequence[str],
    *,
    fingerprint: str | None,
) -> "Workbench":
    """Load everything and measure the unedited model. A notice says if a format is left out.

    fingerprint: the one the model must have; None accepts any. Raises InputError for another model.
    """
    from locft.model.delta import require_base
    from locft.train.formats import asked
    from locft.workbench import Workbench
    from sweeps.study.resolve import no_chat

    suite = capability.load()
    loaded = load.load(model)
    if fingerprint is not None:
        require_base("the edit, or the position or trial it repeats", fingerprint, model, loaded.fingerprint)
    left_out = no_chat(model, loaded.tokenizer, {"--ask-formats": ask_formats})
    notice(*requests.sentences(), *(suite.notices if suite else ()), *left_out)
    formats = asked(loaded.tokenizer, ask_formats)
    items = f" and {sum(len(task.items) for task in suite.tasks):,} capability items" if suite else ""
    notice(
        f"measuring the unedited {model}: {plural(len(requests.requests), 'edit')} in {', '.join(formats)}{items}"
        f"{_time(loaded, requests.requests, len(formats), suite)}"
    )
    return Workbench.prepare(loaded, requests, suite, capability.prose_tokens, ask_formats=formats)


def _time(loaded: "LoadedModel", requests: Sequence["EditRequest"], formats: int, suite: "Suite | None") -> str:
    """How long the measurement will take, as the end of a sentence; empty on GPUs, where no rate is known."""
    import torch

    from locft.measure.generation import NEW_TOKENS
    from locft.model.precision import training_precision
    from sweeps.study.estimate import reading_seconds

    if loaded.model.device.type != "cpu":
        return ""
    asked = [
        text for one in requests for text in (one.prompt, *one.rephrases, *(each.prompt for each in one.portability))
    ]
    unrelated = [each.prompt for one in requests for each in one.locality]
    items = [item for task in (suite.tasks if suite else ()) for item in task.items]
    choices = [context + choice for item in items for context, choice in item.texts]
    tokens = sum(len(text.encode()) // BYTES + NEW_TOKENS for text in asked * formats + unrelated)
    tokens += sum(len(text.encode()) for text in choices) // BYTES
    tokens += sum(item.generation.tokens for item in items if item.generation)
    found = reading_seconds(tokens, loaded.model.num_parameters(), training_precision("cpu"), torch.get_num_threads())
    return f", about {seconds(1 + found)} on an otherwise idle machine"


def asked_formats(given: str | None) -> tuple[str, ...]:
    """The formats that --ask-formats names, or the default ones. Raises InputError."""
    from sweeps.study.schema import read_formats

    try:
        return read_formats(FORMATS if given is None else given)
    except InputError as error:
        raise InputError(f"--ask-formats: {error}") from None
