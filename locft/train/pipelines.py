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
from locft.model.positions import TuningPosition, parameter_names
from locft.model.structure import is_input_first
from locft.process import runs_ahead
from locft.train.examples import Guard, TrainingExamples
from locft.train.kept_state import KeptState
from locft.train.methods import Loss, MethodSettings, Parameter, make_method
from locft.train.methods.curvature import Curvature
from locft.train.objective import (
    LOSS_ROWS,
    BatchLoss,
    LossAverage,
    all_finite,
    edit_losses,
    loss_and_gradients,
    mean_loss,
)
from locft.train.reference import full_forward
from locft.train.token_rows import Forward, SupervisedLogits, TokenRow

Pipeline = Literal["breadth_first", "depth_first", "stream"]
LONGEST_REST = 2
"""Maximum number of consecutive epochs that an edit is left out of."""
REVIEWS, REVIEWED = 2, 20
"""How often earlier edits are reviewed after an arrival of a stream that replays, and how many of them each time."""
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
    """stream: number of earlier edits drawn for each step. Their loss is added to that of the new ones. Unless it is 0, earlier
    edits are also reviewed after each arrival (`PositionTrainer.review`)."""
    momentum: Literal["fresh", "kept"] = "fresh"
    """stream: whether the optimiser starts from scratch at each arrival or keeps its state."""
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
    """Prompts on which the answers are held to the unedited model's (`locft.train.examples.Guards`)."""
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
    if settings.pipeline == "stream":
        losses = _stream(trainer, beside)
    elif settings.pipeline == "depth_first":
        losses = _depth_first(trainer)
    else:
        losses = trainer.learn(range(len(examples)), kept=beside.kept)
    trainer.settle()  # in case the time ran out within an epoch
    if beside.kept:
        beside.kept.drop()
    delta, seconds = trainer.delta(), trainer.seconds
    trained_loss = None if trainer.diverged else final_loss(trainer.logits(), examples, settings, trainer.pieces)
    return Training(
        delta=delta,
        losses=tuple(losses),
        steps=trainer.steps,
        diverged=trainer.diverged,
        seconds=seconds,
        pieces=trainer.pieces,
        arrival_seconds=tuple(trainer.arrival_seconds),
        watched=tuple(trainer.watched),
        trained_loss=trained_loss,
    )


def final_loss(logits: SupervisedLogits, examples: TrainingExamples, settings: TrainingSettings, pieces: int) -> float:
    """Mean loss of all edits as raw prompts, in nats. pieces: number of parts that a batch of the training was computed in."""
    return mean_loss(logits, examples.raw, _rows_at_once(settings, pieces))


def _rows_at_once(settings: TrainingSettings, pieces: int) -> int:
    return LOSS_ROWS if pieces == 1 else max(1, settings.batch_size // pieces)


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

    def wake(self, losses: torch.Tensor) -> None:
        """End the rests of edits that are not learnt after all. losses: (E,), of every edit in the format it is learnt worst in."""
        self.state[:2, losses >= self.below] = 0.0


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
        self.loaded, self.position, self.settings, self.examples = loaded, position, settings, examples
        self.forward = forward or partial(full_forward, model)
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
        self.deadline = self.started + earlier.seconds if earlier else math.inf
        self.arrival_seconds: list[float] = []
        self.watched: list[Any] = []
        new = len(examples) - self.first_new
        together = settings.arrival if settings.pipeline == "stream" else max(1, len(examples))
        batches = sum(math.ceil(min(together, new - at) / settings.batch_size) for at in range(0, new, together))
        self.method = make_method(parameters, settings, curvature, settings.epochs * batches)
        # drawn separately: the order of the edits can change without what is drawn for each of them
        self.order, self.draws = (torch.Generator().manual_seed(settings.seed) for _ in range(2))
        self.steps, self.pieces, self.diverged = 0, 1, False
        device = next(iter(parameters.values())).base.device
        self.ahead = runs_ahead(device) and self.method.needs_no_number and not examples.guards
        """Whether steps are decided on the device; otherwise each waits for its loss. Reading a number from a GPU means waiting until
        all queued work is done, and the GPU then idles until more arrives. On a CPU, where reading costs nothing, a step that is
        skipped is not computed to its end."""
        self.outcome = torch.zeros(2, dtype=torch.long, device=device)
        """Of such steps: number taken since the last `settle`, and 1 once the training has diverged: none is taken from then on."""

    @property
    def seconds(self) -> float:
        """Time of the training so far, including that of a killed process."""
        return time.perf_counter() - self.started

    @property
    def ended(self) -> bool:
        """True if no further step should follow: the training is known to have diverged, or its time is up."""
        return self.diverged or time.perf_counter() > self.deadline

    def delta(self) -> EditDelta:
        """What the steps so far have changed."""
        change = self.method.change()
        return EditDelta(str(self.position), self.loaded.fingerprint, change, asdict(self.settings))

    def logits(self) -> SupervisedLogits:
        return self.forward(self.method.weights)

    def settle(self) -> None:
        """Wait for the steps so far to find out how many were taken and whether the training diverged."""
        taken, lost = self.outcome.tolist()
        self.steps, self.diverged = self.steps + taken, self.diverged or bool(lost)
        self.outcome[0] = 0

    def learn(self, edits: Sequence[int], earlier: int = 0, kept: KeptState | None = None) -> list[float]:
        """Train some edits in epochs; returns, per epoch, the mean over the edits of their last known losses. An epoch that is
        cut short, by divergence or the time limit, is left out.

        earlier: number of examples, from the first, that may be replayed. kept: where the state is saved, to resume if killed.
        """
        settings = self.settings
        rests = Rests(len(edits), settings.rest_below)
        losses = self.resumed(kept, rests)
        for _ in range(len(losses), settings.epochs):
            awake, total = rests.epoch()
            asked: list[tuple[list[int], BatchLoss]] = []
            for batch in self.shuffled_batches(awake):
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
            if losses[-1] < settings.stop_below and self.learnt_in_all_formats(edits, settings.stop_below, rests):
                break
            self.keep(kept, losses, rests)
        return losses

    def learnt_in_all_formats(self, edits: Sequence[int], below: float, rests: Rests | None = None) -> bool:
        """Whether the mean loss of edits over all trained formats is below a threshold. Each step draws one format for each edit,
        so that the loss of a few steps may be that of one format. If it is not, edits of which a format is not learnt rest no
        longer."""
        rows = [row for edit in edits for row in self.examples.plain[edit]]
        if len(rows) == len(edits):
            return True  # one format: the loss of the steps is that of all
        settings = self.settings
        losses = edit_losses(self.logits(), rows, settings.loss_average, _rows_at_once(settings, self.pieces))
        if rests:
            rests.wake(losses.reshape(len(edits), -1).amax(1))
        return float(losses.mean()) < below

    def review(self, earlier: int) -> None:
        """Find what a stream has forgotten, and train it: of `REVIEWED` earlier edits, drawn from the first `earlier`, the prompts
        in trained formats that are no longer learnt, in one step on the worst of them; this `REVIEWS` times, or until all are
        learnt."""
        settings = self.settings
        learnt = max(settings.rest_below, settings.stop_below)
        for _ in range(REVIEWS):
            drawn = torch.randperm(earlier, generator=self.draws)[:REVIEWED].tolist()
            rows = [row for edit in drawn for row in self.examples.plain[edit]]
            at_once = _rows_at_once(settings, self.pieces)
            losses = edit_losses(self.logits(), rows, settings.loss_average, at_once).tolist() if rows else ()
            worst = sorted(zip(losses, rows, strict=True), key=lambda pair: -pair[0])[:REVIEWED]
            forgotten = [row for loss, row in worst if loss >= learnt]
            if self.ended or not forgotten:
                break
            self.step_on(forgotten)
            self.settle()

    def shuffled_batches(self, edits: Sequence[int]) -> list[list[int]]:
        size, drawn = self.settings.batch_size, torch.randperm(len(edits), generator=self.order).tolist()
        return [[edits[index] for index in drawn[start : start + size]] for start in range(0, len(edits), size)]

    def keep(self, kept: KeptState | None, losses: Sequence[float], rests: Rests | None = None) -> None:
        """Save everything that the steps so far have changed, if the last time is long ago. rests: None between two arrivals of a
        stream, where no edit rests."""
        if kept is None or not kept.due():
            return
        tensors = {"draws": self.draws.get_state(), "order": self.order.get_state()}
        if rests:
            tensors["rests"] = rests.state
        about = {"losses": losses, "steps": self.steps, "pieces": self.pieces, "seconds": self.seconds}
        stream = {"arrival_seconds": self.arrival_seconds, "watched": self.watched}
        kept.write({**self.method.state(), **tensors}, {**about, **stream})

    def resumed(self, kept: KeptState | None, rests: Rests | None = None) -> list[float]:
        """Restore the last state that a killed process saved; returns its losses so far, [] if it saved none."""
        found = kept and kept.read()
        if not found:
            return []
        state, about = found
        self.draws.set_state(state.pop("draws"))
        self.order.set_state(state.pop("order"))
        if rests:
            rests.state.copy_(state.pop("rests"))
        self.method.restore(state)
        self.steps, self.pieces = about["steps"], about["pieces"]
        self.arrival_seconds, self.watched = about["arrival_seconds"], about["watched"]
        self.started -= about["seconds"]
        return about["losses"]

    def step(self, batch: Sequence[int], replay: Sequence[int] = ()) -> BatchLoss:
        """Take a step on a batch of edits, unless it is skipped; returns the loss before it. Rows are drawn again in each call.

        replay: earlier edits, whose loss is added for the step.
        """
        rows = [self.examples.draw(edit, self.draws) for edit in batch]
        return self.step_on(rows, [self.examples.draw(edit, self.draws) for edit in replay])

    @torch.enable_grad()
    def step_on(self, rows: Sequence[TokenRow], replay: Sequence[TokenRow] = ()) -> BatchLoss:
        """One step on given rows. The weights stay finite."""
        loss = self._loss_and_gradients(rows)
        if loss.gradients is None:
            self.diverged |= not math.isfinite(loss.value)
            return loss
        gradients, beside = loss.gradients, 0.0
        for more, value in self._beside(replay):
            gradients = [own.add_(other) for own, other in zip(gradients, more, strict=True)]
            beside += value
        if self.ahead:
            self._step_ahead(loss.numbers[0], gradients, beside)
        elif all_finite(gradients):
            self.method.step(gradients, loss.value, beside)
            self.steps += 1
        else:
            self.diverged = True
        return replace(loss, gradients=None)  # frees their memory while the next batch is computed

    def _loss_and_gradients(self, rows: Sequence[TokenRow]) -> BatchLoss:
        """Loss of rows and its gradients. When memory runs out, these and all later rows are computed in twice as many pieces, down
        to single edits."""
        trained, settings = list(self.method.weights.values()), self.settings
        average, at_least = settings.loss_average, settings.skip_below
        while True:
            try:
                return loss_and_gradients(
                    self.logits(), trained, rows, average, at_least=at_least, pieces=self.pieces, ahead=self.ahead
                )
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or self.pieces >= len(rows):
                    raise
                self.pieces = min(2 * self.pieces, len(rows))

    def _beside(self, replay: Sequence[TokenRow]) -> Iterator[tuple[Sequence[torch.Tensor], Loss]]:
        """Gradients to add to those of a batch, each with its part of the edit loss: those of replayed edits, unless they
        are still learnt, and those of guards."""
        settings, guards = self.settings, self.examples.guards
        if replay:
            found = self._loss_and_gradients(replay)
            if self.ahead:
                asked = self._is_asked(found.numbers[0])
                kept = [torch.where(asked, gradient, 0.0) for gradient in found.gradients or ()]
                yield kept, torch.where(asked, found.numbers[0], 0.0)
            elif found.gradients is not None:
                yield found.gradients, found.value
        if guards:
            penalty = settings.guard_weight * guards.drift(self.logits(), settings.guards_per_step, self.draws)
            yield torch.autograd.grad(penalty, list(self.method.weights.values())), 0.0

    def _step_ahead(self, value: torch.Tensor, gradients: Sequence[torch.Tensor], beside: Loss) -> None:
        """Take the step if a training that waits for the loss would take it. It is skipped by setting the optimiser's `found_inf`,
        as a gradient scaler does."""
        lost, asked, finite = self.outcome[1], self._is_asked(value), all_finite(gradients)
        taken = asked & finite & (lost == 0)
        lost.logical_or_(~value.isfinite() | (asked & ~finite))
        self.outcome[0].add_(taken)
        self.method.optimiser.found_inf = (~taken).float()
        self.method.step(gradients, value, beside)

    def _is_asked(self, value: torch.Tensor) -> torch.Tensor:
        """Whether a loss is such that a step follows."""
        return (value >= self.settings.skip_below) & (value < math.inf)


def _stream(trainer: PositionTrainer, beside: Beside) -> list[float]:
    """Last mean loss of each arrival. If training ends early, the last arrival counts with its last complete epoch, if any."""
    arrival, edits = trainer.settings.arrival, len(trainer.examples)
    losses = trainer.resumed(beside.kept)
    for first in range(trainer.first_new + arrival * len(losses), edits, arrival):
        started = time.perf_counter()
        if trainer.settings.momentum == "fresh":
            trainer.method.restart()
        arrived = range(first, min(first + arrival, edits))
        losses += trainer.learn(arrived, earlier=first)[-1:]
        if trainer.settings.replay and not trainer.ended:
            trainer.review(first)
        trainer.arrival_seconds.append(time.perf_counter() - started)
        if trainer.ended:
            break
        if beside.watch:
            began = time.perf_counter()
            found = beside.watch(arrived.stop, trainer.delta)
            trainer.started += time.perf_counter() - began  # this is no training time
            trainer.watched += [found] if found is not None else []
        trainer.keep(beside.kept, losses)
    return losses


def _depth_first(trainer: PositionTrainer) -> list[float]:
    """Last loss of each batch. If training diverges, only complete batches are included."""
    losses: list[float] = []
    settings = trainer.settings
    learnt = max(settings.stop_below, settings.skip_below)  # below skip_below nothing would change any more
    for batch in trainer.shuffled_batches(range(len(trainer.examples))):
        trainer.method.restart()  # each batch is an edit of its own
        for _ in range(settings.epochs):
            loss = trainer.step(batch).value
            trainer.settle()
            if trainer.diverged:
                return losses
            if loss < learnt and trainer.learnt_in_all_formats(batch, learnt):
                break
        losses.append(loss)
    return losses
