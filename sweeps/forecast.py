"""What is left of a study and how long it will take: from earlier trials of the same model on this machine, else from a
short calibration."""

import os
import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sweeps import estimate as rates
from sweeps.calibration import calibrated
from sweeps.estimate import Costs, Estimate
from sweeps.plan import StudyFacts
from sweeps.records import TrialConfig, TrialResult

if TYPE_CHECKING:
    from sweeps.prepare import PreparedStudy
    from sweeps.schema import Resources

TRIALS = 200
"""Earlier trials looked at, the latest."""
ENOUGH = 3
"""So many earlier trials of one kind count more than a calibration or a rule."""


@dataclass(frozen=True)
class Forecast:
    """The estimate of a study's open trials, and what a single one is expected to take."""

    estimate: Estimate
    costs: Costs
    prepared: "PreparedStudy"

    def seconds(self, trial: TrialConfig) -> float:
        return rates.trial_seconds(trial, self.prepared.facts, self.costs, None)


def foresee(prepared: "PreparedStudy", tracking_uri: str | None) -> Forecast:
    """What is left of the study, from what the tracking store holds. Creates no store.

    Raises InputError when the store cannot be reached.
    """
    from sweeps.sweep import find_tracker
    from sweeps.tracking_lookup import earlier_trials

    study, facts = prepared.study, prepared.facts
    tracker = find_tracker(prepared, tracking_uri)
    planned = {trial.id for trial in prepared.plan.trials}
    finished = tracker.finished(prepared.id) if tracker else {}
    done = [trial for trial in finished if not planned or trial in planned]
    costs = rates.default_costs(facts, study.resources.cpus)
    if len(done) < prepared.plan.count:
        earlier = earlier_trials(facts.model_fingerprint, machine(study.resources), TRIALS, tracking_uri)
        costs = learnt(earlier, prepared) or calibrated(prepared)
    at_once = places(study.resources)
    return Forecast(rates.estimate(prepared.plan, facts, costs, concurrent=at_once, done=done), costs, prepared)


def places(resources: "Resources") -> int:
    """Trials at a time on this machine."""
    if isinstance(resources.concurrent, int):
        return resources.concurrent
    return max(1, (os.cpu_count() or 1) // resources.cpus)


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
