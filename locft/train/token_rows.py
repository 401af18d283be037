"""Token rows, on which everything is computed, and the function types that represent a model.

Legend: T tokens of a row, K supervised tokens, V vocabulary.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TokenRow:
    """A sequence of tokens, the last of which are supervised.

    `token_ids[start:]` is the supervised span; `start >= 1`, so that each of its tokens has a predecessor.
    """

    token_ids: tuple[int, ...]  # (T,)
    start: int

    def __post_init__(self):
        if not 1 <= self.start <= len(self.token_ids):
            raise ValueError(f"supervised span starts at {self.start}, expected 1 to {len(self.token_ids)} tokens")

    @property
    def target_ids(self) -> tuple[int, ...]:  # (K,)
        return self.token_ids[self.start :]


SupervisedLogits = Callable[[Sequence[TokenRow]], torch.Tensor]
"""A model as this project sees it: takes rows and returns the float32 logits (K, V) that predict their supervised tokens,
in row order (K summed over the rows). The full forward pass and the tail engine both have this form."""

Forward = Callable[[Mapping[str, torch.Tensor]], SupervisedLogits]
"""Binds weights (parameter name -> tensor) that stand in for the model's own; gradients flow to them."""

SUPERVISED_AT_ONCE = 256
"""Supervised tokens per batch: larger batches are no faster, and with a vocabulary of 256,000 the logits of this many
already take 250 MB."""


def windows(rows: Iterable[TokenRow], size: int) -> list[TokenRow]:
    """Running text in pieces of at most `size` tokens, all supervised but the first; a piece of one token is left out."""
    pieces = (row.token_ids[at : at + size] for row in rows for at in range(0, len(row.token_ids), size))
    return [TokenRow(piece, 1) for piece in pieces if len(piece) > 1]


def batches(
    rows: Sequence[TokenRow],
    *,
    most: float = math.inf,
    tokens: float = math.inf,
    padded_tokens: float = math.inf,
    supervised: float = SUPERVISED_AT_ONCE,
) -> Iterator[slice]:
    """Cut rows into batches of consecutive rows, each as large as the limits allow; a row over a limit gets its own batch.

    Limits per batch: most, its rows; tokens, the tokens of its rows; padded_tokens, the same with padding to its longest
    row; supervised, the tokens to predict.
    """
    start = total = longest = asked = 0
    for index, row in enumerate(rows):
        length, targets = len(row.token_ids), len(row.target_ids)
        count = index - start + 1
        if index > start and (
            count > most
            or total + length > tokens
            or count * max(longest, length) > padded_tokens
            or asked + targets > supervised
        ):
            yield slice(start, index)
            start, total, longest, asked = index, 0, 0, 0
        total, longest, asked = total + length, max(longest, length), asked + targets
    if rows:
        yield slice(start, len(rows))
