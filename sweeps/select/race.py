"""The race: which positions are tried next, at what fidelity and learning rate, when only a share of the grid is paid for.

A policy is a generator: it yields rungs of runs and is sent the scores of all runs finished so far; when it returns, the
race is over. It knows nothing of Ray, files or clocks (what a run cost is part of its score), so the same policy runs a
live race, goes on from stored scores, and is replayed in milliseconds against a table of known results.
"""

import math
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import moocore
import numpy as np

from analysis.stats.choice import FAILED, Outcome, preference

SHARES = (0.25, 0.2)
"""Of the budget, for the first rung and the next; the rest is for the finals."""
INSURANCE = 4
"""Every so many-th scout is drawn from the whole grid, whatever the probe says."""
PAPER = ((22 / 31, "mlp_down"), (23 / 31, "layer"), (6 / 27, "mlp_down"))
"""Relative depth and module that arXiv 2509.22072 uses for LLaMA-3-8B, Mistral-7B and Qwen2.5-7B."""
SCOUTED = "the probe's order, with positions that served elsewhere and every fourth from the whole grid"
LINE = 6
"""Positions run in full at least, where the budget allows, before a race ends by itself."""
KEPT = 3
"""Of so many, one goes on to the next rung."""
STEP_GAIN = 1.0
"""Nats by which the first sign step would lower the mean loss at the rate a position starts with: rate = nats / gain.

Measured with 100 steps over 40 edits at 15 positions of five kinds: whatever the size of the matrix, they learn nearly
everything from 0.7 nats a step upwards, and disturb the more the higher the rate."""
USUAL_STEPS = 100
"""Fewer steps want longer ones: nats times the square root of the ratio."""


@dataclass(frozen=True, order=True)
class Run:
    """One trial of a race."""

    layer: int
    module: str
    learning_rate: float
    level: int
    """Of fidelity, 0 is the lowest."""
    seed: int = 0

    @property
    def position(self) -> str:
        return f"{self.layer}.{self.module}"


@dataclass(frozen=True)
class Score:
    """What came of a run."""

    outcome: Outcome
    seconds: float
    """Of one worker."""


@dataclass(frozen=True)
class Candidate:
    """A position with what the probe says of it (`locft.probe`)."""

    layer: int
    module: str
    disturbance: float
    """What learning disturbs; low is good. Orders the scouts."""
    gain: float
    """What a step learns; the learning rate goes with its inverse."""

    @property
    def position(self) -> str:
        return f"{self.layer}.{self.module}"


def start_rate(candidate: Candidate, steps: int) -> float:
    """The learning rate for so many optimiser steps, to two significant digits."""
    nats = STEP_GAIN * math.sqrt(max(1.0, USUAL_STEPS / steps))
    return float(f"{nats / candidate.gain:.2g}") if candidate.gain > 0 else 1e-3


@dataclass(frozen=True)
class Task:
    """What a policy is given."""

    candidates: tuple[Candidate, ...]
    levels: tuple[int, ...]
    """Edits at each level of fidelity, ascending; the last is all of them."""
    layers: int
    """Of the model."""
    seconds: Callable[[Run], float]
    """Expected cost of a run. Policies correct its scale by what runs turn out to cost."""
    rate: Callable[[Candidate, int], float]
    """The learning rate that a position starts with at a level."""
    budget: float
    """Seconds of one worker that all runs together may cost."""
    concurrent: int = 1
    seed: int = 0
    gentler: bool = True
    """Whether half of that rate may be tried, too."""
    priors: tuple[tuple[float, str], ...] = ()
    """Relative depth and module of positions that served elsewhere: they are tried early, and no more than that."""

    @property
    def full(self) -> int:
        """The level of all edits."""
        return len(self.levels) - 1


@dataclass(frozen=True)
class Rung:
    """Runs that are started together."""

    name: str
    runs: tuple[Run, ...]
    why: str
    """For people."""
    dropped: Mapping[str, str] = field(default_factory=dict)
    """Positions of the rung before that are out, with the reason."""


Scores = Mapping[Run, Score]
Policy = Callable[[Task], Generator[Rung, Scores, None]]


def race(task: Task) -> Generator[Rung, Scores, None]:
    """Scouts at the lowest fidelity, the best of them in a semifinal, the best of those in full and with further seeds.

    The probe orders the scouts, with the priors and an insurance share from the whole grid among them. A rung is left by
    the positions of the lowest non-dominated ranks over reliability, generalization and drift, of equal ones those that drift least.
    """
    order = ranked(task)
    by_position = {candidate.position: candidate for candidate in order}
    first = [nearest(task, depth, module) for depth, module in (*task.priors, *PAPER)]
    entrants, scores, dropped = list(dict.fromkeys([*first, *_insured(order, task.seed)])), {}, {}
    for level, share in zip(range(task.full), SHARES, strict=False):
        runs = affordable(task, scores, [first_run(task, c, level) for c in entrants], share * task.budget)
        if len(runs) < 2:
            continue
        dropped |= {c.position: "the budget ends before it" for c in entrants[len(runs) :]} if level else {}
        who = "the best so far" if level else SCOUTED
        why = f"{len(runs)} positions on {task.levels[level]} edits: {who}"
        scores = yield Rung("scouts" if level == 0 else "semifinal", tuple(runs), why, dropped)
        kept, dropped = _cut(runs, scores)
        entrants = [by_position[run.position] for run in kept]
    yield from _finals(task, scores, entrants, order, dropped)


def full_runs(task: Task, order: Sequence[Candidate], name: str, why: str) -> Generator[Rung, Scores, None]:
    """All fidelity at once: positions in this order while the budget lasts, at least one."""
    scores: Scores = {}
    left = [first_run(task, candidate, task.full) for candidate in order]
    while left:
        runs = affordable(task, scores, left[: task.concurrent], task.budget - spent(scores))
        runs = runs or ([] if scores else left[:1])
        if not runs:
            return
        scores = yield Rung(name, tuple(runs), why)
        left = left[len(runs) :]


def ranked(task: Task) -> list[Candidate]:
    """The probe's order: what learning disturbs least comes first."""
    return sorted(task.candidates, key=lambda c: (c.disturbance, c.layer, c.module))


def first_run(task: Task, candidate: Candidate, level: int) -> Run:
    """The run of a position at its starting rate."""
    return Run(candidate.layer, candidate.module, task.rate(candidate, level), level)


def gentler(run: Run) -> Run:
    """The same at half the rate."""
    return replace(run, learning_rate=float(f"{run.learning_rate / 2:.2g}"))


def nearest(task: Task, depth: float, module: str) -> Candidate:
    """The candidate of this module at this relative depth; of any module where the model lacks it."""
    having = [c for c in task.candidates if c.module == module] or list(task.candidates)
    return min(having, key=lambda c: (abs(c.layer / max(1, task.layers - 1) - depth), c.layer, c.module))


def spent(scores: Scores) -> float:
    """Seconds of one worker that all runs cost."""
    return sum(score.seconds for score in scores.values())


def affordable(task: Task, scores: Scores, runs: Sequence[Run], seconds: float) -> list[Run]:
    """As many of the runs, from the first on, as the seconds pay for."""
    predicted = sum(task.seconds(run) for run in scores)
    scale = spent(scores) / predicted if predicted else 1.0
    costs = np.cumsum([scale * task.seconds(run) for run in runs])
    return list(runs[: int(np.searchsorted(costs, seconds, side="right"))])


def leading(scores: Scores, level: int) -> list[tuple[Run, Outcome]]:
    """The settings run at a level, those to use first (`analysis.stats.choice`). The lowest seed stands for its setting."""
    groups: dict[Run, list[Outcome]] = {}
    for run in sorted(run for run in scores if run.level == level):
        groups.setdefault(replace(run, seed=0), []).append(scores[run].outcome)
    outcomes = [mean_outcome(found) for found in groups.values()]
    return [(list(groups)[index], outcomes[index]) for index in preference(outcomes)]


def mean_outcome(outcomes: Sequence[Outcome]) -> Outcome:
    """Over seeds, which share edits and items: only the drift's error is that of the mean over seeds."""
    mean = {name: float(np.mean([getattr(o, name) for o in outcomes])) for name in Outcome.__dataclass_fields__}
    drifts = [o.drift for o in outcomes]
    if len(drifts) > 1 and np.isfinite(drifts).all():
        mean["drift_se"] = float(np.std(drifts, ddof=1) / math.sqrt(len(drifts)))
    return Outcome(**mean)


def confirm(task: Task, scores: Scores, queue: Sequence[Run]) -> Generator[Rung, Scores, None]:
    """Full runs, one after the other what would tell most, of positions that were run in full and of some of the queue."""
    while True:
        wanted = _most_telling(task, scores, queue)
        runs = affordable(task, scores, wanted[: task.concurrent], task.budget - spent(scores))
        if not runs:
            return
        scores = yield Rung("confirm", tuple(runs), _intent(runs, scores))


def _finals(
    task: Task,
    scores: Scores,
    finalists: Sequence[Candidate],
    order: Sequence[Candidate],
    dropped: Mapping[str, str],
) -> Generator[Rung, Scores, None]:
    """Half the money for full runs of the finalists, then what would tell most."""
    queue = [first_run(task, c, task.full) for c in [*finalists, *(c for c in order if c not in finalists)]]
    first = affordable(task, scores, queue[: max(1, len(finalists))], (task.budget - spent(scores)) / 2) or queue[:1]
    dropped = {**dropped, **{c.position: "the budget ends before it" for c in finalists[len(first) :]}}
    why = f"{len(first)} positions on all {task.levels[-1]} edits"
    scores = yield Rung("finals", tuple(first), why, dropped)
    yield from confirm(task, scores, queue)


def _most_telling(task: Task, scores: Scores, queue: Sequence[Run]) -> list[Run]:
    """What could still change the answer: half the leader's rate, its second seed, the next in line, seeds of the leaders.

    Empty when all of that is known: a race need not use up its budget.
    """
    leaders = [run for run, _ in leading(scores, task.full)][:2]
    tried = {run.position for run in scores if run.level == task.full}
    fresh = [run for run in queue if run.position not in tried][: 1 if len(tried) < LINE else 0]
    halved = [gentler(leaders[0])] if task.gentler else []
    seeds = [replace(run, seed=seed) for seed in (1, 2) for run in leaders]
    return [run for run in dict.fromkeys([*halved, *seeds[:1], *fresh, *seeds[1:]]) if run not in scores]


def _intent(runs: Sequence[Run], scores: Scores) -> str:
    def say(run: Run) -> str:
        known = [other for other in scores if other.level == run.level and other.position == run.position]
        if not known:
            return f"{run.position}, next in line"
        if run.learning_rate not in {other.learning_rate for other in known}:
            return f"{run.position} at half the rate"
        return f"{run.position} with seed {run.seed}"

    return "; ".join(map(say, runs))


def _cut(runs: Sequence[Run], scores: Scores) -> tuple[list[Run], dict[str, str]]:
    """The best third, best first, and why the others are out."""
    outcomes = [scores[run].outcome if run in scores else FAILED for run in runs]
    points = np.array([[o.reliability, o.generalization, -min(o.drift, 1e3)] for o in outcomes])
    ranks = moocore.pareto_rank(points, maximise=True)  # 0 on the front
    best = max(o.reliability for o in outcomes)
    error = max((o.reliability_se for o in outcomes if o.reliability == best), default=0.0)
    order = sorted(
        range(len(runs)), key=lambda i: (outcomes[i].reliability < best - 2 * error, ranks[i], outcomes[i].drift, runs[i])
    )
    kept = math.ceil(len(runs) / KEPT)
    dropped = {}
    for index in order[kept:]:
        outcome = outcomes[index]
        if outcome.reliability < best - 2 * error:
            reason = f"reliability {100 * outcome.reliability:.0f}%, the best has {100 * best:.0f}%"
        else:
            reason = f"non-dominated rank {ranks[index] + 1}, drift {outcome.drift:.3f} nats"
        dropped[runs[index].position] = reason
    return [runs[index] for index in order[:kept]], dropped


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
    """All of them in an order whose every beginning is spread over modules and depths."""
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
