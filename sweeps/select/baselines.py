"""All policies: the survey, and what to compare it with. What people do today, and what searches do with the same budget.

All start at the survey's learning rate, which is more than they have elsewhere.
"""

import random
from collections.abc import Generator

from sweeps.select.race import (
    PAPER,
    Policy,
    Run,
    Rung,
    Scores,
    Task,
    affordable,
    first_run,
    full_runs,
    nearest,
    race,
    spent,
)
from sweeps.select.policy import survey

LATE = 0.9
"""Relative depth of a late layer."""


def proportional(task: Task) -> Generator[Rung, Scores, None]:
    """The paper's three positions at the same relative depth."""
    order = dict.fromkeys(nearest(task, depth, module) for depth, module in PAPER)
    return full_runs(task, list(order), "proportional", "the paper's positions at the same relative depth")


def late(task: Task) -> Generator[Rung, Scores, None]:
    """The down projection of a late layer."""
    return full_runs(task, [nearest(task, LATE, "mlp_down")], "late", "the down projection of a late layer")


def probe_alone(task: Task) -> Generator[Rung, Scores, None]:
    """The probe's best positions, run in full across all kinds of modules."""
    order = sorted(task.candidates, key=lambda c: (c.disturbance, c.position))
    return full_runs(task, order, "probe", "in the probe's order")


def random_search(task: Task) -> Generator[Rung, Scores, None]:
    """Positions drawn at random, run in full."""
    order = random.Random(task.seed).sample(task.candidates, len(task.candidates))
    return full_runs(task, order, "random", "drawn at random")


def tpe(task: Task) -> Generator[Rung, Scores, None]:
    """Optuna's multi-objective TPE over layer and module."""
    import optuna

    return _optuna(task, optuna.samplers.TPESampler(seed=task.seed, multivariate=True, n_startup_trials=5), "tpe")


def nsga2(task: Task) -> Generator[Rung, Scores, None]:
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
"""By the name that `locft select --method` takes."""


def _optuna(task: Task, sampler, name: str) -> Generator[Rung, Scores, None]:
    """One run at a time: reliability and generalization up, drift down. A position that comes again costs nothing."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    by_position = {candidate.position: candidate for candidate in task.candidates}
    space = {"position": optuna.distributions.CategoricalDistribution(list(by_position))}
    if len(by_position) == len({c.layer for c in task.candidates}) * len({c.module for c in task.candidates}):
        layers, modules = ({getattr(c, axis) for c in task.candidates} for axis in ("layer", "module"))
        space = {
            "layer": optuna.distributions.IntDistribution(min(layers), max(layers)),
            "module": optuna.distributions.CategoricalDistribution(sorted(modules)),
        } if layers == set(range(min(layers), max(layers) + 1)) else space
    study = optuna.create_study(directions=["maximize", "maximize", "minimize"], sampler=sampler)
    scores: Scores = {}
    for _ in range(10 * len(by_position)):
        asked = study.ask(space)
        position = asked.params.get("position") or f"{asked.params['layer']}.{asked.params['module']}"
        run = first_run(task, by_position[position], task.full)
        if run not in scores:
            if scores and not affordable(task, scores, [run], task.budget - spent(scores)):
                return
            scores = yield Rung(name, (run,), f"proposed by Optuna's {type(sampler).__name__}")
        study.tell(asked, _objectives(run, scores))


def _objectives(run: Run, scores: Scores) -> tuple[float, float, float]:
    if run not in scores:
        return 0.0, 0.0, 1e3
    outcome = scores[run].outcome
    return outcome.reliability, outcome.generalization, min(outcome.drift, 1e3)
