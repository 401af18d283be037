"""The survey: which positions are run in full when only a share of the grid is paid for, and what confirms the answer.

What learning disturbs can be compared between the layers of one kind of module, and that the probe predicts well. Which
kind generalizes, and at what price, it does not know: that is found out by running each of them. On the exhaustive table
(`tests/benchmarks/replay.py`) this sees nearly the whole front at a tenth of its cost; the race's rungs of few edits
(`sweeps.race`) cost more than they tell there.
"""

from collections.abc import Generator
from dataclasses import replace

from sweeps.race import Candidate, Rung, Scores, Task, affordable, confirm, first_run, gentler, leading, nearest, spent


def survey(task: Task) -> Generator[Rung, Scores, None]:
    """Positions `in_turn` at full fidelity; what is kept of the budget tries the leader's half rate and a second seed.

    A rung spends half of what is left, so that estimates of cost are corrected by what runs turn out to cost.
    """
    scores: Scores = {}
    left = [first_run(task, candidate, task.full) for candidate in in_turn(task)]
    while left:
        leaders = [run for run, _ in leading(scores, task.full)[:1]]
        kept = [*(gentler(run) for run in leaders if task.gentler), *(replace(run, seed=1) for run in leaders)]
        rest = task.budget - spent(scores)
        fit = affordable(task, scores, [*kept, *left], rest)[len(kept) :]
        half = affordable(task, scores, left, rest / 2)
        runs = fit[: max(len(half), task.concurrent)] or ([] if scores else left[:1])
        if not runs:
            break
        scores = yield Rung("survey", tuple(runs), f"{len(runs)} positions: each kind of module in the probe's order")
        left = left[len(runs) :]
    yield from confirm(task, scores, [])


def in_turn(task: Task) -> list[Candidate]:
    """Each kind of module in the probe's order, the kinds in turn so that each gets the same time.

    Positions that served elsewhere come first of their kind.
    """
    served = [nearest(task, depth, module) for depth, module in task.priors]
    ranked = sorted(task.candidates, key=lambda c: (c.disturbance, c.layer, c.module))
    lines: dict[str, list[Candidate]] = {}
    for candidate in dict.fromkeys([*served, *ranked]):
        lines.setdefault(candidate.module, []).append(candidate)
    taken, order = dict.fromkeys(lines, 0.0), []
    while lines:

        def after(module: str) -> tuple[float, float]:
            first = lines[module][0]
            return taken[module] + task.seconds(first_run(task, first, task.full)), first.disturbance

        module = min(lines, key=after)
        taken[module], _ = after(module)
        order.append(lines[module].pop(0))
        if not lines[module]:
            del lines[module]
    return order
