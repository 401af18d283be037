"""The stages of `locft bench`: pairs of training steps, pairs of measurements, and a study of trials, on both sides.

Counting arithmetic. A step's floating-point operations are those that it cannot do without: for each token 2 per matrix
element forward and 2 backward through the activations in the layers above the trained one; 2 forward and 2 for the
gradient in the trained matrices; 2 and 2 in the head for each supervised token. The last layer counts for supervised
tokens only, as no other token matters there. Not counted: its keys and values, attention scores, norms, padding, the
optimiser, experts and convolutions, and what the engine computes of the trained layer itself where it cannot begin
behind the matrix. So the share of the machine's speed that is reported errs on the low side.
"""

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from locft.engine.packing import pack_rows
from locft.errors import out_of_memory
from locft.measure.capability import score_suite
from locft.model.delta import EditDelta
from locft.model.models import DTYPES, LoadedModel
from locft.model.positions import TuningPosition, decoder_layers, parameter_names
from locft.model.precision import cast_model
from locft.train.examples import TrainingExamples
from locft.train.pipelines import PositionTrainer, TrainingSettings
from locft.train.token_rows import Forward, TokenRow
from locft.workbench import Measurement, Workbench
from tests.benchmarks.machine_speed import Marks, added_memory, launches, timed

LEARNING_RATE = 4e-3
SEED = 0
MEASUREMENTS = 2
"""Pairs of measurements at most: they last seconds each, where a step lasts milliseconds."""
WARM_UP_SECONDS = 3.0
"""Of training steps that are not counted, on either side: a training takes hundreds, and the first are slower."""
BRIEF_EPOCHS = 8
"""Training before a measurement: enough that the edited model answers differently from the unedited one."""
SAMPLED = 3
"""Layers at which the reference is measured for an estimate of a whole study."""

Say = Callable[[str], None]


@dataclass(frozen=True)
class BenchSettings:
    """What is measured; made by `read_settings`."""

    layers: tuple[int, ...]
    module: str
    batch_sizes: tuple[int, ...]
    """Edits per step; the first is also that of the study."""
    repeats: int
    """Pairs of steps; of measurements at most `MEASUREMENTS`."""
    epochs: int
    """Of the study, at most."""
    precision: str
    """In which the engine trains; the reference computes in the model's own dtype."""
    stages: tuple[str, ...]
    threads: int
    learning_rate: float = LEARNING_RATE
    beside: tuple[str, ...] = ()
    """Further precisions of the whole model in which the plain loop is measured."""
    whole_study: bool = False
    """Run every trial of the reference's study instead of estimating it from measured steps and measurements."""

    def training(self, epochs: int) -> TrainingSettings:
        return TrainingSettings(
            batch_size=self.batch_sizes[0],
            learning_rate=self.learning_rate,
            epochs=epochs,
            seed=SEED,
            precision=self.precision,
        )


def step_flops(model: PreTrainedModel, position: TuningPosition, tokens: int, supervised: int) -> int:
    """Floating-point operations that a training step cannot do without, as the head of this file counts them.

    tokens: of the batch, shared beginnings once. supervised: those of them that are trained on.
    """
    above = [_matrix_elements(layer.parameters()) for layer in decoder_layers(model)[position.layer + 1 :]]
    trained = _matrix_elements(model.get_parameter(name) for name in parameter_names(model, position))
    head = model.get_output_embeddings().weight.numel()
    entering = tokens if above else supervised
    return 4 * (tokens * sum(above[:-1]) + supervised * sum(above[-1:]) + entering * trained + supervised * head)


def drawn_batches(rows: Sequence[TokenRow], size: int, count: int) -> list[list[TokenRow]]:
    """This many whole batches, drawn as epochs are; the same for both sides and in every run."""
    order, batches = torch.Generator().manual_seed(SEED), []
    while len(batches) < count:
        drawn = torch.randperm(len(rows), generator=order).tolist()
        starts = range(0, len(rows) - size + 1, size)
        batches += [[rows[index] for index in drawn[start : start + size]] for start in starts]
    return batches[:count]


def step_seconds(trainer: PositionTrainer, batches: Sequence[Sequence[TokenRow]]) -> list[tuple[float, float]]:
    """Optimiser steps one after the other, on a GPU queued as in a training: of each the loss before it, and its seconds."""
    marks, losses = Marks(next(iter(trainer.method.weights.values())).device), []
    for batch in batches:
        losses.append(trainer.step_on(batch))
        marks.mark()
    trainer.settle()
    if trainer.diverged:
        raise FloatingPointError(f"the loss or a gradient is not finite at losses {[loss.value for loss in losses]}")
    return [(loss.value, seconds) for loss, seconds in zip(losses, marks.seconds(), strict=True)]


def trainer_of(
    loaded: LoadedModel, position: TuningPosition, forward: Forward | None = None, learning_rate: float = LEARNING_RATE
) -> PositionTrainer:
    """Of a training that skips no step. forward: the full one by default."""
    settings = TrainingSettings(learning_rate=learning_rate, skip_below=0.0)
    return PositionTrainer(loaded, TrainingExamples.of_rows(()), position, settings, forward)


def training_step(
    bench: Workbench, position: TuningPosition, size: int, settings: BenchSettings, gflops: Mapping[str, float]
) -> dict[str, Any]:
    """Steps on the same batches. Both sides begin with the same weights and follow their own gradients.

    The steps of a side follow each other, as in a training: taken in turn, each would find the processor's caches full
    of the other's numbers. Before the first, both sides train copies that are thrown away, for the same time.
    """
    loaded, engine = bench.loaded, bench.engine
    batches = drawn_batches(bench.rows, size, settings.repeats + 1)
    make_forward = partial(engine.training_forward, position, bench.rows, DTYPES[settings.precision])
    device, rate = loaded.model.device, settings.learning_rate
    forward, setup_seconds = timed(make_forward, device)
    theirs, ours = (_steps(loaded, position, side, batches, rate) for side in (None, forward))
    differences = [_difference(before, loss) for (before, _), (loss, _) in zip(theirs, ours, strict=True)]
    in_float32 = engine.training_forward(position, bench.rows, torch.float32)
    exact = trainer_of(loaded, position, in_float32).step_on(batches[0]).value
    counted = batches[1:]  # before the first, both sides have the same weights, before the others not quite
    slow, quick = ([seconds for _, seconds in side[1:]] for side in (theirs, ours))
    tokens = [sum(len(row.token_ids) for row in batch) for batch in counted]
    computed = [int((pack_rows(engine.tree, batch, engine.limit).nodes >= 0).sum()) for batch in counted]
    supervised = [sum(len(row.target_ids) for row in batch) for batch in counted]
    flops = [step_flops(loaded.model, position, *pair) for pair in zip(computed, supervised, strict=True)]

    def first_step(make: Callable[[], Forward | None]) -> None:
        step_seconds(trainer_of(loaded, position, make()), batches[:1])

    sides: dict[str, Any] = {}
    for side, make, made in (("reference", lambda: None, None), ("engine", make_forward, forward)):
        sides[f"{side}_added_bytes"] = added_memory(partial(first_step, make), device)
        launched = launches(partial(trainer_of(loaded, position, made).step_on, batches[0]), device)
        sides |= {f"{side}_{what}": found for what, found in launched.items()}
    return {
        **_pairs(slow, quick),
        "batch_size": size,
        "precision": settings.precision,
        "tokens": statistics.median(tokens),
        "reference_tokens_per_second": _median_rate(tokens, slow),
        "engine_tokens_per_second": _median_rate(tokens, quick),
        "share_of_matrix_speed": _median_rate(flops, quick) / (gflops[settings.precision] * 1e9),
        "first_loss_difference": differences[0],  # of the same weights
        "first_loss_difference_float32": _difference(theirs[0][0], exact),
        "loss_difference": max(differences),
        "setup_seconds": setup_seconds,
        **sides,
    }


def _plain_steps(
    loaded: LoadedModel, rows: Sequence[TokenRow], position: TuningPosition, size: int, settings: BenchSettings
) -> float:
    """Median seconds of the plain loop's steps on the batches of `training_step`."""
    batches = drawn_batches(rows, size, settings.repeats + 1)
    steps = _steps(loaded, position, None, batches, settings.learning_rate)[1:]
    return statistics.median(seconds for _, seconds in steps)


def _median_rate(amounts: Sequence[int], seconds: Sequence[float]) -> float:
    return statistics.median(amount / took for amount, took in zip(amounts, seconds, strict=True))


def plain_beside(
    bench: Workbench, settings: BenchSettings, precision: str, layers: Mapping[str, Mapping[str, Any]], say: Say
) -> None:
    """Adds to the entries of steps, under "beside", what the plain loop takes with the model in this precision, and its ratio
    to the engine; None where memory does not hold it."""
    loaded = bench.loaded
    other = cache(
        lambda: replace(loaded, model=cast_model(loaded.model, DTYPES[precision], loaded.fingerprint, on_disk=False))
    )
    for layer, found in layers.items():
        for name in (name for name in found if name.startswith("training_step")):
            entry, position = found[name], TuningPosition(int(layer), settings.module)
            try:
                seconds = _plain_steps(other(), bench.rows, position, entry["batch_size"], settings)
                told = f"{seconds:.3f} s"
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                seconds, told = None, "no memory"
            entry.setdefault("beside", {})[precision] = (seconds, seconds and seconds / entry["engine_seconds"])
            say(f"{position} {name}: the plain loop in {precision}: {told}")


def _steps(
    loaded: LoadedModel,
    position: TuningPosition,
    forward: Forward | None,
    batches: Sequence[Sequence[TokenRow]],
    learning_rate: float,
) -> list[tuple[float, float]]:
    """Losses and seconds of steps from the beginning of a training, behind others that warm up."""
    _warm_up(trainer_of(loaded, position, forward, learning_rate), batches)
    return step_seconds(trainer_of(loaded, position, forward, learning_rate), batches)


def measurements(bench: Workbench, position: TuningPosition, settings: BenchSettings) -> dict[str, dict[str, Any]]:
    """The two parts of `Workbench.measure` on one briefly trained delta, with the engine and the plain way.

    The plain way is the full model that generates every answer to its end; the engine generates only what the
    teacher-forced pass leaves open, until it is decided.
    """
    if "capability" not in settings.stages:
        bench = replace(bench, suite=None)
    delta = bench.train(position, settings.training(min(settings.epochs, BRIEF_EPOCHS))).delta
    if "edit_metrics" not in settings.stages:
        bench = replace(bench, questions=(), rows=bench.rows[:1])
    plain = replace(bench, engine=None)
    items = _items_differing(bench, delta)  # untimed: it warms up, too
    repeats = range(min(settings.repeats, MEASUREMENTS))
    pairs = [(plain.measure(delta, whole_answers=True), bench.measure(delta)) for _ in repeats]
    theirs, ours = pairs[0]
    seconds = {"edit_metrics": "evaluate_seconds", "capability": "capability_seconds"}
    found: dict[str, dict[str, Any]] = {}
    for name in (*seconds, "edit_metrics_and_capability"):
        parts = name.split("_and_")
        if {*parts} <= {*settings.stages}:
            sums = [[sum(one.metrics[seconds[part]] for part in parts) for one in pair] for pair in pairs]
            found[name] = _pairs(*zip(*sums, strict=True))
    if "edit_metrics" in found:
        found["edit_metrics"] |= _differences(theirs, ours)
    if "capability" in found:
        relative = {f"{name}_difference": _relative(theirs, ours, name) for name in ("drift_kl", "perplexity")}
        found["capability"] |= items | relative
    return found


def study_race(bench: Workbench, prepared: Mapping[str, Any], settings: BenchSettings, say: Say) -> dict[str, Any]:
    """All positions one after the other in this process: the engine's whole cost against the reference's.

    Unless the whole study is asked for, the reference's trials are estimated: the steps that the engine's trial took,
    times the reference's seconds per step, plus its seconds per measurement; both are measured at `SAMPLED` layers and
    interpolated between them. Steps that were skipped count nothing there, which favours the reference.
    """
    plain = replace(bench, engine=None)
    training = settings.training(settings.epochs)
    layers = sorted(settings.layers)
    at = np.linspace(0, len(layers) - 1, min(SAMPLED, len(layers))).round().astype(int)
    sampled = layers if settings.whole_study else [layers[index] for index in at]
    trials, step_seconds, measure_seconds = [], [], []
    for layer in layers:
        position = TuningPosition(layer, settings.module)
        trained, seconds = timed(partial(bench.train, position, training))  # both end with numbers on the CPU
        measured, more = timed(partial(bench.measure, trained.delta))
        trial = {"layer": layer, "steps": trained.steps, "diverged": trained.diverged, "engine_seconds": seconds + more}
        if settings.whole_study:
            again, seconds = timed(partial(plain.train, position, training))
            theirs, more = timed(partial(plain.measure, again.delta, whole_answers=True))
            trial |= {"reference_seconds": seconds + more, **_metric_differences(theirs, measured)}
        elif layer in sampled:
            size = settings.batch_sizes[0]
            step_seconds.append(_plain_steps(bench.loaded, bench.rows, position, size, settings))
            theirs, seconds = timed(partial(plain.measure, trained.delta, whole_answers=True))
            measure_seconds.append(seconds)
            trial |= _metric_differences(theirs, measured)
        trials.append(trial)
        say(f"study: {position}: {trained.steps} steps, {trial['engine_seconds']:.1f} s with the engine")
    if not settings.whole_study:
        for trial in trials:
            step, measure = (float(np.interp(trial["layer"], sampled, s)) for s in (step_seconds, measure_seconds))
            trial["reference_seconds"] = trial["steps"] * step + measure
    sides = ("reference_seconds", "engine_seconds")
    totals = {side: prepared["unedited"][side] + sum(trial[side] for trial in trials) for side in sides}
    totals["engine_seconds"] += prepared["boundary"]["seconds"]
    return {
        "positions": len(trials),
        "epochs": settings.epochs,
        "batch_size": settings.batch_sizes[0],
        **totals,
        "ratio": totals["reference_seconds"] / totals["engine_seconds"],
        "estimated": not settings.whole_study,
        "reference_measured_at_layers": sampled,
        "trials": trials,
    }


def _warm_up(trainer: PositionTrainer, batches: Iterable[Sequence[TokenRow]]) -> None:
    spent = 0.0
    for batch in itertools.cycle(batches):
        if spent >= WARM_UP_SECONDS:
            return
        spent += step_seconds(trainer, [batch])[0][1]


def _difference(theirs: float, ours: float) -> float:
    """Of two losses, relative to the reference's."""
    return abs(ours - theirs) / max(abs(theirs), 1e-3)


def _differences(theirs: Measurement, ours: Measurement) -> dict[str, int]:
    """How many questions the two sides judge differently, and how many answers read differently."""
    both = list(zip(theirs.outcomes, ours.outcomes, strict=True))
    return {
        "questions": len(both),
        "questions_differing": sum((a.correct, a.correct_tf) != (b.correct, b.correct_tf) for a, b in both),
        "answers_differing": sum(not _same_answer(a.got, b.got) for a, b in both),
    }


def _same_answer(whole: str, given_up: str) -> bool:
    """Is the second, which may be left unfinished once it is wrong, the first or its beginning?"""
    return whole == given_up or (given_up.endswith("…") and whole.startswith(given_up[:-1].rstrip()))


def _items_differing(bench: Workbench, delta: EditDelta) -> dict[str, int]:
    """How many capability items the two sides score differently."""
    if bench.suite is None:
        return {}
    sides = (replace(bench, engine=None).edited(delta), bench.edited(delta))
    scores = [score_suite(exact, bench.suite, coarse=coarse) for exact, coarse in sides]
    right = [[mark for task in score.correct.values() for mark in task] for score in scores]
    return {"items": len(right[0]), "items_differing": sum(a != b for a, b in zip(*right, strict=True))}


def _metric_differences(theirs: Measurement, ours: Measurement) -> dict[str, float]:
    names = ("reliability", "generalization", "locality", "capability")
    return {f"{n}_difference": abs(theirs.metrics[n] - ours.metrics[n]) for n in names if n in theirs.metrics}


def _relative(theirs: Measurement, ours: Measurement, name: str) -> float:
    """NaN where one of them is infinite."""
    expected = theirs.metrics.get(name, math.nan)
    return abs(ours.metrics.get(name, math.nan) - expected) / max(abs(expected), 1e-9)


def _pairs(reference: Sequence[float], engine: Sequence[float]) -> dict[str, Any]:
    ratios = [slow / quick for slow, quick in zip(reference, engine, strict=True)]
    return {
        "reference_seconds": statistics.median(reference),
        "engine_seconds": statistics.median(engine),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
        "repeats": len(ratios),
    }


def _matrix_elements(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters if parameter.ndim == 2)
