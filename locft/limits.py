"""Inputs that a model cannot compute, found beforehand: tokens without an embedding, texts with more tokens than positions."""

from collections.abc import Iterable, Sequence

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.errors import InputError, listed

SHOWN = 3
"""Number of texts quoted in a message."""


def check_limits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, texts: Iterable[tuple[Sequence[int], int]]
) -> None:
    """Raise InputError if the model has no embedding for a token of a text, or learned no position for it.

    name: of the model, for the message. texts: the tokens of each, and how many may be generated after them. Rotary
    positions and recurrent states are unbounded, so they set no limit.
    """
    rows, places = model.get_input_embeddings().weight.shape[0], _positions(model)
    unknown: dict[str, None] = {}
    long: dict[str, None] = {}
    for token_ids, new_tokens in texts:
        highest, length = max(token_ids, default=0), len(token_ids) + max(0, new_tokens - 1)
        if highest >= rows:
            unknown[f"token {highest} in {_beginning(tokenizer, token_ids)}"] = None
        if places is not None and length > places:
            answer = f" with an answer of up to {new_tokens}" if new_tokens else ""
            long[f"{len(token_ids):,} tokens{answer} in {_beginning(tokenizer, token_ids)}"] = None
    problems = []
    if unknown:
        problems.append(
            f"model {name!r}: it has {rows:,} embeddings, but its tokenizer produces token ids beyond them "
            f"({listed(unknown, SHOWN, '; ')}); the tokenizer belongs to another model, or tokens were added to the tokenizer "
            "but not to the model"
        )
    if long:
        problems.append(
            f"model {name!r}: it has {places:,} positions, and these texts need more: {listed(long, SHOWN, '; ')}; shorten them or leave "
            "them out"
        )
    if problems:
        raise InputError(problems)


def _positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has learned embeddings for; None where positions are computed."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for part in model.modules():  # opt keeps two rows more than it has positions
        if isinstance(part, nn.Embedding) and part is not tokens and most and 0 <= part.num_embeddings - most <= 2:
            return int(most)
    return None


def _beginning(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return repr(str(tokenizer.decode(list(token_ids[:12]))) + "…")
