"""What logits say about the expected tokens: how likely each was, and which would have come instead.

Where the hardware multiplies bfloat16 natively, bfloat16 products take half the time or less. They shift a margin by some
hundredths of a nat, while most margins are several nats wide. So decisions (is the right choice the likeliest?) are made
coarsely first, and those whose margin is not far larger than the shifts seen are repeated exactly (`retake`).

Legend: K supervised tokens of a batch, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from locft.train.token_rows import SupervisedLogits, TokenRow, batches

_TOKENS_AT_ONCE, _ELSEWHERE = 8, 256
"""Supervised tokens whose probabilities are computed at once, on a CPU and on a GPU. Slices that stay in the processor's
cache take half the time of large ones, and nothing but the logits themselves has size (K, V); a GPU needs more work at once."""

SAFETY = 8.0
"""A coarse decision stands if its margin is more than this many times the root mean square of the shifts seen."""
FEWEST, SHARE = 16, 0.05
"""The closest decisions, at least this many and this share of all, are always made exactly: they show the shifts."""
FAR = 60.0
"""Nats by which a logit may rise above the mean change before its divergence is computed in float64: exp(88) is too large
for float32."""


class TokenScores(NamedTuple):
    """One value per supervised token, on the CPU."""

    log_likelihood: torch.Tensor  # (K,) float64, nats
    best: torch.Tensor  # (K,) int64: the most likely token
    lead: torch.Tensor  # (K,) float64: nats by which the expected token leads all others; negative if it does not
    gap: torch.Tensor  # (K,) float64: nats by which the best token is likelier than the second best


def scores_by_row(
    logits: SupervisedLogits,
    rows: Sequence[TokenRow],
    key: Callable[[TokenRow], Any] = lambda row: len(row.token_ids),
    **limits: float,
) -> list[TokenScores]:
    """Scores of each row, in the order given.

    The rows are computed in the order of `key`, in batches within the `limits` of `locft.train.token_rows.batches`.
    """
    order = sorted(range(len(rows)), key=lambda index: key(rows[index]))
    ordered = [rows[index] for index in order]
    found: dict[int, TokenScores] = {}
    for part in batches(ordered, **limits):
        lengths = [len(row.target_ids) for row in ordered[part]]
        split = (values.split(lengths) for values in token_scores(logits, ordered[part]))
        found |= zip(order[part], map(TokenScores, *split), strict=True)
    return [found[index] for index in range(len(rows))]


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


def divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """KL(before || after) between the distributions of logits (N, V): (N,) float64, in nats.

    With p the probabilities before and d the logits after minus those before, the divergence of a token is
    log E_p[exp d] - E_p[d]. A constant added to d cancels, so d is centred at its mean under p. Both terms are then as
    small as the change, and a KL of 1e-8 nats is not the small difference of large sums.
    """
    p, d = before.softmax(-1), after - before
    highest = d.amax(-1)
    d = torch.where(p == 0, 0.0, d)  # a token that `before` rules out adds nothing
    mean = (p * d).sum(-1, keepdim=True)
    d -= mean
    found = (p * d.expm1()).sum(-1, dtype=torch.float64).log1p() - (p * d).sum(-1, dtype=torch.float64)
    if not (torch.maximum(highest - mean[:, 0], d.amax(-1)) <= FAR).all():
        highest = (after - before).masked_fill(before == -math.inf, -math.inf).amax(-1)
        if (far := torch.maximum(highest - mean[:, 0], d.amax(-1)) > FAR).any():
            found[far] = _far_divergence(before[far], after[far])
    return found


def _far_divergence(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """`divergence` where the change is large: the sums of exponentials are shifted, in float64."""
    before, after = before.double(), after.double().masked_fill(before == -math.inf, -math.inf)
    p = before.softmax(-1)
    mean = torch.where(p == 0, 0.0, p * (after - before)).sum(-1)
    return after.logsumexp(-1) - before.logsumexp(-1) - mean


def slices(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Slices of a few tokens each of tensors (K, ...), on the first tensor's device."""
    there = [tensor.to(tensors[0].device) for tensor in tensors]
    size = _TOKENS_AT_ONCE if tensors[0].device.type == "cpu" else _ELSEWHERE
    for at in range(0, len(there[0]), size):
        yield tuple(tensor[at : at + size] for tensor in there)


def retake(margins: np.ndarray, exactly: Callable[[list[int]], np.ndarray]) -> None:
    """Make the close decisions again, exactly.

    margins: how far each coarse decision is from falling the other way, at least 0. exactly: makes the decisions with
    these indices again and returns by how much each margin had shifted.
    """
    order = np.argsort(margins, kind="stable")
    ordered = margins[order]
    done, upto, squares = 0, min(len(order), max(FEWEST, math.ceil(SHARE * len(order)))), 0.0
    while done < upto:
        squares += float((np.nan_to_num(exactly(order[done:upto].tolist()), nan=math.inf) ** 2).sum())
        reach = SAFETY * math.sqrt(squares / upto)
        done, upto = upto, max(upto, int(np.searchsorted(ordered, reach, side="right")))
