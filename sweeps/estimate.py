"""What a plan will take: seconds and memory, from sizes and a few measured rates.

A rough model, stated with its range. A step costs its tokens times the parameters they pass: forward through the whole
model, backward through the output projection and the layers from the last down to the trained one; and a fixed part
for going over the weights, which is what small batches mostly pay.
"""

import math
from dataclasses import dataclass

from sweeps.plan import Plan, StudyFacts
from sweeps.records import TrialConfig

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_TRAINED_BYTES = 4 * 4
"""For each trained number: weight, gradient and Adam's two moments in float32."""
_PROCESS_BYTES = 600_000_000
"""A worker with its imports, before it has loaded a model."""
_START_SECONDS = 20.0
"""Ray, the model and the tracking store, once a study."""


@dataclass(frozen=True)
class Calibration:
    """Rates of this machine, for one trial with its threads."""

    forward_seconds_per_token: float
    """Through the whole model."""
    backward_seconds_per_token: float
    """Through the whole model."""
    step_seconds: float
    """Fixed part of one optimiser step."""
    spread: float
    """The true time is expected within this factor both ways."""


@dataclass(frozen=True)
class Estimate:
    """What a plan takes. Seconds are of the wall clock, memory is of all workers together."""

    trials: int
    concurrent: int
    seconds_low: float
    """When training stops early, on a fast machine."""
    seconds: float
    seconds_high: float
    """When every trial takes all its epochs, on a slow machine."""
    seconds_per_trial: float
    """Mean."""
    peak_memory_bytes: int
    measured: bool
    """Whether the rates were measured on this machine; otherwise they are the defaults."""


def default_calibration(facts: StudyFacts, cpus: int = 2) -> Calibration:
    """Rates measured with a model of 135M parameters in float32 on two AVX-512 cores, scaled by size and threads.

    Forward and backward took 22 ps per token and parameter each, a step 0.8 ns per parameter on top. A GPU is far
    faster.
    """
    slower = 2 / max(1, cpus)
    per_token = 22e-12 * facts.parameters * slower
    return Calibration(per_token, per_token, 0.8e-9 * facts.parameters * slower, spread=3.0)


def estimate(
    plan: Plan, facts: StudyFacts, calibration: Calibration | None = None, *, cpus: int = 2, concurrent: int = 1
) -> Estimate:
    """Time and memory for all trials of a plan, `concurrent` at a time with `cpus` threads each.

    The middle and high values let every trial use all its epochs; the low one takes a third of them.
    """
    rates = calibration or default_calibration(facts, cpus)
    sample = plan.sample or ()
    training = [_training_seconds(trial, facts, rates) for trial in sample]
    measuring = rates.forward_seconds_per_token * (_evaluation_tokens(facts) + facts.capability_tokens)
    mean_training = sum(training) / len(training) if training else 0.0
    rounds = math.ceil(plan.count / concurrent)

    def total(share_of_epochs: float) -> float:
        return _START_SECONDS + measuring + rounds * (mean_training * share_of_epochs + measuring)

    return Estimate(
        trials=plan.count,
        concurrent=concurrent,
        seconds_low=total(1 / 3) / rates.spread,
        seconds=total(1),
        seconds_high=total(1) * rates.spread,
        seconds_per_trial=mean_training + measuring,
        peak_memory_bytes=concurrent * max((_memory_bytes(trial, facts) for trial in sample), default=0),
        measured=calibration is not None,
    )


def _training_seconds(trial: TrialConfig, facts: StudyFacts, rates: Calibration) -> float:
    """With all epochs. Both pipelines take the same number of steps then."""
    whole = facts.n_layers * facts.layer_parameters + facts.head_parameters
    tail = (facts.n_layers - trial.layer) * facts.layer_parameters + facts.head_parameters
    per_token = rates.forward_seconds_per_token + rates.backward_seconds_per_token * tail / max(1, whole)
    steps = math.ceil(facts.n_edits / trial.batch_size)
    return trial.epochs * (_edit_tokens(facts) * per_token + steps * rates.step_seconds)


def _memory_bytes(trial: TrialConfig, facts: StudyFacts) -> int:
    """Of one worker: the process, frozen weights, what is trained, and a batch's logits with their gradient."""
    trained = facts.trained_parameters.get(trial.position, facts.layer_parameters)
    batch_tokens = min(trial.batch_size, facts.n_edits) * _edit_tokens(facts) // max(1, facts.n_edits)
    logits = 3 * 4 * batch_tokens * facts.vocabulary
    return _PROCESS_BYTES + _BYTES[trial.dtype] * facts.parameters + _TRAINED_BYTES * trained + logits


def _edit_tokens(facts: StudyFacts) -> int:
    return 16 * facts.n_edits if facts.edit_tokens is None else facts.edit_tokens


def _evaluation_tokens(facts: StudyFacts) -> int:
    return 3 * 32 * facts.n_edits if facts.evaluation_tokens is None else facts.evaluation_tokens
