"""Localized fine-tuning: the objective and the two pipelines (arXiv 2509.22072, sections 3 and 4).

Legend: B edits of a batch, K supervised tokens, V vocabulary.

Which edits share a step, when a step is skipped and when training stops is decided here; how the logits are computed is
the business of the forward passed in (`locft.train.reference.full_forward`, or the tail engine).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from locft.model.delta import EditDelta
from locft.train.encoding import SupervisedLogits, TokenRow, batches
from locft.errors import out_of_memory
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, parameter_names
from locft.train.reference import full_forward

Pipeline = Literal["breadth_first", "depth_first"]
LossAverage = Literal["edit", "token"]

LOSS_ROWS = 64
"""Edits at most whose loss is computed at once when all are looked at."""

Forward = Callable[[Mapping[str, torch.Tensor]], SupervisedLogits]
"""Binds weights (parameter name -> tensor) that stand in for the model's own; gradients flow to them."""


@dataclass(frozen=True)
class TrainingSettings:
    """How an edit is trained. The defaults are the paper's for LLaMA-3-8B, apart from the batch size."""

    pipeline: Pipeline = "breadth_first"
    """breadth_first: epochs over all edits. depth_first: one pass, each batch to its end before the next."""
    batch_size: int = 32
    """Edits per optimiser step."""
    learning_rate: float = 5e-4
    """Of Adam; small models need more (4e-3 at 135M parameters)."""
    epochs: int = 25
    """At most so many epochs (breadth_first) or steps per batch (depth_first)."""
    loss_average: LossAverage = "edit"
    """edit: mean over the tokens of an edit, then over the edits. token: mean over all tokens of the batch."""
    skip_below: float = 1e-2
    """A batch whose loss is below takes no step; 0 never skips."""
    stop_below: float = 1e-2
    """An epoch whose mean loss (breadth_first), or a batch whose loss (depth_first), is below ends; 0 never stops."""
    seed: int = 0
    """Of the order of the edits."""
    precision: str = "float32"
    """In which the tail engine computes while it trains: float32 or bfloat16. The trained weights are float32 always, and the
    full forward computes in the model's own dtype."""


@dataclass(frozen=True)
class Training:
    """The outcome of a fine-tuning run."""

    delta: EditDelta
    losses: tuple[float, ...]
    """breadth_first: mean loss of each epoch over the edits. depth_first: each batch's last loss."""
    steps: int
    """Optimiser steps taken (skipped ones not counted)."""
    diverged: bool
    """The loss or a weight became infinite or NaN; training stopped there, and the delta is of the last finite weights."""
    seconds: float
    pieces: int = 1
    """In which a batch was computed: 1 unless memory did not suffice. Its gradient is the same but for rounding."""
    trained_loss: float | None = None
    """Mean loss of all edits at the end, as training computes it: against the loss of the edit merged into the model's own
    dtype it shows what rounding costs. None when training diverged."""


def finetune(
    loaded: LoadedModel,
    rows: Sequence[TokenRow],
    position: TuningPosition,
    settings: TrainingSettings,
    forward: Forward | None = None,
) -> Training:
    """Train the position's parameters on the rows of the edits; the model itself is only read.

    rows: one per edit, as of `locft.train.encoding.encode_edits`. forward: how logits are computed, the full forward by default.
    The trained copies are float32, whatever the model's dtype. On a CPU the result is bitwise a function of the arguments.
    """
    started = time.perf_counter()
    model = loaded.model
    base = {name: model.get_parameter(name).detach().float() for name in parameter_names(model, position)}
    weights = {name: value.clone().requires_grad_() for name, value in base.items()}
    forward = forward or partial(full_forward, model)
    run = _breadth_first if settings.pipeline == "breadth_first" else _depth_first
    with torch.enable_grad():
        progress = run(forward, weights, rows, settings)
    change = {name: (weights[name].detach() - base[name]).cpu() for name in weights}
    delta = EditDelta(str(position), loaded.fingerprint, change, asdict(settings))
    seconds = time.perf_counter() - started
    at_once = LOSS_ROWS if progress.pieces == 1 else max(1, settings.batch_size // progress.pieces)
    trained_loss = None if progress.diverged else mean_loss(forward(weights), rows, at_once)
    return Training(
        delta, tuple(progress.losses), progress.steps, progress.diverged, seconds, progress.pieces, trained_loss
    )


def batch_loss(logits: torch.Tensor, rows: Sequence[TokenRow], average: LossAverage) -> torch.Tensor:
    """The objective: scalar loss of a batch from the (K, V) logits of its supervised tokens."""
    targets = torch.tensor([token for row in rows for token in row.target_ids], device=logits.device)  # (K,)
    losses = _CrossEntropy.apply(logits, targets)  # (K,)
    if average == "token":
        return losses.mean()
    share = [1 / (len(row.target_ids) * len(rows)) for row in rows for _ in row.target_ids]
    return losses @ torch.tensor(share, device=logits.device)


class _CrossEntropy(torch.autograd.Function):
    """-log p(target) of each row of logits, with half the buffers of the size of the logits that PyTorch's takes.

    With a large vocabulary those buffers are most of a late layer's step. The backward pass runs once.
    """

    @staticmethod
    def forward(ctx, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:  # (K, V), (K,) -> (K,)
        probabilities = logits.softmax(-1)
        ctx.probabilities = probabilities
        ctx.save_for_backward(targets)
        losses = -probabilities.gather(-1, targets[:, None])[:, 0].log()
        if losses.max() < 80:
            return losses
        # a target about as unlikely as the smallest float32: its logit against the sum of all
        partition = logits.amax(-1) - probabilities.amax(-1).log()
        return partition - logits.gather(-1, targets[:, None])[:, 0]

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (targets,) = ctx.saved_tensors
        found, ctx.probabilities = ctx.probabilities, None
        found.mul_(gradient[:, None])
        found[torch.arange(len(targets), device=targets.device), targets] -= gradient
        return found, None


def finite(gradients: Sequence[torch.Tensor]) -> bool:
    """Whether all of their numbers are: a sum shows it in one pass without a buffer."""
    return all(bool(torch.isfinite(gradient.sum())) for gradient in gradients)


@torch.no_grad()
def mean_loss(logits: SupervisedLogits, rows: Sequence[TokenRow], at_once: int = LOSS_ROWS) -> float:
    """Mean loss of all edits, averaged by edit; at most so many are computed together."""
    return sum(batch_loss(logits(p), p, "edit").item() * len(p) for p in batches(rows, at_once)) / len(rows)


@dataclass
class _Progress:
    """What a pipeline accumulates while it runs."""

    losses: list[float]
    steps: int = 0
    pieces: int = 1
    diverged: bool = False


def _breadth_first(
    forward: Forward, weights: dict[str, torch.Tensor], rows: Sequence[TokenRow], settings: TrainingSettings
) -> _Progress:
    progress = _Progress([])
    order = torch.Generator().manual_seed(settings.seed)
    optimiser = _adam(weights, settings)
    for _ in range(settings.epochs):
        total = 0.0
        for batch in _shuffled_batches(rows, settings.batch_size, order):
            loss = _step(forward, weights, optimiser, batch, settings, progress)
            if progress.diverged:
                return progress
            total += loss * len(batch)
        progress.losses.append(total / len(rows))
        if progress.losses[-1] < settings.stop_below:
            break
    return progress


def _depth_first(
    forward: Forward, weights: dict[str, torch.Tensor], rows: Sequence[TokenRow], settings: TrainingSettings
) -> _Progress:
    progress = _Progress([])
    order = torch.Generator().manual_seed(settings.seed)
    for batch in _shuffled_batches(rows, settings.batch_size, order):
        optimiser = _adam(weights, settings)  # each batch is an edit of its own: it inherits no momentum
        for _ in range(settings.epochs):
            loss = _step(forward, weights, optimiser, batch, settings, progress)
            if progress.diverged:
                return progress
            if loss < max(settings.stop_below, settings.skip_below):  # below skip_below nothing would change any more
                break
        progress.losses.append(loss)
    return progress


def _adam(weights: dict[str, torch.Tensor], settings: TrainingSettings) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True)


def _shuffled_batches(rows: Sequence[TokenRow], size: int, order: torch.Generator) -> list[list[TokenRow]]:
    drawn = torch.randperm(len(rows), generator=order).tolist()
    return [[rows[index] for index in drawn[start : start + size]] for start in range(0, len(rows), size)]


def _step(
    forward: Forward,
    weights: dict[str, torch.Tensor],
    optimiser: torch.optim.Optimizer,
    batch: Sequence[TokenRow],
    settings: TrainingSettings,
    progress: _Progress,
) -> float:
    """One look at a batch: its loss before the step, and the step unless it is skipped. Keeps the weights finite.

    Where memory does not suffice, this and all further batches are computed in twice as many pieces, down to single edits.
    """
    while True:
        try:
            value, gradients = _look(forward, weights, batch, settings, progress.pieces)
            break
        except (MemoryError, RuntimeError) as error:
            if not out_of_memory(error) or progress.pieces >= len(batch):
                raise
            progress.pieces = min(2 * progress.pieces, len(batch))
    if not math.isfinite(value):
        progress.diverged = True
    elif gradients is not None:
        if finite(gradients):
            for weight, gradient in zip(weights.values(), gradients, strict=True):
                weight.grad = gradient
            optimiser.step()
            progress.steps += 1
        else:
            progress.diverged = True
    return value


def _look(
    forward: Forward,
    weights: dict[str, torch.Tensor],
    batch: Sequence[TokenRow],
    settings: TrainingSettings,
    pieces: int,
) -> tuple[float, Sequence[torch.Tensor] | None]:
    """The loss of a batch, and its gradients unless no step is to follow (skipped, or not finite)."""
    size = math.ceil(len(batch) / pieces)
    parts = [batch[start : start + size] for start in range(0, len(batch), size)]
    logits = forward(weights)
    losses, sums = [], None
    for part in parts:
        loss = batch_loss(logits(part), part, settings.loss_average)
        if len(parts) > 1:
            weigh = len if settings.loss_average == "edit" else _supervised
            loss = loss * (weigh(part) / weigh(batch))
        losses.append(loss.item())
        if len(parts) == 1 and not settings.skip_below <= losses[0] < math.inf:
            return losses[0], None
        gradients = torch.autograd.grad(loss, list(weights.values()))
        sums = gradients if sums is None else [total.add_(new) for total, new in zip(sums, gradients, strict=True)]
        del loss, gradients
    value = sum(losses)
    return value, sums if settings.skip_below <= value < math.inf else None


def _supervised(rows: Sequence[TokenRow]) -> int:
    return sum(len(row.target_ids) for row in rows)
