"""All policies: the survey, and what it is compared with: what people do today, and what searches do with the same budget.

Each starts at the survey's learning rate, which is more than they have elsewhere.
"""

import random
from collections.abc import Callable, Generator

from sweeps.select.policy import (
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
from tests.benchmarks.race import PAPER, ReplayTask, full_runs, objectives, race

LATE = 0.9
"""Relative depth of a late layer."""


def proportional(task: SelectionTask) -> Generator[Rung, Scores, None]:
    """The paper's three positions at the same relative depth."""
    order = dict.fromkeys(nearest(task, depth, module) for depth, module in PAPER)
    return full_runs(task, list(order), "proportional", "the paper's positions at the same relative depth")


def late(task: SelectionTask) -> Generator[Rung, Scores, None]:
    """The down projection of a late layer."""
    return full_runs(task, [nearest(task, LATE, "mlp_down")], "late", "the down projection of a late layer")


def probe_alone(task: SelectionTask) -> Generator[Rung, Scores, None]:
    """The probe's best positions, run in full across all kinds of modules."""
    order = sorted(task.candidates, key=lambda c: (c.disturbance, c.position))
    return full_runs(task, order, "probe", "in the probe's order")


def random_search(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Positions drawn at random, run in full."""
    order = random.Random(task.seed).sample(task.candidates, len(task.candidates))
    return full_runs(task, order, "random", "drawn at random")


def tpe(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Optuna's multi-objective TPE over layer and module."""
    import optuna

    return _optuna(task, optuna.samplers.TPESampler(seed=task.seed, multivariate=True, n_startup_trials=5), "tpe")


def nsga2(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Optuna's NSGA-II over layer and module."""
    import optuna

    return _optuna(task, optuna.samplers.NSGAIISampler(seed=task.seed, population_size=8), "nsga2")


POLICIES: dict[str, Policy] = {
    "survey": survey,
    "race": race,
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


def _optuna(task: SelectionTask, sampler, name: str) -> Generator[Rung, Scores, None]:
    """One run at a time: reliability and generalization up, drift down. A position that comes again costs nothing."""
    import optuna

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
