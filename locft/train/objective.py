"""The loss of a batch of edits, and its gradients (arXiv 2509.22072, section 3).

Legend: K supervised tokens of a batch, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Literal

import torch

from locft.process import moved
from locft.train.token_rows import SupervisedLogits, TokenRow, batches

LossAverage = Literal["edit", "token", "last_token"]

LOSS_ROWS = 64
"""Maximum number of edits per batch when the loss of all edits is computed."""


@dataclass(frozen=True)
class BatchLoss:
    """The loss of a batch of edits, in nats."""

    numbers: torch.Tensor
    """(1 + E,) float64: the loss averaged as in training, then for each edit the mean over its tokens. Reading `value` or `by_edit`
    waits for the device."""
    gradients: Sequence[torch.Tensor] | None
    """None if no step should follow."""

    @cached_property
    def _read(self) -> list[float]:
        return self.numbers.tolist()

    @property
    def value(self) -> float:
        return self._read[0]

    @property
    def by_edit(self) -> list[float]:
        return self._read[1:]


def batch_loss(logits: torch.Tensor, rows: Sequence[TokenRow], average: LossAverage) -> torch.Tensor:
    """Scalar loss of a batch from the (K, V) logits of its supervised tokens, in nats.

    average: edit, mean over the tokens of an edit, then over the edits; token, mean over all tokens of the batch;
    last_token, the loss of FT-L as ROME and EasyEdit compute it (github.com/kmeng01/rome, baselines/ft;
    `objective_optimization: prompt_last` of github.com/zjunlp/EasyEdit): every token of the answer is to be predicted by
    the last token of the prompt, mean over the answer, then over the edits. For answers of one token, as in ROME's data, that
    is the first token's loss. With several tokens, its minimum singles out no answer: it is the entropy of the answer's
    tokens, reached where each is as likely as it is frequent. The EOS, which they do not train, is left out.
    """
    return _batch_loss(logits, rows, average)[0]


def _batch_loss(
    logits: torch.Tensor, rows: Sequence[TokenRow], average: LossAverage, ahead: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss, and (E,) the mean over the tokens of each edit, which has no gradient. ahead: do not wait for the device."""
    answers, there = [row.target_ids for row in rows], logits.device
    if average == "last_token":
        first = accumulate(map(len, answers), initial=0)
        answers = [answer[:-1] or answer for answer in answers]
        places = [place for place, answer in zip(first, answers, strict=False) for _ in answer]
        logits = logits[moved(torch.tensor(places), there)]
    targets = moved(torch.tensor([token for answer in answers for token in answer]), there)  # (K,)
    losses = _CrossEntropy.apply(logits, targets, ahead)  # (K,)
    lengths = moved(torch.tensor([len(answer) for answer in answers]), there)
    # unsafe: without its checks, which wait for the device
    by_edit = torch.segment_reduce(losses.detach(), "mean", lengths=lengths, unsafe=True)
    if average == "token":
        return losses.mean(), by_edit
    share = [1 / (len(answer) * len(rows)) for answer in answers for _ in answer]
    return losses @ moved(torch.tensor(share), there), by_edit


def loss_and_gradients(
    logits: SupervisedLogits,
    trained: Sequence[torch.Tensor],
    batch: Sequence[TokenRow],
    average: LossAverage,
    *,
    at_least: float = 0.0,
    pieces: int = 1,
    ahead: bool = False,
) -> BatchLoss:
    """Loss of a batch and its gradients with respect to `trained`, the tensors that `logits` is a function of.

    The gradients are None where the loss is below `at_least`, infinite or NaN. pieces: compute the batch in this many parts
    to need less memory. The result is the same up to rounding. ahead: do not wait for the device, and compute the gradients
    whatever the loss.
    """
    size = math.ceil(len(batch) / pieces)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    sizes = [sum(len(row.target_ids) for row in part) if average == "token" else len(part) for part in parts]
    losses: list[torch.Tensor] = []
    by_edit: list[torch.Tensor] = []
    gradients: Sequence[torch.Tensor] | None = None
    for part, own in zip(parts, sizes, strict=True):
        loss, each = _batch_loss(logits(part), part, average, ahead)
        if len(parts) > 1:
            loss = loss * (own / sum(sizes))
        losses.append(loss.detach().double())
        by_edit.append(each.double())
        if part is parts[-1] and not ahead and not at_least <= float(sum(losses)) < math.inf:
            gradients = None
            break
        new = torch.autograd.grad(loss, trained)
        gradients = new if gradients is None else [kept.add_(more) for kept, more in zip(gradients, new, strict=True)]
        del loss, new  # the graph's memory, before the next part is computed
    return BatchLoss(torch.cat([sum(losses)[None], *by_edit]), gradients)


@torch.no_grad()
def mean_loss(logits: SupervisedLogits, rows: Sequence[TokenRow], at_once: int = LOSS_ROWS) -> float:
    """Mean loss over all edits, averaged by edit, computed in batches of at most `at_once` edits."""
    parts = [rows[part] for part in batches(rows, most=at_once)]
    return sum(batch_loss(logits(part), part, "edit").item() * len(part) for part in parts) / len(rows)


@torch.no_grad()
def edit_losses(
    logits: SupervisedLogits, rows: Sequence[TokenRow], average: LossAverage, at_once: int = LOSS_ROWS
) -> torch.Tensor:
    """(E,) float64 on the CPU: for each edit, the mean loss over its tokens."""
    parts = [rows[part] for part in batches(rows, most=at_once)]
    return torch.cat([_batch_loss(logits(part), part, average)[1].double().cpu() for part in parts])


def all_finite(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """True if no entry is infinite or NaN: a sum shows it in one pass without a buffer."""
    return torch.stack([tensor.sum() for tensor in tensors]).isfinite().all()


class _CrossEntropy(torch.autograd.Function):
    """-log p(target) for each row of logits, with half as many buffers of size (K, V) as PyTorch's own.

    With a large vocabulary, those buffers dominate a step at a late layer. The backward pass can run only once.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor, ahead: bool) -> torch.Tensor:  # (K, V), (K,) -> (K,)
        probabilities = logits.softmax(-1)
        ctx.probabilities = probabilities
        ctx.save_for_backward(targets)
        losses = -probabilities.gather(-1, targets[:, None])[:, 0].log()
        likely = losses.max() < 80
        if not ahead and likely:
            return losses
        # A probability near the smallest float32 loses digits: use the target's logit and the log of the partition sum.
        partition = logits.amax(-1) - probabilities.amax(-1).log()
        exact = partition - logits.gather(-1, targets[:, None])[:, 0]
        return torch.where(likely, losses, exact) if ahead else exact

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (targets,) = ctx.saved_tensors
        found, ctx.probabilities = ctx.probabilities, None
        found.mul_(gradient[:, None])
        found[torch.arange(len(targets), device=targets.device), targets] -= gradient
        return found, None, None
