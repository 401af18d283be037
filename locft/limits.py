"""Inputs that a model cannot compute, found beforehand: tokens without an embedding, texts with more tokens than positions."""

from collections.abc import Iterable, Sequence

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from locft.errors import InputError, listed

SHOWN = 3
"""Number of texts quoted in a message."""
_TABLES = ("embed_positions", "pos_encoding")
"""Where GPT-J and CodeGen, and CTRL, keep a table of positions that are not learned."""


def check_limits(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, texts: Iterable[tuple[Sequence[int], int]]
) -> None:
    """Raise InputError if the model has no embedding for a token of a text, or no position for it (`most_positions`).

    name: of the model, for the message. texts: the tokens of each, and how many may be generated after them.
    """
    rows, places = model.get_input_embeddings().weight.shape[0], most_positions(model)
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


def most_positions(model: PreTrainedModel) -> int | None:
    """How many positions a model has in a table, learned or not; None where positions are computed as they come: rotary ones
    and recurrent states set no limit."""
    most = int(getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0)
    tokens = model.get_input_embeddings()
    for part in model.modules() if most else ():
        tables = [part.weight] if isinstance(part, nn.Embedding) and part is not tokens else []
        tables += [table for name in _TABLES if isinstance(table := getattr(part, name, None), Tensor)]
        if any(0 <= len(table) - most <= 2 for table in tables):  # opt keeps two rows more than it has positions
            return most
    return None


def _beginning(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> str:
    return repr(str(tokenizer.decode(list(token_ids[:12]))) + "…")
