"""Localized fine-tuning and its two pipelines (arXiv 2509.22072, section 4).

This file decides which edits share a step, when a step is skipped and when training ends. The loss is in
`locft.train.objective`; how logits are computed is up to the forward that is passed in (`full_forward` or the tail
engine).
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch

from locft.errors import out_of_memory
from locft.model.delta import EditDelta
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, parameter_names
from locft.train.encoding import Forward, SupervisedLogits, TokenRow
from locft.train.objective import (
    LOSS_ROWS,
    LossAverage,
    all_finite,
    loss_and_gradients,
    mean_loss,
)
from locft.train.reference import full_forward

Pipeline = Literal["breadth_first", "depth_first"]


@dataclass(frozen=True)
class TrainingSettings:
    """How an edit is trained. The defaults are the paper's for LLaMA-3-8B, apart from the batch size."""

    pipeline: Pipeline = "breadth_first"
    """breadth_first: epochs over all edits. depth_first: one pass, each batch to its end before the next."""
    batch_size: int = 32
    """Edits per optimiser step."""
    learning_rate: float = 5e-4
    """Adam's. Small models need a larger one (4e-3 at 135M parameters)."""
    epochs: int = 25
    """Maximum number of epochs (breadth_first) or of steps per batch (depth_first)."""
    loss_average: LossAverage = "edit"
    """edit: mean over the tokens of an edit, then over the edits. token: mean over all tokens of the batch."""
    skip_below: float = 1e-2
    """A batch whose loss is below this takes no step. 0 never skips."""
    stop_below: float = 1e-2
    """Training ends when an epoch's mean loss is below this (breadth_first); a batch ends when its loss is
    (depth_first). 0 never stops."""
    seed: int = 0
    """Decides the order of the edits."""
    precision: str = "float32"
    """What the tail engine computes in during training: float32 or bfloat16. The trained weights are always float32,
    and the full forward computes in the model's own dtype."""


@dataclass(frozen=True)
class Training:
    """The outcome of a fine-tuning run."""

    delta: EditDelta
    losses: tuple[float, ...]
    """breadth_first: mean loss of each epoch over the edits. depth_first: each batch's last loss."""
    steps: int
    """Optimiser steps taken; skipped ones are not counted."""
    diverged: bool
    """The loss or a gradient became infinite or NaN and ended training; the delta is of the last finite weights."""
    seconds: float
    pieces: int = 1
    """Parts in which a batch was computed: more than 1 only if memory ran out. Changes nothing but rounding."""
    trained_loss: float | None = None
    """Mean loss of all edits at the end, computed as in training. Compared with the loss of the edit merged into the
    model's own dtype it shows what rounding costs. None if training diverged."""


def finetune(
    loaded: LoadedModel,
    rows: Sequence[TokenRow],
    position: TuningPosition,
    settings: TrainingSettings,
    forward: Forward | None = None,
) -> Training:
    """Train the position's parameters on the edits. The model itself is only read.

    rows: one per edit, from `locft.train.encoding.encode_edits`. forward: how logits are computed, by default the full
    forward. The trained copies are float32, whatever the model's dtype. On a CPU the result is bitwise a function of
    the arguments.
    """
    started = time.perf_counter()
    trainer = PositionTrainer(loaded, position, settings, forward)
    pipeline = _breadth_first if settings.pipeline == "breadth_first" else _depth_first
    losses = pipeline(trainer, rows, settings)
    delta = EditDelta(str(position), loaded.fingerprint, trainer.change(), asdict(settings))
    seconds = time.perf_counter() - started
    trained_loss = None
    if not trainer.diverged:
        at_once = LOSS_ROWS if trainer.pieces == 1 else max(1, settings.batch_size // trainer.pieces)
        trained_loss = mean_loss(trainer.logits(), rows, at_once)
    return Training(delta, tuple(losses), trainer.steps, trainer.diverged, seconds, trainer.pieces, trained_loss)


class PositionTrainer:
    """Trained copies of a position's weights and the optimiser steps taken on them, for one training.

    All that a method of training would do differently is here: which tensors are trained, which weights stand in for
    the model's (`logits`), what a step does, and what the weights have become (`change`). Plain fine-tuning trains the
    weights.
    """

    def __init__(
        self, loaded: LoadedModel, position: TuningPosition, settings: TrainingSettings, forward: Forward | None = None
    ):
        model = loaded.model
        self.forward, self.settings = forward or partial(full_forward, model), settings
        self.base = {name: model.get_parameter(name).detach().float() for name in parameter_names(model, position)}
        self.weights = {name: value.clone().requires_grad_() for name, value in self.base.items()}
        self.steps, self.pieces, self.diverged = 0, 1, False
        self.reset_optimiser()

    def reset_optimiser(self) -> None:
        """Forget all momentum."""
        self.optimiser = torch.optim.Adam(
            self.weights.values(), lr=self.settings.learning_rate, weight_decay=0.0, fused=True
        )

    def logits(self) -> SupervisedLogits:
        return self.forward(self.weights)

    def change(self) -> dict[str, torch.Tensor]:
        """Difference of the weights from the base, on the CPU."""
        return {name: (self.weights[name].detach() - self.base[name]).cpu() for name in self.base}

    @torch.enable_grad()
    def step(self, batch: Sequence[TokenRow]) -> float:
        """Loss of a batch before the step, and the step unless it is skipped. The weights stay finite.

        When memory runs out, this and all later batches are computed in twice as many pieces, down to single edits.
        """
        trained = list(self.weights.values())
        while True:
            try:
                loss, gradients = loss_and_gradients(
                    self.logits(),
                    trained,
                    batch,
                    self.settings.loss_average,
                    at_least=self.settings.skip_below,
                    pieces=self.pieces,
                )
                break
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self.pieces >= len(batch):
                    raise
                self.pieces = min(2 * self.pieces, len(batch))
        if not math.isfinite(loss) or (gradients is not None and not all_finite(gradients)):
            self.diverged = True
        elif gradients is not None:
            for weight, gradient in zip(trained, gradients, strict=True):
                weight.grad = gradient
            self.optimiser.step()
            self.steps += 1
        return loss


def _breadth_first(trainer: PositionTrainer, rows: Sequence[TokenRow], settings: TrainingSettings) -> list[float]:
    """Mean loss of each epoch. A diverged training ends with the last whole epoch."""
    losses: list[float] = []
    order = torch.Generator().manual_seed(settings.seed)
    for _ in range(settings.epochs):
        total = 0.0
        for batch in _shuffled_batches(rows, settings.batch_size, order):
            loss = trainer.step(batch)
            if trainer.diverged:
                return losses
            total += loss * len(batch)
        losses.append(total / len(rows))
        if losses[-1] < settings.stop_below:
            break
    return losses


def _depth_first(trainer: PositionTrainer, rows: Sequence[TokenRow], settings: TrainingSettings) -> list[float]:
    """Last loss of each batch. A diverged training ends with the last whole batch."""
    losses: list[float] = []
    order = torch.Generator().manual_seed(settings.seed)
    for batch in _shuffled_batches(rows, settings.batch_size, order):
        trainer.reset_optimiser()  # each batch is an edit of its own
        for _ in range(settings.epochs):
            loss = trainer.step(batch)
            if trainer.diverged:
                return losses
            if loss < max(settings.stop_below, settings.skip_below):  # below skip_below nothing would change any more
                break
        losses.append(loss)
    return losses


def _shuffled_batches(rows: Sequence[TokenRow], size: int, order: torch.Generator) -> list[list[TokenRow]]:
    drawn = torch.randperm(len(rows), generator=order).tolist()
    return [[rows[index] for index in drawn[start : start + size]] for start in range(0, len(rows), size)]
