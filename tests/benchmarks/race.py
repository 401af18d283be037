"""The race, which the survey is compared with: scouts on few edits, the best of them on more, the best of those on all.

Its rungs on few edits cost more than they tell (`tests/benchmarks/replay.py`).
"""

import math
import random
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import moocore
import numpy as np

from analysis.stats.table import proportion_se
from sweeps.select.policy import (
    Candidate,
    Run,
    Rung,
    Score,
    Scores,
    SelectionTask,
    affordable,
    confirmations,
    first_run,
    intent,
    nearest,
    probe_order,
    spent,
)

SHARES = (0.25, 0.2)
"""Of the budget, for the first rung and the next; the rest is for the finals."""
INSURANCE = 4
"""Every fourth scout is drawn from the whole grid, whatever the probe says."""
PAPER = ((22 / 31, "mlp_down"), (23 / 31, "layer"), (6 / 27, "mlp_down"))
"""Relative depth and module that arXiv 2509.22072 uses for LLaMA-3-8B, Mistral-7B and Qwen2.5-7B."""
LINE = 6
"""Positions run in full, where the budget allows, before a race may end."""
KEPT = 3
"""One position in three goes on to the next rung."""


@dataclass(frozen=True, order=True)
class Scout(Run):
    """A run on a sample of the edits."""

    level: int = 0
    """Index into `ReplayTask.levels`."""


@dataclass(frozen=True, kw_only=True)
class ReplayTask(SelectionTask):
    """What the compared policies are given besides."""

    seed: int = 0
    levels: tuple[int, ...] = ()
    """Number of edits at each level of fidelity below the full one, ascending."""


def in_full(scores: Scores) -> dict[Run, Score]:
    """Those of runs on all edits."""
    return {run: score for run, score in scores.items() if not isinstance(run, Scout)}


def objectives(score: Score | None) -> tuple[float, float, float]:
    """Reliability, generalization and drift of a run; of one that failed or diverged the worst there is."""
    if score is None or not score.comparable:
        return 0.0, 0.0, 1e3
    return score.row["reliability"], score.row["generalization"], min(score.row["drift_kl"], 1e3)


def race(task: ReplayTask) -> Generator[Rung, Scores, None]:
    """Scouts on the fewest edits, the best of them in a semifinal, the best of those in full and with further seeds.

    The probe orders the scouts, with the priors and an insurance share from the whole grid among them. The best third of a
    rung goes on: those of the lowest non-dominated ranks over reliability, generalization and drift, ties by drift.
    """
    order = probe_order(task)
    by_position = {candidate.position: candidate for candidate in order}
    first = [nearest(task, depth, module) for depth, module in (*task.priors, *PAPER)]
    entrants: list[Candidate] = list(dict.fromkeys([*first, *_insured(order, task.seed)]))
    scores: Scores = {}
    for level, share in zip(range(len(task.levels)), SHARES, strict=False):
        scouts = [Scout(c.layer, c.module, task.rate(c), level=level) for c in entrants]
        runs = affordable(task, scores, scouts, share * task.budget)
        if len(runs) < 2:
            continue
        name = "semifinal" if level else "scouts"
        scores = yield Rung(name, tuple(runs), f"{len(runs)} positions on {task.levels[level]} edits")
        entrants = [by_position[run.position] for run in _best_third(runs, scores)]
    queue = [first_run(task, c) for c in [*entrants, *(c for c in order if c not in entrants)]]
    runs = affordable(task, scores, queue[: max(1, len(entrants))], (task.budget - spent(scores)) / 2) or queue[:1]
    scores = yield Rung("finals", tuple(runs), f"{len(runs)} positions on all edits")
    while True:
        wanted = _most_telling(task, in_full(scores), queue)
        runs = affordable(task, scores, wanted[: task.concurrent], task.budget - spent(scores))
        if not runs:
            return
        scores = yield Rung("confirm", tuple(runs), "; ".join(intent(run, scores) for run in runs))


def full_runs(task: SelectionTask, order: Sequence[Candidate], name: str, why: str) -> Generator[Rung, Scores, None]:
    """No scouts: positions in this order while the budget lasts, at least one."""
    scores: Scores = {}
    left = [first_run(task, candidate) for candidate in order]
    while left:
        runs = affordable(task, scores, left[: task.concurrent], task.budget - spent(scores))
        runs = runs or ([] if scores else left[:1])
        if not runs:
            return
        scores = yield Rung(name, tuple(runs), why)
        left = left[len(runs) :]


def _most_telling(task: SelectionTask, scores: Scores, queue: Sequence[Run]) -> list[Run]:
    """What confirms the answer, with the next in line after what is most telling as long as few were run in full."""
    wanted = confirmations(task, scores)
    fresh = [run for run in queue if run not in scores][: 1 if len({run.position for run in scores}) < LINE else 0]
    first = 2 if task.other_rate else 1
    return [*wanted[:first], *fresh, *wanted[first:]]


def _best_third(runs: Sequence[Run], scores: Mapping[Run, Score]) -> list[Run]:
    """Best first."""
    points = np.array([objectives(scores.get(run)) for run in runs])  # (R, 3)
    ranks = moocore.pareto_rank(points * [1, 1, -1], maximise=True)  # 0 on the front
    best = points[:, 0].max()
    edits = next((scores[run].row["n_edits"] for run in runs if run in scores), 1)
    worse = points[:, 0] < best - 2 * proportion_se(best, edits)
    order = sorted(range(len(runs)), key=lambda i: (worse[i], ranks[i], points[i, 2], runs[i]))
    return [runs[index] for index in order[: math.ceil(len(runs) / KEPT)]]


def _insured(order: Sequence[Candidate], seed: int) -> Iterator[Candidate]:
    """The probe's order, with every `INSURANCE`-th place taken by one from the whole grid: modules and depths in turn."""
    drawn = iter(_spread(order, random.Random(seed)))
    ranked, seen = iter(order), set()
    for place in range(2 * len(order)):
        source = drawn if place % INSURANCE == INSURANCE - 1 else ranked
        for candidate in source:
            if candidate.position not in seen:
                seen.add(candidate.position)
                yield candidate
                break


def _spread(candidates: Iterable[Candidate], rng: random.Random) -> list[Candidate]:
    """All of them in an order in which every prefix covers all modules and depths."""
    by_module: dict[str, list[Candidate]] = {}
    for candidate in sorted(candidates, key=lambda c: (c.module, c.layer)):
        by_module.setdefault(candidate.module, []).append(candidate)
    lines = []
    for group in by_module.values():
        shift = rng.random()
        golden = (math.sqrt(5) - 1) / 2  # its multiples modulo 1 are spread evenly at every length
        place = [(shift + golden * k) % 1 for k in range(len(group))]
        lines.append([group[int(rank)] for rank in np.argsort(np.argsort(place))])
    rng.shuffle(lines)
    return [line[k] for k in range(max(map(len, lines), default=0)) for line in lines if k < len(line)]
