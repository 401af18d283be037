"""What is left of a study, and what it will take until it is done or its budget ends it: time, memory and disk, with ranges.

The work of a trial is a fixed part (output projection, optimiser, generation) and a part for each layer from the trained one
upwards. `rough_seconds` has the rates of one machine for both; they are scaled by earlier trials of the model on this machine, or
else by a few timed steps at its first, middle and last layer. Imports inside functions keep PyTorch out of the start of commands.
"""

import gc
import heapq
import logging
import math
import platform
import re
import statistics
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Literal

import psutil

from analysis.stats.axes import AXIS, STAGES
from analysis.stats.wording import plural
from locft.errors import InputError
from locft.machine import usable_cores
from sweeps.study.footprint import (
    BYTES,
    depth_sentence,
    disk_range,
    gpu_sentence,
    memory_range,
    most_memory_bytes,
    this_machine,
)
from sweeps.study.plan import PreparedStudy
from sweeps.study.schema import Resources
from sweeps.study.trial_types import StudyFacts, TrialConfig, TrialResult

TRIALS = 200
"""Number of earlier trials to look at: the latest ones."""
ENOUGH = 3
"""Use the earlier trials if there are at least this many."""
TIMED_EDITS, TIMED_STEPS, TIMED_PROSE = 16, 3, 64
"""Most edits in a timed step, timed steps at each of the three layers, and tokens of the prose whose curvature they use."""
ROUGH = "rough rates, not measured on this machine"

_PREFIX_TOKENS = 10
"""Tokens of the prose in front of a prompt."""
_SUPERVISED_SHARE = 0.3
"""Share of the tokens read whose logits are computed."""
_GENERATED_SHARE = 0.3
"""Share of the evaluation's tokens that are read again, through all layers, to generate undecided answers."""
_CURVATURE_TOKENS = 4 * 32 * 128 + 3 * 64 * 128
"""Cost of generating the text and measuring curvature on it, in tokens read, on all cores (`locft.background`)."""
_FURTHER_TOKENS = 8 * 64
"""Tokens of a step of ordinary fine-tuning (`locft.further`)."""
_START_SECONDS = 40.0
"""Overhead once per study: Ray and its workers, the model, the tracking store, the report, and training the pick again."""
_MEASURING = 1.7
"""If only steps were timed: the scale of measuring is this multiple of the scale of steps, each relative to its rough rate.
For edit metrics and capability it was 0.9 and 1.3 on one machine with bfloat16 instructions, 2.1 and 2.2 on another."""
_SHARE_OF_STEPS = {"breadth_first": 0.9, "depth_first": 0.8, "stream": 0.3}
"""Share of the steps allowed by `epochs` that is usually taken before `stop_below` ends the training."""
_LEAST_STEPS = 0.3
"""The same share if everything is learnt early."""
_HANGS, _PATIENCE_SECONDS = 30.0, 1800.0
"""A trial counts as hanging after this many times its estimate, but never sooner than this: its worker may be loading a model."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Costs:
    """Factors that scale the rough rates (`rough_seconds`) to this machine, and how certain they are."""

    cpus: int = 2
    """Threads of a trial."""
    train: float = 1.0
    evaluate: float = 1.0
    capability: float = 1.0
    source: str = ROUGH
    """Human-readable source of the numbers."""
    spread: float = 2.0
    """The true time is expected within this factor either way, apart from what early stopping leaves open."""
    busy: float = 1.0
    """Factor by which other work on the machine slowed the timed steps; the low estimate assumes an idle machine."""
    shares: Mapping[str, float] = field(default_factory=_SHARE_OF_STEPS.copy)
    """By pipeline: share of the allowed steps that trials take."""

    @property
    def measured(self) -> bool:
        """Whether the costs were measured on this machine."""
        return self.source != ROUGH

    def unedited(self, facts: StudyFacts, trials: Sequence[TrialConfig]) -> float:
        """Seconds to measure the unedited model and the curvature that these trials need, once per study."""
        read = facts.evaluation_tokens + facts.capability_tokens + facts.generated_tokens
        seconds = reading_seconds(read, facts.parameters, facts.precision, self.cpus)
        if any(AXIS["curvature_strength"].counts({"method": trial.method}) for trial in trials):
            seconds += reading_seconds(_CURVATURE_TOKENS, facts.parameters, facts.precision, usable_cores())
        return self.capability * seconds


def _batch(trial: TrialConfig) -> int:
    """New edits in a full step."""
    return min(trial.batch_size, trial.arrival) if trial.pipeline == "stream" else trial.batch_size


@dataclass(frozen=True)
class Estimate:
    """What the rest of a plan takes. Seconds are wall-clock time; memory and disk are those of one machine."""

    trials: int
    """Trials to run: the open ones, or as many of them as the budget allows (approximate for a budget in minutes)."""
    left: int
    """Planned trials that are not done."""
    ended_by: Literal["trials", "minutes"] | None
    """The budget that ends the study before its plan is complete; None if neither does."""
    concurrent: int
    seconds_low: float
    """If training stops early, on a machine that does nothing else."""
    seconds: float
    seconds_high: float
    """If every trial takes all its epochs, on a slow machine."""
    seconds_per_trial: float
    """Mean over the trials to run."""
    memory_bytes_low: int
    """Driver and all workers together: what they hold in any case."""
    memory_bytes_high: int
    """With everything that may come on top: the largest logits and curvature factors, in all workers at once."""
    disk_bytes_low: int
    """Weights in the cache and the study in the tracking store, without the model itself; the high value adds hidden states."""
    disk_bytes_high: int
    source: str
    """What the seconds are based on."""


@dataclass(frozen=True)
class Forecast:
    """What the open trials of a study are expected to take, together and each."""

    prepared: PreparedStudy
    costs: Costs
    done: frozenset[str] = frozenset()
    """Ids of the trials that are not open."""
    concurrent: int = 1
    """Trials at a time."""
    made: float = field(default_factory=time.monotonic)
    """When it was made, on the `time.monotonic()` clock; the budget's minutes count from then."""

    def seconds(self, trial: TrialConfig) -> float:
        return trial_seconds(trial, self.prepared.facts, self.costs, None)

    def on(self, nodes: Sequence[Mapping[str, float]]) -> "Forecast":
        """The same forecast for these nodes (Ray's resources of each); one trial at a time even if none fits."""
        trial_bytes = most_memory_bytes(self.prepared.plan.sample, self.prepared.facts)
        try:
            return replace(self, concurrent=self.prepared.study.resources.places(nodes, trial_bytes))
        except InputError:
            return replace(self, concurrent=1)

    @cached_property
    def estimate(self) -> Estimate:
        """Time, memory and disk of the open trials, `concurrent` at a time, until the budget ends them.

        The middle time assumes the usual share of a trial's epochs, the high one all of them, the low one few.
        """
        plan, facts, costs, budget = self.prepared.plan, self.prepared.facts, self.costs, self.prepared.study.budget
        sample = [trial for trial in plan.sample if trial.id not in self.done]
        left = len(sample) if plan.trials else max(0, plan.count - len(self.done))
        affordable = left if budget.trials is None else max(0, min(left, budget.trials - len(self.done)))
        if plan.trials:
            sample = sample[:affordable]
        limit = 60 * budget.minutes if budget.minutes else math.inf
        start = _START_SECONDS + costs.unedited(facts, plan.sample)

        def each(share: float | None) -> list[float]:
            """Seconds of every trial; one that a search has yet to choose is given the mean of the sample."""
            seconds = [trial_seconds(trial, facts, costs, share) for trial in sample]
            return seconds if plan.trials or not seconds else [statistics.fmean(seconds)] * affordable

        usual = each(None)
        ends = _ends(usual, self.concurrent, start)
        low, high = (max(_ends(each(share), self.concurrent, start), default=0.0) for share in (_LEAST_STEPS, 1.0))
        total, trials = max(ends, default=0.0), sum(end <= limit for end in ends)
        memory, disk = memory_range(sample, facts, self.concurrent), disk_range(sample, trials, facts)
        return Estimate(
            trials=trials,
            left=left,
            ended_by="minutes" if total > limit else "trials" if affordable < left else None,
            concurrent=self.concurrent,
            seconds_low=min(limit, low / costs.spread / costs.busy),
            seconds=min(limit, total),
            seconds_high=min(limit, high * costs.spread),
            seconds_per_trial=statistics.fmean(usual) if usual else 0.0,
            memory_bytes_low=memory[0],
            memory_bytes_high=memory[1],
            disk_bytes_low=disk[0],
            disk_bytes_high=disk[1],
            source=costs.source,
        )

    @property
    def memory_notes(self) -> list[str]:
        """How many trials fit on a GPU, if trials get one; otherwise the memory that a trial keeps, by depth."""
        sample, facts, resources = self.prepared.plan.sample, self.prepared.facts, self.prepared.study.resources
        note = gpu_sentence(resources, sample, facts) if resources.gpus else depth_sentence(sample, facts)
        return [note] if note else []

    @property
    def warnings(self) -> list[str]:
        """What does not fit on this machine, and what to do about it."""
        low, high = self.estimate.memory_bytes_low, self.estimate.memory_bytes_high
        have = psutil.virtual_memory().total
        if high <= have:
            return []
        least = "takes at least" if self.concurrent == 1 else "take at least"
        take, wanted = (least, low) if low > have else ("may take", high)
        return [
            f"memory: {plural(self.concurrent, 'trial')} at a time {take} {wanted / 2**30:.1f}"
            f" GiB, and this machine has {have / 2**30:.1f} GiB; run fewer trials at a time"
            " (resources.concurrent), or use smaller batches or dtype: bfloat16"
        ]


def make_forecast(
    prepared: PreparedStudy, finished: Collection[str] = (), earlier: Sequence[TrialResult] = (), *, timed: bool = True
) -> Forecast:
    """Forecast of what is left of a study on this machine.

    finished: ids of the study's finished trials. earlier: finished trials of this model on this machine (`machine`), in any
    study. timed: time some steps of the real model if there are too few earlier trials, instead of using rough rates.
    """
    done, costs = frozenset(finished), Costs(prepared.study.resources.cpus)
    if len(done) < prepared.plan.count:
        costs = costs_from_trials(earlier, prepared) or (timed and costs_from_steps(prepared)) or costs
    return Forecast(prepared, costs, done).on([this_machine()])


def machine(resources: Resources) -> str:
    """Label of this machine and of a trial's share of it; the seconds of trials with the same label are comparable."""
    name = re.sub(r"[^\w.\-]", "-", platform.node())[:100] or "unknown"
    return f"{name} {resources.cpus} CPU {resources.gpus:g} GPU"


def rough_seconds(trial: TrialConfig, facts: StudyFacts, cpus: int, steps: float, edits: float) -> dict[str, float]:
    """Seconds to `train` a trial's position, to `evaluate` it on all edits that any trial asks about, and to measure its
    `capability`. edits: their number in all these steps together.

    At the rates of two cores with bfloat16 matrix instructions and a model of 135M parameters: a step takes 1.1 ns per
    parameter (its weights pass through memory) and 9 ps per parameter and token. A GPU is far faster.
    """
    layers = facts.n_layers - (0 if trial.further_steps else trial.layer)  # further steps change all weights
    head, through, supervised = facts.head_parameters, layers * facts.layer_parameters, _SUPERVISED_SHARE
    an_edit = facts.edit_tokens / facts.n_edits  # tokens of one as a raw prompt; a guard counts as one of these
    replayed = steps * trial.replay if trial.pipeline == "stream" else 0
    guards = trial.guards_per_step if trial.guard != "none" else 0
    a_row = facts.row_size(trial.train_formats) * an_edit + trial.prefix_share * _PREFIX_TOKENS
    tokens = (edits + replayed) * a_row + steps * guards * an_edit
    a_step, a_token = 8e-3 + 0.5e-9 * head + 1.1e-9 * through, 9e-12 * (supervised * head + through)
    asked_token = 10e-12 * (supervised * head + through + _GENERATED_SHARE * facts.parameters)
    generated = 10e-12 * facts.generated_tokens * facts.parameters
    found = {
        "train": steps * a_step + tokens * a_token,
        "evaluate": facts.evaluation_tokens * asked_token,
        "capability": facts.capability_tokens * (15e-12 * supervised * head + 7e-12 * through) + generated,
    }
    return {part: _slowness(facts.precision, cpus) * seconds for part, seconds in found.items()}


def reading_seconds(tokens: int, parameters: int, precision: str, cpus: int) -> float:
    """Rough time that the whole model takes to read these tokens, at the same rates."""
    return _slowness(precision, cpus) * 15e-12 * tokens * parameters


def _slowness(precision: str, cpus: int) -> float:
    """Time in multiples of what one thread needs in bfloat16."""
    return (1.0 if precision == "bfloat16" else 2.0) / cpus


def costs_from_trials(earlier: Sequence[TrialResult], prepared: PreparedStudy) -> Costs | None:
    """The rough costs scaled by how long trials of this model took, whatever they trained and were measured on; None if
    there are fewer than `ENOUGH`."""
    measured = (trial for trial in earlier if {"n_edits", "train_seconds"} <= trial.metrics.keys())
    known = [trial for trial in measured if not trial.metrics.get("diverged")]
    if len(known) < ENOUGH:
        return None
    shares = dict(_SHARE_OF_STEPS)
    for pipeline in shares:
        those = [trial for trial in known if trial.config.pipeline == pipeline]
        if len(those) >= ENOUGH:
            allowed = sum(t.config.epochs * math.ceil(_trained(t) / _batch(t.config)) for t in those)
            shares[pipeline] = sum(trial.metrics["steps"] for trial in those) / allowed
    source = f"{len(known)} earlier trials of this model"
    return replace(_scaled(known, prepared), source=source, spread=1.4, shares=shares)


def costs_from_steps(prepared: PreparedStudy) -> Costs | None:
    """The rough costs scaled by timed optimiser steps of the real model; None if this process cannot do what a worker
    would (GPUs, more CPUs or memory than there are)."""
    import torch

    study, free = prepared.study, psutil.virtual_memory().available
    runs_here = study.trial_device == "cpu" and study.resources.cpus <= usable_cores()
    if not runs_here or not prepared.plan.sample or prepared.facts.parameters * BYTES[study.dtype] > free:
        return None
    before = torch.get_num_threads()
    torch.set_num_threads(study.resources.cpus)
    try:
        trials, busy = _timed_steps(prepared)
    except (InputError, RuntimeError, MemoryError) as reason:  # a missing estimate is no reason to refuse a plan
        _log.info("no steps were timed: %s", reason)
        return None
    finally:
        torch.set_num_threads(before)
        gc.collect()
    slowed = f", slowed by a factor of {busy:.1f} by other work" if busy > 1.3 else ""
    return replace(_scaled(trials, prepared), source=f"timed steps of this model{slowed}", spread=1.6, busy=busy)


def _timed_steps(prepared: PreparedStudy) -> tuple[list[TrialResult], float]:
    """Timed steps at the first, middle and last layer, as trials without measurements, and the factor by which other work
    slowed them: wall-clock time over processor time per thread."""
    from locft.model.models import load_model
    from locft.model.positions import TuningPosition
    from locft.train.pipelines import TrainingSettings
    from locft.train.token_rows import TokenRow
    from locft.workbench import Baseline, Workbench, in_memory

    study, facts, sample = prepared.study, prepared.facts, prepared.plan.sample
    size = min(statistics.median_low(trial.batch_size for trial in sample), TIMED_EDITS, facts.n_edits)
    few = tuple(replace(edit, rephrases=(), locality=(), portability=()) for edit in prepared.edits.requests[:size])
    edits, loaded = replace(prepared.edits, requests=few), load_model(study.model, dtype=study.dtype, device="cpu")
    layers = sorted({0, facts.n_layers // 2, facts.n_layers - 1})
    engine = partial(in_memory, layers=layers)
    bench = Workbench.prepare(loaded, edits, None, baseline=Baseline((), None), engine=engine)
    # the time of a step does not depend on the prose its curvature is measured on, and real prose takes a minute to read
    trainer = replace(bench.trainer, prose=(TokenRow(tuple(range(min(TIMED_PROSE, facts.vocabulary))), 1),))
    trials, clock, processor = [], 0.0, 0.0
    for layer in layers:
        sizes = {module: facts.trained_parameters[f"{layer}.{module}"] for module in facts.modules_by_layer[layer]}
        tried = [module for module in sizes if module in study.space.module] or [*sizes]
        module = sorted(tried, key=sizes.get)[len(tried) // 2]
        config = replace(sample[0], layer=layer, module=module, batch_size=size, epochs=TIMED_STEPS)
        settings = TrainingSettings(**config.training | {"skip_below": 0.0, "stop_below": 0.0})
        trainer.train(TuningPosition(layer, module), settings)  # warms up: one-time work must not count
        began = time.perf_counter(), time.process_time()
        training = trainer.train(TuningPosition(layer, module), settings)
        clock += time.perf_counter() - began[0]
        processor += time.process_time() - began[1]
        found = {"n_edits": float(size), "steps": float(training.steps), "train_seconds": training.seconds}
        trials.append(TrialResult(config, "done", metrics=found))
    return trials, max(1.0, clock * study.resources.cpus / processor) if processor else 1.0


def _scaled(trials: Sequence[TrialResult], prepared: PreparedStudy) -> Costs:
    """Costs with the ratios of the time that these trials took to their rough estimates."""
    facts, cpus = prepared.facts, prepared.study.resources.cpus
    measured, expected = Counter[str](), Counter[str]()
    for trial in trials:
        found, steps = trial.metrics, trial.metrics["steps"]
        rough = rough_seconds(trial.config, facts, cpus, steps, steps * _batch(trial.config))
        rough["evaluate"] *= found["n_edits"] / facts.n_asked
        if trial.config.data_fingerprint != facts.data_fingerprint:  # other items
            del rough["capability"]
        known = [part for part in rough if f"{part}_seconds" in found]
        measured.update({part: found[f"{part}_seconds"] for part in known})
        expected.update({part: rough[part] for part in known})

    def ratio(part: str, otherwise: float) -> float:
        return measured[part] / expected[part] if expected[part] else otherwise

    train = ratio("train", 1.0)
    evaluate = ratio("evaluate", _MEASURING * train)
    return Costs(cpus, train, evaluate, ratio("capability", evaluate))


def _trained(trial: TrialResult) -> float:
    """Edits that a finished trial trained, or those it asked about if its metrics do not say."""
    seconds = trial.metrics.get("seconds_per_edit")
    return round(trial.metrics["train_seconds"] / seconds) if seconds else trial.metrics["n_edits"]


def trial_seconds(trial: TrialConfig, facts: StudyFacts, costs: Costs = Costs(), share: float | None = 1.0) -> float:
    """Seconds of one trial, measurements included. share: of the steps allowed; None: the usual one of its pipeline."""
    edits = facts.trained(trial)
    taken = costs.shares[trial.pipeline] if share is None else share
    measured = 1 if trial.pipeline != "stream" else max(1, min(STAGES, math.ceil(edits / trial.arrival)))
    asked = (measured + 1) / 2  # how often all edits are asked; each stage asks only those that have arrived
    epoch = rough_seconds(trial, facts, costs.cpus, math.ceil(edits / _batch(trial)), edits)
    return (
        taken * trial.epochs * costs.train * epoch["train"]
        + asked * facts.asked_share(trial) * costs.evaluate * epoch["evaluate"]
        + measured * costs.capability * epoch["capability"]
        + 3 * reading_seconds(trial.further_steps * _FURTHER_TOKENS, facts.parameters, facts.precision, costs.cpus)
    )


def patience_seconds(trial: TrialConfig, facts: StudyFacts, resources: Resources) -> float:
    """How long a trial may take before it is cancelled: `resources.minutes`, or with auto until it is surely hanging."""
    if resources.minutes == "auto":
        return max(_PATIENCE_SECONDS, _HANGS * trial_seconds(trial, facts, Costs(resources.cpus)))
    return math.inf if resources.minutes is None else 60 * resources.minutes


def _ends(seconds: Sequence[float], concurrent: int, start: float) -> list[float]:
    """When each trial ends, if they begin at `start` and in this order, each as soon as a place is free."""
    free, ends = [start] * concurrent, []
    for trial in seconds:
        ends.append(free[0] + trial)
        heapq.heapreplace(free, ends[-1])
    return ends
