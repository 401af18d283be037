"""What is left of a study and what it will take: from earlier trials of the same model on this machine, else from a short
calibration."""

import os
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import psutil

from locft.errors import InputError
from sweeps.study import estimate as rates
from sweeps.study.calibration import calibrated
from sweeps.study.estimate import Costs, Estimate
from sweeps.study.plan import StudyFacts
from sweeps.study.trial_types import TrialConfig, TrialResult

if TYPE_CHECKING:
    from sweeps.study.plan import PreparedStudy
    from sweeps.study.schema import Resources

TRIALS = 200
"""Earlier trials looked at, the latest."""
ENOUGH = 3
"""So many earlier trials of one kind count more than a calibration or a rule."""
FOR_TRIALS = 0.7
"""Of the memory that is free, what Ray leaves to trials; the rest is its store of objects."""


@dataclass(frozen=True)
class Forecast:
    """What the open trials of a study are expected to take, together and each."""

    prepared: "PreparedStudy"
    costs: Costs
    done: frozenset[str] = frozenset()
    """Ids of the trials that are not open."""
    concurrent: int = 1
    """Trials at a time."""
    made: float = field(default_factory=time.monotonic)
    """When; the minutes of the budget are counted from there."""

    @cached_property
    def estimate(self) -> Estimate:
        prepared = self.prepared
        return rates.estimate(
            prepared.plan,
            prepared.facts,
            self.costs,
            concurrent=self.concurrent,
            done=self.done,
            budget=prepared.study.budget,
        )

    def seconds(self, trial: TrialConfig) -> float:
        return rates.trial_seconds(trial, self.prepared.facts, self.costs, None)

    def on(self, nodes: Sequence[Mapping[str, float]]) -> "Forecast":
        """The same on these nodes (Ray's resources of each) instead of this machine."""
        return replace(self, concurrent=places(self.prepared, nodes))

    @property
    def warnings(self) -> list[str]:
        """What does not fit on this machine, and what to do about it."""
        expected, have = self.estimate, psutil.virtual_memory().total
        if expected.memory_bytes_high <= have:
            return []
        sure = expected.memory_bytes_low > have
        wanted = expected.memory_bytes_low if sure else expected.memory_bytes_high
        return [
            f"memory: {expected.concurrent} at a time {'take at least' if sure else 'may take'} {wanted / 2**30:.1f} GiB, and"
            f" this machine has {have / 2**30:.1f} GiB; less is needed with fewer trials at a time (resources.concurrent),"
            " smaller batches, or dtype: bfloat16"
        ]


def foresee(prepared: "PreparedStudy", store: str, *, calibrate: bool = True) -> Forecast:
    """What is left of the study on this machine, from what the tracking store holds. Creates no store.

    calibrate: whether a calibration is run where the store tells nothing; without, the rates are rough then. Raises
    InputError when the store cannot be reached.
    """
    from sweeps.tracking.study_run import earlier_trials, find_tracker

    study, facts = prepared.study, prepared.facts
    tracker = find_tracker(store, prepared.study.name, prepared.id)
    planned = {trial.id for trial in prepared.plan.trials}
    finished = tracker.finished() if tracker else {}
    done = frozenset(trial for trial in finished if not planned or trial in planned)
    costs = rates.default_costs(facts, study.resources.cpus)
    if len(done) < prepared.plan.count:
        earlier = earlier_trials(facts.model_fingerprint, machine(study.resources), TRIALS, store)
        costs = learnt(earlier, prepared) or (calibrated(prepared) if calibrate else costs)
    return Forecast(prepared, costs, done, places(prepared))


def places(prepared: "PreparedStudy", nodes: Sequence[Mapping[str, float]] | None = None) -> int:
    """Trials at a time on nodes with these resources of Ray, None for this machine; one where not even that fits."""
    resources = prepared.study.resources
    trial_bytes = rates.most_memory_bytes(prepared.plan, prepared.facts)
    try:
        return resources.places(nodes or [_this_machine(resources)], trial_bytes)
    except InputError:
        return 1


def _this_machine(resources: "Resources") -> dict[str, float]:
    gpus = 0
    if resources.gpus:
        import torch

        gpus = torch.cuda.device_count()
    return {"CPU": os.cpu_count() or 1, "GPU": gpus, "memory": FOR_TRIALS * psutil.virtual_memory().available}


def machine(resources: "Resources") -> str:
    """This machine and what a trial has of it; trials of one label are comparable in their seconds."""
    name = re.sub(r"[^\w.\-]", "-", platform.node())[:100] or "unknown"
    return f"{name} {resources.cpus} CPU {resources.gpus:g} GPU"


def learnt(earlier: Sequence[TrialResult], prepared: "PreparedStudy") -> Costs | None:
    """The rough costs set right by what trials of this model took, whatever they trained and were measured on."""
    facts = prepared.facts
    sums = dict.fromkeys(("training", "evaluation", "capability"), (0.0, 0.0))  # measured, expected
    steps: dict[str, list[tuple[float, float]]] = {}
    for trial in earlier:
        found, n = trial.metrics, trial.metrics.get("n_edits", 0.0)
        if not n or found.get("diverged") or "train_seconds" not in found:
            continue
        costs = rates.default_costs(_with_edits(facts, round(n)), prepared.study.resources.cpus)
        layers = rates.layers_passed(trial.config, facts)
        allowed = rates.steps_allowed(trial.config, n)
        expected = {"training": costs.training(trial.config, layers, found["steps"])}
        if "evaluate_seconds" in found:
            expected["evaluation"] = costs.evaluation.seconds(layers)
        if "capability_seconds" in found and trial.config.data_fingerprint == facts.data_fingerprint:
            expected["capability"] = costs.capability.seconds(layers)
        names = {"training": "train_seconds", "evaluation": "evaluate_seconds", "capability": "capability_seconds"}
        for part, seconds in expected.items():
            sums[part] = (sums[part][0] + found[names[part]], sums[part][1] + seconds)
        steps.setdefault(trial.config.pipeline, []).append((found["steps"], allowed))
    count = sum(map(len, steps.values()))
    if count < ENOUGH:
        return None
    ratio = {part: measured / expected if expected else None for part, (measured, expected) in sums.items()}
    training = ratio["training"] or 1.0
    evaluation = ratio["evaluation"] or training
    shares = {
        pipeline: sum(taken for taken, _ in pairs) / sum(allowed for _, allowed in pairs)
        for pipeline, pairs in steps.items()
        if len(pairs) >= ENOUGH
    }
    rough = rates.default_costs(facts, prepared.study.resources.cpus)
    return replace(
        rough.scaled(training, evaluation, ratio["capability"] or evaluation),
        source=f"{count} earlier trials of this model",
        spread=1.4,
        shares={**rough.shares, **shares},
    )


def _with_edits(facts: StudyFacts, n_edits: int) -> StudyFacts:
    """The same study on so many edits of the same kind."""
    share = n_edits / max(1, facts.n_edits)
    return replace(
        facts,
        n_edits=n_edits,
        edit_tokens=round(share * rates.edit_tokens(facts)),
        evaluation_tokens=round(share * rates.evaluation_tokens(facts)),
    )
