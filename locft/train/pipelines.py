"""Localized fine-tuning: its two pipelines (arXiv 2509.22072, section 4), and streams of edits.

This file decides which edits share a step, when a step is skipped and when training ends. The loss is in
`locft.train.objective`; how logits are computed is up to the forward function that is passed in (`full_forward` or the
tail engine).
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch

from locft.errors import out_of_memory
from locft.model.delta import EditDelta
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, is_input_first, parameter_names
from locft.process import runs_ahead
from locft.train.examples import TrainingExamples
from locft.train.guards import Guard
from locft.train.kept_state import KeptState
from locft.train.methods import MethodSettings, Parameter, make_method
from locft.train.methods.curvature import Curvature
from locft.train.objective import (
    LOSS_ROWS,
    BatchLoss,
    LossAverage,
    all_finite,
    loss_and_gradients,
    mean_loss,
)
from locft.train.reference import full_forward
from locft.train.steps_ahead import StepsAhead
from locft.train.token_rows import Forward, SupervisedLogits, TokenRow

Pipeline = Literal["breadth_first", "depth_first", "stream"]
LONGEST_REST = 2
"""Maximum number of consecutive epochs that an edit is left out of."""
Watch = Callable[[int, Callable[[], EditDelta]], Any]
"""Called after each arrival of a stream, with the number of edits that have arrived and a function that makes their delta. Its
return value (JSON-serialisable, None for nothing) is kept with the training."""


@dataclass(frozen=True)
class TrainingSettings(MethodSettings):
    """How an edit is trained. The defaults are the paper's for LLaMA-3-8B, apart from the batch size."""

    pipeline: Pipeline = "breadth_first"
    """breadth_first: epochs over all edits. depth_first: one pass, each batch trained to its end before the next.
    stream: edits arrive a few at a time, in file order, and are trained while earlier ones are replayed."""
    arrival: int = 1
    """stream: number of edits that arrive together. They are trained in epochs, as breadth_first trains all edits."""
    replay: int = 8
    """stream: number of earlier edits drawn for each step. Their loss is added to that of the new ones."""
    momentum: Literal["fresh", "kept"] = "fresh"
    """stream: whether the optimiser starts from scratch at each arrival or keeps its state."""
    batch_size: int = 32
    """Edits per optimiser step."""
    epochs: int = 25
    """Maximum number of epochs (breadth_first) or of steps per batch (depth_first)."""
    loss_average: LossAverage = "edit"
    """edit: mean over the tokens of an edit, then over the edits. token: mean over all tokens of the batch. last_token:
    every token of the answer is to be predicted by the last token of the prompt, as in FT-L (`locft.train.objective`)."""
    skip_below: float = 1e-2
    """A batch whose loss is below this takes no step. 0 never skips."""
    rest_below: float = 0.0
    """breadth_first, stream: an edit whose loss is below this rests (`Rests`). 0 disables resting."""
    stop_below: float = 1e-2
    """breadth_first: training ends when an epoch's mean loss is below this; stream: the training of an arrival does. depth_first:
    a batch's training ends when its loss is below this, or below `skip_below`. 0 disables this."""
    train_formats: str = "raw"
    """Prompt formats, of which one is drawn for each edit and epoch (`locft.train.formats.parse_formats`)."""
    prefix_share: float = 0.0
    """Share of prompts preceded by random prose, drawn for each edit and epoch (the paper's appendix A.4)."""
    guard: Guard = "none"
    """Prompts on which the answers are held to the unedited model's (`locft.train.guards`)."""
    guard_weight: float = 1.0
    """Penalty on drift on guards: nats of edit loss per nat of drift."""
    guards_per_step: int = 4
    """Guards in each optimiser step."""
    noise: float = 0.0
    """Noise on the hidden states that each step begins with, as a share of each feature's standard deviation."""
    shrink: Literal["no", "yes"] = "no"
    """yes: after training, the change is scaled down as far as possible without losing an edit, raw or in a trained format."""


@dataclass(frozen=True)
class Training:
    """The outcome of a fine-tuning run."""

    delta: EditDelta
    losses: tuple[float, ...]
    """breadth_first: mean loss of each epoch over the edits. depth_first: each batch's last loss. stream: each arrival's
    last mean loss."""
    steps: int
    """Optimiser steps taken; skipped ones are not counted."""
    diverged: bool
    """The loss or a gradient became infinite or NaN and ended training; the delta is that of the last finite weights."""
    seconds: float
    pieces: int = 1
    """Number of parts that a batch was computed in: more than 1 only if memory ran out. Affects only rounding."""
    arrival_seconds: tuple[float, ...] = ()
    """stream: seconds from each arrival to the end of its training."""
    watched: tuple[Any, ...] = ()
    """stream: the values that its `Watch` returned, without None."""
    trained_loss: float | None = None
    """Mean loss of all edits at the end, after any shrinking, computed as in training. Compared with the loss of the edit
    merged into the model's own dtype, it shows what rounding costs. None if training diverged."""


@dataclass(frozen=True)
class Earlier:
    """The earlier edits that a stream continues."""

    delta: EditDelta
    """The delta of the edits so far: training starts from it and produces one delta for all edits."""
    edits: int
    """Number of examples, counted from the first, that are already learnt and only replayed."""
    seconds: float = math.inf
    """Time limit: no step begins later than this after the start."""


@dataclass(frozen=True)
class Beside:
    """What runs alongside a training and does not affect its result."""

    watch: Watch | None = None
    """stream: called after each arrival; its time is not counted."""
    kept: KeptState | None = None
    """breadth_first, stream: where a long training saves its state, to resume there if it is killed."""


def finetune(
    loaded: LoadedModel,
    examples: TrainingExamples,
    position: TuningPosition,
    settings: TrainingSettings,
    forward: Forward | None = None,
    curvature: Mapping[str, Curvature] = MappingProxyType({}),
    earlier: Earlier | None = None,
    beside: Beside = Beside(),
) -> Training:
    """Train the position's parameters on the edits. The model itself is only read.

    forward: how logits are computed, by default the full forward. curvature: by parameter name, for the methods that need
    it. earlier: the edits that a stream continues. The trained copies are float32, whatever the model's dtype. On a CPU, the
    arguments other than `beside` determine the result bit for bit, unless a time limit ends it.
    """
    trainer = PositionTrainer(loaded, examples, position, settings, forward, curvature, earlier)

    def change() -> EditDelta:
        return EditDelta(str(position), loaded.fingerprint, trainer.method.change(), asdict(settings))

    if settings.pipeline == "stream":
        watch = beside.watch or (lambda _edits, _change: None)
        losses = _stream(trainer, settings, lambda edits: watch(edits, change), beside.kept)
    elif settings.pipeline == "depth_first":
        losses = _depth_first(trainer, settings)
    else:
        losses = _breadth_first(trainer, settings, beside.kept)
    trainer.settle()  # in case the time ran out within an epoch
    if beside.kept:
        beside.kept.drop()
    delta = change()
    seconds = trainer.seconds
    ended = None if trainer.diverged else final_loss(trainer.logits(), examples, settings, trainer.pieces)
    return Training(
        delta,
        tuple(losses),
        trainer.steps,
        trainer.diverged,
        seconds,
        trainer.pieces,
        tuple(trainer.arrival_seconds),
        tuple(trainer.watched),
        ended,
    )


def final_loss(logits: SupervisedLogits, examples: TrainingExamples, settings: TrainingSettings, pieces: int) -> float:
    """Mean loss of all edits as raw prompts, in nats. pieces: number of parts that a batch of the training was computed in."""
    return mean_loss(logits, examples.raw, LOSS_ROWS if pieces == 1 else max(1, settings.batch_size // pieces))


class Rests:
    """Decides which edits an epoch trains. An edit that is learnt is left out of the next epoch; each time it is still learnt
    after that, it is left out of the next two. So steps are spent where something is left to learn.
    """

    def __init__(self, edits: int, below: float):
        """below: an edit counts as learnt if its loss is below this. 0 disables resting."""
        self.below = below
        self.state = torch.zeros(3, edits, dtype=torch.float64)
        """For each edit: number of epochs that it is still left out of, length of its last rest, its last known loss."""

    def epoch(self) -> tuple[list[int], float]:
        """The edits of the next epoch, and the sum of the last known losses of the others."""
        left, _, losses = self.state
        resting = left > 0
        left[resting] -= 1
        return (~resting).nonzero()[:, 0].tolist(), float(losses[resting].sum())

    def asked(self, edits: Sequence[int], losses: Sequence[float]) -> None:
        """Record the losses of edits in this epoch, taken before the step on them."""
        found = torch.tensor(losses, dtype=torch.float64)
        longer = (2 * self.state[1, edits]).clamp(1, LONGEST_REST)
        length = torch.where(found < self.below, longer, 0.0)
        self.state[:, edits] = torch.stack([length, length, found])


class PositionTrainer:
    """Takes the steps of one training: computes losses and gradients of batches of edits and hands them to a method."""

    def __init__(
        self,
        loaded: LoadedModel,
        examples: TrainingExamples,
        position: TuningPosition,
        settings: TrainingSettings,
        forward: Forward | None = None,
        curvature: Mapping[str, Curvature] = MappingProxyType({}),
        earlier: Earlier | None = None,
    ):
        self.started = time.perf_counter()
        """Start time, shifted so that the time since then is training time only, including that of a killed process."""
        model = loaded.model
        self.forward, self.settings, self.examples = forward or partial(full_forward, model), settings, examples
        start = earlier.delta.tensors if earlier else {}
        parameters = {
            name: Parameter(
                base := model.get_parameter(name).detach().float(),
                is_input_first(model, name),
                start[name].to(base.device) if start else None,
            )
            for name in parameter_names(model, position)
        }
        self.first_new = earlier.edits if earlier else 0
        self.deadline = time.perf_counter() + earlier.seconds if earlier else math.inf
        self.arrival_seconds: list[float] = []
        self.watched: list[Any] = []
        new = len(examples) - self.first_new
        together = settings.arrival if settings.pipeline == "stream" else max(1, len(examples))
        batches = sum(math.ceil(min(together, new - at) / settings.batch_size) for at in range(0, new, together))
        self.method = make_method(parameters, settings, curvature, settings.epochs * batches)
        self.draws = torch.Generator().manual_seed(
            settings.seed
        )  # separate from that of the order: one can change without the other
        self.steps, self.pieces, self.diverged = 0, 1, False
        device = next(iter(parameters.values())).base.device
        ahead = runs_ahead(device) and self.method.needs_no_number and not examples.guards
        self.ahead = StepsAhead(device, settings.skip_below) if ahead else None
        """Set if steps are decided on the device; None if each waits for its loss."""

    @property
    def seconds(self) -> float:
        """Time of the training so far, including that of a killed process."""
        return time.perf_counter() - self.started

    def logits(self) -> SupervisedLogits:
        return self.forward(self.method.weights)

    def settle(self) -> None:
        """Wait for the steps so far to find out how many were taken and whether the training diverged."""
        if self.ahead:
            taken, lost = self.ahead.outcome.tolist()
            self.steps, self.diverged = self.steps + taken, self.diverged or bool(lost)
            self.ahead.outcome[0] = 0

    def watch(self, look: Callable[[], Any]) -> None:
        """Keep what `look` returns. Its time does not count as training time."""
        began = time.perf_counter()
        found = look()
        self.started += time.perf_counter() - began
        if found is not None:
            self.watched.append(found)

    @property
    def ended(self) -> bool:
        """True if no further step should follow: the training is known to have diverged, or its time is up."""
        return self.diverged or time.perf_counter() > self.deadline

    def step(self, batch: Sequence[int], replay: Sequence[int] = ()) -> BatchLoss:
        """Take a step on a batch of edits, unless it is skipped; returns the loss before it. Rows are drawn again in each call.

        replay: earlier edits, whose loss is added for the step.
        """
        rows = [self.examples.draw(edit, self.draws) for edit in batch]
        return self.step_on(rows, [self.examples.draw(edit, self.draws) for edit in replay])

    def learn(
        self, edits: Sequence[int], order: torch.Generator, earlier: int = 0, kept: KeptState | None = None
    ) -> list[float]:
        """Train some edits in epochs; returns, per epoch, the mean over the edits of their last known losses. An epoch that is
        cut short, by divergence or the time limit, is left out.

        earlier: number of examples, from the first, that may be replayed. kept: where the state is saved, to resume if killed.
        """
        settings = self.settings
        rests = Rests(len(edits), settings.rest_below)
        losses = self.resumed(kept, order, rests) if kept else []
        for _ in range(len(losses), settings.epochs):
            awake, total = rests.epoch()
            asked: list[tuple[list[int], BatchLoss]] = []
            for places in _shuffled_batches(len(awake), settings.batch_size, order):
                batch = [awake[place] for place in places]
                replay = torch.randperm(earlier, generator=self.draws)[: settings.replay].tolist() if earlier else ()
                asked.append((batch, self.step([edits[index] for index in batch], replay)))
                if self.ended:
                    return losses
            self.settle()
            if self.diverged:
                return losses
            for batch, loss in asked:
                total += loss.value * len(batch)
                rests.asked(batch, loss.by_edit)
            losses.append(total / len(edits))
            if losses[-1] < settings.stop_below:
                break
            if kept and kept.due():
                self.keep(kept, order, losses, rests)
        return losses

    def keep(
        self, kept: KeptState, order: torch.Generator, losses: Sequence[float], rests: Rests | None = None
    ) -> None:
        """Save everything that the steps so far have changed. rests: None between two arrivals of a stream, where no edit rests."""
        tensors = {"draws": self.draws.get_state(), "order": order.get_state()}
        if rests:
            tensors["rests"] = rests.state
        about = {"losses": losses, "steps": self.steps, "pieces": self.pieces, "seconds": self.seconds}
        stream = {"arrival_seconds": self.arrival_seconds, "watched": self.watched}
        kept.write({**self.method.state(), **tensors}, {**about, **stream})

    def resumed(self, kept: KeptState, order: torch.Generator, rests: Rests | None = None) -> list[float]:
        """Restore the last state that a killed process saved; returns its losses so far, [] if it saved none."""
        found = kept.read()
        if found is None:
            return []
        state, about = found
        self.draws.set_state(state.pop("draws"))
        order.set_state(state.pop("order"))
        if rests:
            rests.state.copy_(state.pop("rests"))
        self.method.restore(state)
        self.steps, self.pieces = about["steps"], about["pieces"]
        self.arrival_seconds, self.watched = about["arrival_seconds"], about["watched"]
        self.started -= about["seconds"]
        return about["losses"]

    @torch.enable_grad()
    def step_on(self, rows: Sequence[TokenRow], replay: Sequence[TokenRow] = ()) -> BatchLoss:
        """One step on given rows. The weights stay finite.

        When memory runs out, this and all later batches are computed in twice as many pieces, down to single edits.
        """
        while True:
            try:
                loss = self._loss_and_gradients(rows)
                break
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self.pieces >= len(rows):
                    raise
                self.pieces = min(2 * self.pieces, len(rows))
        gradients = loss.gradients
        beside: float | torch.Tensor = 0.0
        if gradients is not None:
            for more, value in self._beside(replay):
                gradients = [own.add_(other) for own, other in zip(gradients, more, strict=True)]
                beside += value
        if self.ahead and gradients is not None:
            self.ahead.step(self.method, loss.numbers, gradients, beside)
        elif not math.isfinite(loss.value) or (gradients is not None and not all_finite(gradients)):
            self.diverged = True
        elif gradients is not None:
            self.method.step(gradients, loss.value, beside)
            self.steps += 1
        return replace(loss, gradients=None)  # frees their memory while the next batch is computed

    def _loss_and_gradients(self, rows: Sequence[TokenRow]) -> BatchLoss:
        return loss_and_gradients(
            self.logits(),
            list(self.method.weights.values()),
            rows,
            self.settings.loss_average,
            at_least=self.settings.skip_below,
            pieces=self.pieces,
            ahead=self.ahead is not None,
        )

    def _beside(self, replay: Sequence[TokenRow]) -> Iterator[tuple[Sequence[torch.Tensor], float | torch.Tensor]]:
        """Gradients to add to those of a batch, each with its part of the edit loss: those of replayed edits, unless they
        are still learnt, and those of guards."""
        settings, guards = self.settings, self.examples.guards
        if replay:
            found = self._loss_and_gradients(replay)
            if found.gradients is not None:
                yield self.ahead.where_asked(found) if self.ahead else (found.gradients, found.value)
        if guards:
            trained = list(self.method.weights.values())
            drawn = settings.guard_weight, settings.guards_per_step, self.draws
            yield guards.gradients(self.logits(), trained, *drawn), 0.0


def _breadth_first(trainer: PositionTrainer, settings: TrainingSettings, kept: KeptState | None) -> list[float]:
    """Mean loss of each epoch. If training diverges, only complete epochs are included."""
    order = torch.Generator().manual_seed(settings.seed)
    return trainer.learn(range(len(trainer.examples)), order, kept=kept)


def _stream(
    trainer: PositionTrainer, settings: TrainingSettings, watch: Callable[[int], Any], kept: KeptState | None
) -> list[float]:
    """Last mean loss of each arrival. If training ends early, the last arrival counts with its last complete epoch, if any.

    watch: called after each arrival with the number of edits that have arrived.
    """
    order = torch.Generator().manual_seed(settings.seed)
    losses = trainer.resumed(kept, order) if kept else []
    done = trainer.first_new + settings.arrival * len(losses)
    for first in range(done, len(trainer.examples), settings.arrival):
        started = time.perf_counter()
        if settings.momentum == "fresh":
            trainer.method.restart()
        arrived = range(first, min(first + settings.arrival, len(trainer.examples)))
        found = trainer.learn(arrived, order, earlier=first)
        trainer.arrival_seconds.append(time.perf_counter() - started)
        losses += found[-1:]
        if trainer.ended:
            break
        trainer.watch(partial(watch, arrived.stop))
        if kept and kept.due():
            trainer.keep(kept, order, losses)
    return losses


def _depth_first(trainer: PositionTrainer, settings: TrainingSettings) -> list[float]:
    """Last loss of each batch. If training diverges, only complete batches are included."""
    losses: list[float] = []
    order = torch.Generator().manual_seed(settings.seed)
    for batch in _shuffled_batches(len(trainer.examples), settings.batch_size, order):
        trainer.method.restart()  # each batch is an edit of its own
        for _ in range(settings.epochs):
            loss = trainer.step(batch).value
            trainer.settle()
            if trainer.diverged:
                return losses
            if loss < max(settings.stop_below, settings.skip_below):  # below skip_below nothing would change any more
                break
        losses.append(loss)
    return losses


def _shuffled_batches(edits: int, size: int, order: torch.Generator) -> list[list[int]]:
    drawn = torch.randperm(edits, generator=order).tolist()
    return [drawn[start : start + size] for start in range(0, edits, size)]
