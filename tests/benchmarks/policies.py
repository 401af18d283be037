"""All policies: the survey, and what it is compared with: what people do today, and what searches do with the same budget.

Each starts at the survey's learning rate, which is more than they have elsewhere.
"""

import random
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace

import optuna

from sweeps.select.policy import (
    Candidate,
    Policy,
    Run,
    Rung,
    Score,
    Scores,
    SelectionTask,
    affordable,
    first_run,
    nearest,
    spent,
    survey,
)

LATE = 0.9
"""Relative depth of a late layer."""
PAPER = ((22 / 31, "mlp_down"), (23 / 31, "layer"), (6 / 27, "mlp_down"))
"""Relative depth and module that arXiv 2509.22072 uses for LLaMA-3-8B, Mistral-7B and Qwen2.5-7B."""


@dataclass(frozen=True, kw_only=True)
class ReplayTask(SelectionTask):
    """What the compared policies are given besides."""

    seed: int = 0
    probed: tuple[Candidate, ...]
    """The candidates with the probe's scores, which the survey has only if the method takes a learning rate."""


def unprobed(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """The survey without the probe's scores."""
    return survey(replace(task, candidates=tuple(Candidate(c.layer, c.module) for c in task.candidates)))


def proportional(task: SelectionTask) -> Generator[Rung, Scores, None]:
    """The paper's three positions at the same relative depth."""
    order = dict.fromkeys(nearest(task, depth, module) for depth, module in PAPER)
    return full_runs(task, list(order), "proportional", "the paper's positions at the same relative depth")


def late(task: SelectionTask) -> Generator[Rung, Scores, None]:
    """The down projection of a late layer."""
    return full_runs(task, [nearest(task, LATE, "mlp_down")], "late", "the down projection of a late layer")


def probe_alone(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """The probe's best positions, across all kinds of modules."""
    order = sorted(task.probed, key=lambda c: (c.disturbance, c.layer, c.module))
    return full_runs(task, order, "probe", "in the probe's order")


def random_search(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Positions drawn at random."""
    order = random.Random(task.seed).sample(task.candidates, len(task.candidates))
    return full_runs(task, order, "random", "drawn at random")


def tpe(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Optuna's multi-objective TPE over layer and module."""
    return _optuna(task, optuna.samplers.TPESampler(seed=task.seed, multivariate=True, n_startup_trials=5), "tpe")


def nsga2(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Optuna's NSGA-II over layer and module."""
    return _optuna(task, optuna.samplers.NSGAIISampler(seed=task.seed, population_size=8), "nsga2")


POLICIES: dict[str, Policy] = {
    "survey": survey,
    "survey without the probe": unprobed,
    "probe": probe_alone,
    "proportional": proportional,
    "late": late,
    "random": random_search,
    "tpe": tpe,
    "nsga2": nsga2,
}


def replayed(
    policy: Policy, task: SelectionTask, score_of: Callable[[Run], Score]
) -> tuple[list[Rung], dict[Run, Score]]:
    """The rungs of a policy where every score is known, and the scores it asked for."""
    generator, rungs, scores = policy(task), [], {}
    try:
        rungs.append(next(generator))
        while True:
            scores |= {run: score_of(run) for run in rungs[-1].runs}
            rungs.append(generator.send(dict(scores)))
    except StopIteration:
        return rungs, scores


def full_runs(task: SelectionTask, order: Sequence[Candidate], name: str, why: str) -> Generator[Rung, Scores, None]:
    """Positions in this order while the budget lasts, at least one."""
    scores: Scores = {}
    left = [first_run(task, candidate) for candidate in order]
    while left:
        runs = affordable(task, scores, left[: task.concurrent], task.budget - spent(scores))
        runs = runs or ([] if scores else left[:1])
        if not runs:
            return
        scores = yield Rung(name, tuple(runs), why)
        left = left[len(runs) :]


def objectives(score: Score | None) -> tuple[float, float, float]:
    """Reliability, generalization and drift of a run; of one that failed or diverged the worst there is."""
    if score is None or not score.comparable:
        return 0.0, 0.0, 1e3
    return score.row["reliability"], score.row["generalization"], min(score.row["drift_kl"], 1e3)


def _optuna(task: SelectionTask, sampler, name: str) -> Generator[Rung, Scores, None]:
    """One run at a time: reliability and generalization up, drift down. A position that comes again costs nothing."""
    by_position = {candidate.position: candidate for candidate in task.candidates}
    layers, modules = ({getattr(c, axis) for c in task.candidates} for axis in ("layer", "module"))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    space = {"position": optuna.distributions.CategoricalDistribution(list(by_position))}
    if len(by_position) == len(layers) * len(modules) and layers == set(range(min(layers), max(layers) + 1)):
        space = {
            "layer": optuna.distributions.IntDistribution(min(layers), max(layers)),
            "module": optuna.distributions.CategoricalDistribution(sorted(modules)),
        }
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"], sampler=sampler)
    scores: Scores = {}
    for _ in range(10 * len(by_position)):
        asked = study.ask(space)
        position = asked.params.get("position") or f"{asked.params['layer']}.{asked.params['module']}"
        run = first_run(task, by_position[position])
        if run not in scores:
            if scores and not affordable(task, scores, [run], task.budget - spent(scores)):
                return
            scores = yield Rung(name, (run,), f"proposed by Optuna's {type(sampler).__name__}")
        study.tell(asked, list(objectives(scores[run])))
