"""Text on which curvature is measured, and that prefixes to prompts and guards are taken from; drift never is.

A part of it the model writes itself, in its own languages and styles. The rest is the same for every model: short passages of many
kinds (`locft/data/passages.txt`), since a small or specialised model left to itself writes little that resembles what it is used
on, and what curvature has not seen is not protected (docs/methods.md, "What curvature is measured on").

Legend: B samples, T tokens.
"""

import json
import logging
import math
import random
from collections.abc import Collection, Sequence
from importlib.resources import files
from pathlib import Path

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from locft.cache import content_key, made_once
from locft.data.capability_item import spread
from locft.errors import InputError
from locft.measure.generation import ONE_BY_ONE, drawn_tokens, end_tokens, with_settings
from locft.model.models import LoadedModel, computed_with
from locft.process import every_core
from locft.train.encoding import encode_prompt, text_windows
from locft.train.token_rows import TokenRow

SAMPLES, PASSAGES = 32, 64
"""Texts that the model writes, and windows of the passages, if all are of the full length."""
TOKENS = 128
"""Maximum number of tokens in one of them."""
MOST = 4
"""Limit on the samples drawn from a model that ends them early, as a multiple of `SAMPLES`."""
MOST_CUT = 32
"""Upper limit on the tokens cut off at the beginning of a text."""
PREFIX_TOKENS = 10
"""Maximum number of tokens of a sample that are put before a prompt."""
FILE_NAME = "samples.json"
SEED = 0
_log = logging.getLogger(__name__)
VERSION = 6
"""Version of the files. Raise it when the same model would write something else."""


def background_rows(loaded: LoadedModel) -> tuple[TokenRow, ...]:
    """What the model writes, then the passages, in rows of up to `TOKENS` tokens. Always the same on one machine."""
    text = files("locft.data").joinpath("passages.txt").read_text(encoding="utf-8")
    size = min(TOKENS, longest_text(loaded))
    return (*own_rows(loaded), *spread(text_windows(loaded.tokenizer, [text], size), PASSAGES))


def own_rows(loaded: LoadedModel) -> tuple[TokenRow, ...]:
    """Texts of up to `TOKENS` tokens, sampled from the model at temperature 1 after its start token: `SAMPLES` of them, or more
    if the model ends some of them early.

    Their beginnings are cut off, as those of windows of running text are, so that they start in as many ways as texts and prompts
    do: texts that all begin with the same token hardly show what the first tokens of a text do to the rest of it.

    They are always the same on one machine, and are kept in a file for other processes and later calls.
    """

    def write(folder: Path) -> None:
        (folder / FILE_NAME).write_text(json.dumps(_written(loaded)))

    with every_core():
        computed = [loaded.fingerprint, *computed_with(loaded.model), end_tokens(loaded), _starts(loaded)]
        try:
            folder = made_once("background", content_key([VERSION, SAMPLES, TOKENS, SEED, computed]), write)
            samples = json.loads((folder / FILE_NAME).read_text())
        except InputError as error:
            _log.warning("%s; the model's samples are not kept", error)
            samples = _written(loaded)
    return tuple(TokenRow(tuple(ids), 1) for ids in samples)


def prefix_texts(loaded: LoadedModel, rows: Sequence[TokenRow]) -> tuple[str, ...]:
    """The beginnings of the samples as text, each ending in a full stop."""
    special = set(loaded.tokenizer.all_special_ids)
    texts = []
    for row in rows:
        ids = [token for token in row.token_ids if token not in special][:PREFIX_TOKENS]
        text = " ".join(str(loaded.tokenizer.decode(ids)).split()).rstrip(".,;:")
        if text:
            texts.append(text + ".")
    return tuple(dict.fromkeys(texts))


@torch.no_grad()
def _written(loaded: LoadedModel) -> list[list[int]]:
    model, ends = loaded.model, end_tokens(loaded)
    start, before_text = _starts(loaded)
    longest = longest_text(loaded)
    width = min(TOKENS, longest)
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=longest - len(start),
        eos_token_id=ends,
        pad_token_id=0,
    )
    writer, drawn = with_settings(model, config), LogitsProcessorList([_Drawn()])
    cuts = random.Random(SEED)
    samples: list[list[int]] = []
    made = 0
    while (missing := SAMPLES * width - sum(map(len, samples))) > 0 and made < MOST * SAMPLES:
        length = max(1, SAMPLES * width - missing) / made if made else width  # mean tokens kept per sample so far
        batch = 1 if model.config.model_type in ONE_BY_ONE else min(SAMPLES, math.ceil(missing / length))
        ids = torch.tensor([start] * batch, device=model.device)  # (B, T)
        mask = torch.ones_like(ids)
        found = writer.generate(ids, attention_mask=mask, generation_config=config, logits_processor=drawn).tolist()
        for text in (_to_its_end(sample, len(start), ends) for sample in found):
            cut = len(start) + cuts.randrange(max(1, min(MOST_CUT, len(text) // 2)))
            if len(text) - cut > 1:
                samples.append([*before_text, *text[cut:]][:width])
        made += batch
    return samples


def longest_text(loaded: LoadedModel) -> int:
    """Tokens of the longest text that the model can read, at most as many as are ever written."""
    longest = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    return min(longest or TOKENS, TOKENS + MOST_CUT)


def _starts(loaded: LoadedModel) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens that a text is written after, and those of them that the tokenizer puts before every text."""
    start = encode_prompt(loaded.tokenizer, "")
    return start, start if encode_prompt(loaded.tokenizer, "a")[: len(start)] == start else ()


def _to_its_end(sample: list[int], start: int, ends: Collection[int]) -> list[int]:
    """The sample without the padding after its end token."""
    return sample[: next((at + 1 for at in range(start, len(sample)) if sample[at] in ends), len(sample))]


class _Drawn(LogitsProcessor):
    """Leaves only one token to choose, drawn at temperature 1."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(SEED)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        tokens = drawn_tokens(scores, self.generator)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)
