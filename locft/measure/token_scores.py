"""What logits say of the tokens that were expected: how likely each was, and what would have come instead.

Legend: K supervised tokens of a batch, V vocabulary.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from locft.train.encoding import SupervisedLogits, TokenRow

_TOKENS_AT_ONCE = 8
"""Supervised tokens whose probabilities are computed at once: only the logits themselves are of (K, V), and slices that
stay in the processor's cache take half the time of large ones."""


@dataclass(frozen=True)
class TokenScores:
    """Of the supervised tokens of a batch, rows in the order given. All on the CPU."""

    log_likelihood: torch.Tensor  # (K,) float64, nats
    best: torch.Tensor  # (K,) int64: the most likely token
    lead: torch.Tensor  # (K,) float64: by how many nats the expected token is likelier than every other; below 0: less likely
    gap: torch.Tensor  # (K,) float64: by how many nats the best token is likelier than the second best


@torch.no_grad()
def token_scores(logits: SupervisedLogits, rows: Sequence[TokenRow]) -> TokenScores:
    """Score one batch of rows; at least one token of them is supervised."""
    parts = []
    for part, wanted in slices(logits(rows), targets(rows)):
        own = part.gather(-1, wanted[:, None])[:, 0]
        best, token = part.max(-1)
        second = part.scatter(-1, token[:, None], -math.inf).amax(-1)
        lead = own - torch.where(token == wanted, second, best)
        parts.append((own.double() - part.logsumexp(-1).double(), token, lead.double(), (best - second).double()))
    return TokenScores(*(torch.cat(values).cpu() for values in zip(*parts, strict=True)))


def targets(rows: Sequence[TokenRow]) -> torch.Tensor:
    """The expected tokens, (K,) int64."""
    return torch.tensor([token for row in rows for token in row.target_ids])


def slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """A few tokens at a time of tensors (K, ...), on the first one's device."""
    for at in range(0, len(tensors[0]), _TOKENS_AT_ONCE):
        yield tuple(tensor[at : at + _TOKENS_AT_ONCE].to(tensors[0].device) for tensor in tensors)
