"""The survey: which positions are run in full when only a share of the grid is paid for, and what confirms the answer.

What learning disturbs can be compared between positions, and that the probe predicts well: its best are run first. Which
kind of module generalizes, and at what price, it does not know: that is found out by running some of each. On the exhaustive
table (`tests/benchmarks/replay.py`) the two together miss little of the front at a tenth of its cost; the rungs of few edits
of a race (`sweeps.select.race`) cost more there than they tell.
"""

from collections.abc import Generator
from dataclasses import replace

from sweeps.select.race import (
    Run,
    Rung,
    Scores,
    Task,
    affordable,
    confirm,
    first_run,
    gentler,
    leading,
    nearest,
    ranked,
    spent,
)

FEW = 4
"""Runs a worker that are not divided into rungs."""


def survey(task: Task) -> Generator[Rung, Scores, None]:
    """All at full fidelity: half the budget for positions that served elsewhere and the probe's best, the rest `in_turn`.

    Enough is kept to try the leader's half rate and a second seed. Each further rung spends half of what is left, so that
    estimates of cost are corrected by what runs turn out to cost, unless few runs are left: then none waits for a worker
    that is still at a long one.
    """
    served = [nearest(task, depth, module) for depth, module in task.priors]
    best = [first_run(task, c, task.full) for c in dict.fromkeys([*served, *ranked(task)])]
    runs = affordable(task, {}, best, task.budget / 2) or best[:1]
    scores = yield _rung(task, runs, "the probe's best, whatever their kind")
    left = [run for run in in_turn(task) if run not in scores]
    while left:
        rest, kept = task.budget - spent(scores), _confirming(task, scores)
        fit = affordable(task, scores, [*kept, *left], rest)[len(kept) :]
        half = max(len(affordable(task, scores, left, rest / 2)), task.concurrent)
        runs = fit if len(fit) <= FEW * task.concurrent else fit[:half]
        if not runs:
            break
        scores = yield _rung(task, runs, "the best of each kind of module, in turn")
        left = left[len(runs) :]
    yield from confirm(task, scores, [])


def in_turn(task: Task) -> list[Run]:
    """Each kind of module in the probe's order, the kinds in turn so that each gets the same time."""
    lines: dict[str, list[Run]] = {}
    for candidate in ranked(task):
        lines.setdefault(candidate.module, []).append(first_run(task, candidate, task.full))
    taken, order = dict.fromkeys(lines, 0.0), []
    while lines:
        after = {module: taken[module] + task.seconds(line[0]) for module, line in lines.items()}
        module = min(after, key=lambda module: after[module])
        taken[module] = after[module]
        order.append(lines[module].pop(0))
        if not lines[module]:
            del lines[module]
    return order


def _rung(task: Task, runs: list[Run], what: str) -> Rung:
    """Longest first, so that workers end together."""
    return Rung("survey", tuple(sorted(runs, key=task.seconds, reverse=True)), f"{len(runs)} positions: {what}")


def _confirming(task: Task, scores: Scores) -> list[Run]:
    leaders = [run for run, _ in leading(scores, task.full)[:1]]
    return [*(gentler(run) for run in leaders if task.gentler), *(replace(run, seed=1) for run in leaders)]
