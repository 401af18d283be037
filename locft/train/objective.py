"""The loss of a batch of edits, and its gradients (arXiv 2509.22072, section 3).

Legend: K supervised tokens of a batch, V vocabulary.
"""

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch

from locft.train.token_rows import SupervisedLogits, TokenRow, batches

LossAverage = Literal["edit", "token", "last_token"]

LOSS_ROWS = 64
"""Largest batch of edits when the loss of all of them is computed."""


class BatchLoss(NamedTuple):
    """The loss of a batch of edits."""

    value: float
    """In nats, averaged as the training averages."""
    by_edit: tuple[float, ...]
    """Mean over the tokens of each edit."""
    gradients: Sequence[torch.Tensor] | None
    """None where no step should follow."""


def batch_loss(logits: torch.Tensor, rows: Sequence[TokenRow], average: LossAverage) -> torch.Tensor:
    """Scalar loss of a batch from the (K, V) logits of its supervised tokens, in nats.

    average: edit, mean over the tokens of an edit, then over the edits; token, mean over all tokens of the batch;
    last_token, the loss of FT-L as ROME and EasyEdit compute it (github.com/kmeng01/rome, baselines/ft;
    `objective_optimization: prompt_last` of github.com/zjunlp/EasyEdit): every token of the answer is to be predicted by
    the last token of the prompt, mean over the answer, then over the edits. For answers of one token, ROME's data, that is
    the first token's loss. Of several tokens the most likely answer to it is none: it is least, the entropy of the answer's
    tokens, where each is as likely as it is frequent. The EOS, which theirs does not train, is left out.
    """
    return _batch_loss(logits, rows, average)[0]


def _batch_loss(
    logits: torch.Tensor, rows: Sequence[TokenRow], average: LossAverage
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and (E,) the mean over the tokens of each edit, which has no gradient."""
    answers = [row.target_ids for row in rows]
    if average == "last_token":
        first = accumulate(map(len, answers), initial=0)
        answers = [answer[:-1] or answer for answer in answers]
        logits = logits[[place for place, answer in zip(first, answers, strict=False) for _ in answer]]
    targets = torch.tensor([token for answer in answers for token in answer], device=logits.device)  # (K,)
    losses = _CrossEntropy.apply(logits, targets)  # (K,)
    lengths = torch.tensor([len(answer) for answer in answers], device=logits.device)
    by_edit = torch.segment_reduce(losses.detach(), "mean", lengths=lengths)
    if average == "token":
        return losses.mean(), by_edit
    share = [1 / (len(answer) * len(rows)) for answer in answers for _ in answer]
    return losses @ torch.tensor(share, device=logits.device), by_edit


def loss_and_gradients(
    logits: SupervisedLogits,
    trained: Sequence[torch.Tensor],
    batch: Sequence[TokenRow],
    average: LossAverage,
    *,
    at_least: float = 0.0,
    pieces: int = 1,
) -> BatchLoss:
    """Loss of a batch and its gradients with respect to `trained`, the tensors that `logits` is a function of.

    The gradients are None where the loss is below `at_least`, infinite or NaN. pieces: compute the batch in this many parts
    to need less memory. The result is the same but for rounding.
    """
    size = math.ceil(len(batch) / pieces)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    weigh = _supervised if average == "token" else len
    value, by_edit = 0.0, []
    gradients: Sequence[torch.Tensor] | None = None
    for part in parts:
        loss, each = _batch_loss(logits(part), part, average)
        if len(parts) > 1:
            loss = loss * (weigh(part) / weigh(batch))
        here, *of_edits = torch.cat([loss.detach()[None], each]).tolist()
        value += here
        by_edit += of_edits
        if part is parts[-1] and not at_least <= value < math.inf:
            return BatchLoss(value, tuple(by_edit), None)
        new = torch.autograd.grad(loss, trained)
        gradients = new if gradients is None else [total.add_(more) for total, more in zip(gradients, new, strict=True)]
        del loss, new  # the graph's memory, before the next part is computed
    return BatchLoss(value, tuple(by_edit), gradients)


@torch.no_grad()
def mean_loss(logits: SupervisedLogits, rows: Sequence[TokenRow], at_once: int = LOSS_ROWS) -> float:
    """Mean loss over all edits, averaged by edit, at most `at_once` of them computed together."""
    total = 0.0
    for part in batches(rows, most=at_once):
        total += batch_loss(logits(rows[part]), rows[part], "edit").item() * len(rows[part])
    return total / len(rows)


def all_finite(tensors: Sequence[torch.Tensor]) -> bool:
    """True if no entry is infinite or NaN: a sum shows it in one pass without a buffer."""
    return all(bool(torch.isfinite(tensor.sum())) for tensor in tensors)


class _CrossEntropy(torch.autograd.Function):
    """-log p(target) for each row of logits, with half as many buffers of size (K, V) as PyTorch's own.

    With a large vocabulary those buffers are most of a late layer's step. The backward pass can run only once.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # (K, V), (K,) -> (K,)
        probabilities = logits.softmax(-1)
        ctx.probabilities = probabilities
        ctx.save_for_backward(targets)
        losses = -probabilities.gather(-1, targets[:, None])[:, 0].log()
        if losses.max() < 80:
            return losses
        # A probability near the smallest float32 loses digits: use the target's logit and the log of the partition sum.
        partition = logits.amax(-1) - probabilities.amax(-1).log()
        return partition - logits.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (targets,) = ctx.saved_tensors
        found, ctx.probabilities = ctx.probabilities, None
        found.mul_(gradient[:, None])
        found[torch.arange(len(targets), device=targets.device), targets] -= gradient
        return found, None


def _supervised(rows: Sequence[TokenRow]) -> int:
    return sum(len(row.target_ids) for row in rows)
