"""A model of any shape with random weights: no download but that of its configuration, and a tokenizer made of the texts.

Its steps take as long as those of a trained model, and its answers mean nothing.
"""

from collections.abc import Iterable, Iterator

import torch
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from locft.data.requests import EditSet
from locft.data.suites import Suite
from locft.errors import InputError, one_line
from locft.model.models import DTYPES, LOAD_ERRORS, LoadedModel, model_class
from tests.tiny import byte_level_bpe

VOCABULARY = 16384
"""Tokens of the tokenizer, at most: enough that a text has about as many tokens as in a real one."""
LEARNING_RATE = 5e-5
"""So that no training of a large model diverges."""


def configuration(source: str) -> PretrainedConfig:
    """A model's configuration: its folder, a .json file, or a hub id. Raises InputError."""
    try:
        return AutoConfig.from_pretrained(source)
    except LOAD_ERRORS as error:
        raise InputError(
            f"--random-weights {source!r}: expected a folder with config.json, a .json file or a hub id: {one_line(error)}"
        ) from error


def random_model(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Made on the device in this dtype; on the meta device the structure alone. Raises InputError."""
    try:
        with torch.device(device), torch.random.fork_rng(enabled=device.type == "cpu"):
            torch.manual_seed(0)
            model = model_class(config).from_config(config, dtype=dtype)
    except LOAD_ERRORS as error:
        raise InputError(f"--random-weights: a {config.model_type} model cannot be made: {one_line(error)}") from error
    return model.eval().requires_grad_(False)


def random_loaded(config: PretrainedConfig, dtype: str, device: torch.device, texts: Iterable[str]) -> LoadedModel:
    """The same as `load_model` gives a real one, with a tokenizer for these texts."""
    model, name = random_model(config, DTYPES[dtype], device), f"random-{config.model_type}"
    learnt = byte_level_bpe(texts, min(VOCABULARY, config.get_text_config().vocab_size))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt, eos_token="<eos>", pad_token="<eos>")
    return LoadedModel(name, model, tokenizer, f"{name}-{dtype}")


def texts_of(edits: EditSet, suite: Suite) -> Iterator[str]:
    """Everything that is encoded."""
    for request in edits.requests:
        yield from (request.prompt, f" {request.target}", *request.rephrases)
        yield from (other.prompt for other in request.locality)
    for task in suite.tasks:
        for item in task.items:
            yield from (item.context, *(f" {choice}" for choice in item.choices))
    yield from suite.prose
