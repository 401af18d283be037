"""What a plan will take: time, memory and disk, with a range, as far as the study's budget lets it.

A trial's work has a part for every layer that it goes through, from the trained one upwards, and a fixed one (the output
projection, the optimiser, what generates answers). `Costs` holds both in seconds for the steps and the measurements of one
study; where they come from is the business of `sweeps.study.forecast`.
"""

import heapq
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from locft.engine.packed_linear import MOST_BYTES
from sweeps.study.plan import Plan, StudyFacts
from sweeps.study.trial_types import TrialConfig

if TYPE_CHECKING:
    from sweeps.study.schema import Limits, Resources

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRAINED_BYTES = 4 * 4
"""For each trained number: weight, gradient and Adam's two moments in float32."""
_DRIVER_BYTES = 1_050_000_000
"""The command with Ray, MLflow and its tables, and Ray's own processes."""
_PROCESS_BYTES = 380_000_000
"""A worker with its imports, before it has loaded a model, besides the libraries that it shares."""
_SLACK = 1.6
"""What a worker's passing memory comes to in the end: freed pieces are kept, and not every one is used again."""
_READ_AT_ONCE = 2048
"""Tokens of a forward pass of the unedited model, all of whose logits are held."""
_RUN_BYTES, _OUTCOME_BYTES, _STUDY_BYTES = 30_000, 400, 10_000_000
"""Of MLflow's store: a run with its metrics; a question with its answer; a study's dashboard, tables and files."""
_SUPERVISED_SHARE = 0.3
"""Of the tokens read, those whose logits are computed."""
GENERATED_SHARE = 0.3
"""Of the tokens of edit evaluation, those that generating undecided answers reads again, through all layers."""
_START_SECONDS = 40.0
"""Once a study: Ray and its workers, the model and the tracking store, and at the end the report and the pick once more."""
SHARE_OF_STEPS = {"breadth_first": 0.9, "depth_first": 0.8}
"""Of the steps that `epochs` allows, those usually taken before `stop_below` ends the training."""
LEAST_STEPS = 0.3
"""The same where everything is learnt soon."""
ROUGH = "rough rates, nothing measured here"
HANGS, PATIENCE_SECONDS = 30.0, 1800.0
"""A trial hangs when it takes so many times what it should, but no less than this: its worker may have a model to load."""


@dataclass(frozen=True)
class Pass:
    """Seconds of a piece of work that goes through some layers."""

    fixed: float
    per_layer: float

    def seconds(self, layers: float) -> float:
        return self.fixed + layers * self.per_layer

    def scaled(self, factor: float) -> "Pass":
        return Pass(factor * self.fixed, factor * self.per_layer)


@dataclass(frozen=True)
class Costs:
    """What the pieces of a study's trials take on the clock of one worker."""

    step: Pass
    """Of one optimiser step, besides the part that grows with its edits."""
    edit: Pass
    """Of every edit in a step."""
    evaluation: Pass
    """Of asking all edits' questions once."""
    capability: Pass
    """Of all capability items and the prose."""
    unedited: float
    """Measuring the unedited model, once."""
    source: str = ROUGH
    """Where the numbers come from, for people."""
    spread: float = 2.0
    """The true time is expected within this factor both ways, beside what early stopping leaves open."""
    busy: float = 1.0
    """By how much other work on the machine slowed the measured seconds; the range allows for an idle machine."""
    shares: Mapping[str, float] = field(default_factory=SHARE_OF_STEPS.copy)
    """By pipeline: of the steps allowed, those that trials take."""

    @property
    def measured(self) -> bool:
        """On this machine."""
        return self.source != ROUGH

    def training(self, trial: TrialConfig, layers: int, steps: float) -> float:
        """Seconds of so many steps of full batches."""
        return steps * (self.step.seconds(layers) + trial.batch_size * self.edit.seconds(layers))

    def scaled(self, training: float, evaluation: float, capability: float) -> "Costs":
        return replace(
            self,
            step=self.step.scaled(training),
            edit=self.edit.scaled(training),
            evaluation=self.evaluation.scaled(evaluation),
            capability=self.capability.scaled(capability),
            unedited=self.unedited * capability,
        )


@dataclass(frozen=True)
class Estimate:
    """What a plan still takes. Seconds are of the clock; memory and disk are of one machine."""

    trials: int
    """To be run: those that are open, or as many of them as the budget allows (by minutes, about so many)."""
    left: int
    """Planned and not done."""
    ended_by: Literal["trials", "minutes"] | None
    """What of the budget ends the study before its plan does."""
    concurrent: int
    seconds_low: float
    """When training stops early, on a machine that does nothing else."""
    seconds: float
    seconds_high: float
    """When every trial takes all its epochs, on a slow machine."""
    seconds_per_trial: float
    """Mean."""
    memory_bytes_low: int
    """Of the driver and all workers together: what they hold in any case."""
    memory_bytes_high: int
    """With what may add: the largest batches of all at one moment, weights in every layout, stored states in full."""
    disk_bytes_low: int
    """Hidden states and weights in the cache, the study in the tracking store; the model itself left out."""
    disk_bytes_high: int
    source: str
    """What the seconds rest on."""


def default_costs(facts: StudyFacts, cpus: int = 2) -> Costs:
    """Rates of two cores with bfloat16 matrix instructions and a model of 135M parameters, by the number of threads.

    A step takes 1.1 ns a parameter (its weights pass through memory) and 9 ps a parameter and token. A GPU is far faster.
    """
    slow = (1.0 if facts.precision == "bfloat16" else 2.0) / cpus
    tokens = edit_tokens(facts) / max(1, facts.n_edits)
    layer, head = facts.layer_parameters, facts.head_parameters
    asked, read = evaluation_tokens(facts), facts.capability_tokens
    generating = GENERATED_SHARE * asked * facts.parameters
    return Costs(
        step=Pass(slow * (8e-3 + 0.5e-9 * head), slow * 1.1e-9 * layer),
        edit=Pass(slow * 9e-12 * tokens * _SUPERVISED_SHARE * head, slow * 9e-12 * tokens * layer),
        evaluation=Pass(slow * 10e-12 * (asked * _SUPERVISED_SHARE * head + generating), slow * 10e-12 * asked * layer),
        capability=Pass(slow * 15e-12 * read * _SUPERVISED_SHARE * head, slow * 7e-12 * read * layer),
        unedited=slow * 15e-12 * (asked + read) * facts.parameters,
    )


def estimate(
    plan: Plan,
    facts: StudyFacts,
    costs: Costs,
    *,
    concurrent: int = 1,
    done: Collection[str] = (),
    budget: "Limits | None" = None,
) -> Estimate:
    """Time, memory and disk of the trials of a plan that are not done, `concurrent` at a time, until the budget ends them.

    The middle value takes the usual share of a trial's epochs, the high one all of them, the low one few.
    """
    most, minutes = (budget.trials, budget.minutes) if budget else (None, None)
    sample = [trial for trial in plan.sample if trial.id not in set(done)]
    left = len(sample) if plan.trials else max(0, plan.count - len(done))
    affordable = left if most is None else max(0, min(left, most - len(done)))
    if plan.trials:
        sample = sample[:affordable]

    def each(share: float | None) -> list[float]:
        """Seconds of every trial; what a search will choose is as long as the mean of its sample."""
        seconds = [trial_seconds(trial, facts, costs, share) for trial in sample]
        return seconds if plan.trials or not seconds else [sum(seconds) / len(seconds)] * affordable

    def ends(share: float | None) -> list[float]:
        return [_START_SECONDS + costs.unedited + end for end in _ends(each(share), concurrent)]

    usual, limit = ends(None), 60 * minutes if minutes else math.inf
    out_of_time = max(usual, default=0.0) > limit

    def total(share: float | None) -> float:
        return max(ends(share), default=0.0)

    per_trial = each(None)
    trials = sum(end <= limit for end in usual)
    memory, disk = memory_range(sample, facts, concurrent), _disk_range(sample, trials, facts)
    return Estimate(
        trials=trials,
        left=left,
        ended_by="minutes" if out_of_time else "trials" if affordable < left else None,
        concurrent=concurrent,
        seconds_low=min(limit, total(LEAST_STEPS) / costs.spread / costs.busy),
        seconds=min(limit, total(None)),
        seconds_high=min(limit, total(1.0) * costs.spread),
        seconds_per_trial=sum(per_trial) / len(per_trial) if per_trial else 0.0,
        memory_bytes_low=memory[0],
        memory_bytes_high=memory[1],
        disk_bytes_low=disk[0],
        disk_bytes_high=disk[1],
        source=costs.source,
    )


def trial_seconds(
    trial: TrialConfig, facts: StudyFacts, costs: Costs | None = None, share: float | None = 1.0
) -> float:
    """Of one trial, measurements included. share: of the steps it may take; None takes what its pipeline usually does.

    Both pipelines take the same number of steps when nothing stops them.
    """
    costs = costs or default_costs(facts)
    layers, n = layers_passed(trial, facts), facts.n_edits
    epoch = math.ceil(n / trial.batch_size) * costs.step.seconds(layers) + n * costs.edit.seconds(layers)
    taken = costs.shares[trial.pipeline] if share is None else share
    return taken * trial.epochs * epoch + costs.evaluation.seconds(layers) + costs.capability.seconds(layers)


def patience_seconds(trial: TrialConfig, facts: StudyFacts, resources: "Resources") -> float:
    """How long a trial may take before it is given up: `resources.minutes`, or long enough that it must be hanging."""
    if resources.minutes == "auto":
        return max(PATIENCE_SECONDS, HANGS * trial_seconds(trial, facts, default_costs(facts, resources.cpus)))
    return math.inf if resources.minutes is None else 60 * resources.minutes


def layers_passed(trial: TrialConfig, facts: StudyFacts) -> int:
    """The trained layer and those above it."""
    return facts.n_layers - trial.layer


def steps_allowed(trial: TrialConfig, n_edits: float) -> int:
    return trial.epochs * math.ceil(n_edits / trial.batch_size)


def memory_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Of a single worker at most."""
    return _shared_bytes(trial, facts) + _kept_bytes(trial, facts) + _added_bytes(trial, facts)


def most_memory_bytes(plan: Plan, facts: StudyFacts) -> int:
    """Of the worker that takes the most."""
    return max((memory_bytes(trial, facts) for trial in plan.sample), default=0)


def memory_range(trials: Sequence[TrialConfig], facts: StudyFacts, concurrent: int) -> tuple[int, int]:
    """Of the driver and of so many workers: what they hold in any case, and that with all that may add."""
    if not trials:
        return 0, 0
    at_once, always = min(concurrent, len(trials)), _DRIVER_BYTES + _shared_bytes(trials[0], facts)
    kept = [_kept_bytes(trial, facts) for trial in trials]
    most = max(own + _added_bytes(trial, facts) for own, trial in zip(kept, trials, strict=True))
    return always + at_once * min(kept), always + at_once * most


def _shared_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Files that all workers of a machine map: the frozen weights, and once more in the precision of training."""
    return facts.parameters * sum(_BYTES[name] for name in {trial.dtype, trial.precision})


def _kept_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """A worker's own as long as it trains: the process, and what is trained."""
    return _PROCESS_BYTES + _TRAINED_BYTES * facts.trained_parameters.get(trial.position, facts.layer_parameters)


def _added_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """What a worker may add to that: the layouts of the weights that it multiplies by, and the largest logits."""
    packed = 0
    if trial.precision == "bfloat16" and 2 * facts.parameters <= MOST_BYTES:
        packed = 2 * 2 * (layers_passed(trial, facts) * facts.layer_parameters + facts.head_parameters)
    batch_tokens = min(trial.batch_size, facts.n_edits) * edit_tokens(facts) // max(1, facts.n_edits)
    reading = min(_READ_AT_ONCE, edit_tokens(facts) + evaluation_tokens(facts) + facts.capability_tokens)
    logits = 4 * facts.vocabulary * max(3 * batch_tokens, int(1.5 * reading))
    return int(_SLACK * (packed + logits))


def edit_tokens(facts: StudyFacts) -> int:
    return 16 * facts.n_edits if facts.edit_tokens is None else facts.edit_tokens


def evaluation_tokens(facts: StudyFacts) -> int:
    return 3 * 32 * facts.n_edits if facts.evaluation_tokens is None else facts.evaluation_tokens


def _disk_range(trials: Sequence[TrialConfig], count: int, facts: StudyFacts) -> tuple[int, int]:
    """Hidden states entering every layer that is trained, the weights in the precision of training, MLflow's records."""
    if not trials:
        return 0, 0
    dtype = _BYTES[trials[0].dtype]
    hidden = facts.head_parameters // max(1, facts.vocabulary)
    layers = {trial.layer for trial in trials} | {facts.n_layers - 1}
    states = dtype * hidden * (evaluation_tokens(facts) + facts.capability_tokens) * len(layers)
    cast = 0 if trials[0].precision == trials[0].dtype else _BYTES[trials[0].precision] * facts.parameters
    records = _STUDY_BYTES + count * (_RUN_BYTES + 4 * facts.n_edits * _OUTCOME_BYTES)
    return cast + records, states + cast + records


def _ends(seconds: Sequence[float], concurrent: int) -> list[float]:
    """When each ends, begun in their order as soon as a place is free."""
    free, ends = [0.0] * concurrent, []
    for trial in seconds:
        ends.append(free[0] + trial)
        heapq.heapreplace(free, ends[-1])
    return ends
