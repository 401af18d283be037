"""The survey: which positions to run when only a share of the grid can be paid for.

The probe predicts well how much of the model an edit at a position disturbs, so the positions it likes best run first. It
does not know which kind of module generalizes, and at what price, so some of each kind run next. On the exhaustive table
(`tests/benchmarks/replay.py`) this misses little of the front at a tenth of the grid's cost, and beats a race that begins
with runs on few edits.

A policy is a generator: it yields rungs of runs and is sent the scores of all runs finished so far. It knows nothing of
Ray, files or clocks (what a run cost is part of its score), so the same code selects live, resumes from stored scores, and
is replayed in milliseconds against a table of known results.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.pick import evidence_of, judge
from analysis.stats.table import mean_right

STEP_GAIN = 1.0
"""Nats by which the first sign step should lower the mean loss: the starting rate is this over the position's gain.

Measured with 100 steps over 40 edits at 15 positions of five kinds: from 0.7 nats a step upwards they learn nearly
everything, whatever the size of the matrix, and disturb more the higher the rate."""
USUAL_STEPS = 100
"""With fewer steps than these each has to be longer, by the square root of the ratio."""
JUDGED = (
    "reliability", "generalization", "capability_change", "capability_change_high", "drift_kl", "seconds_per_edit", "n_edits",
)  # fmt: skip
"""The metrics that the rule of the pick looks at."""
FEW = 4
"""This many runs per worker or fewer are not divided into rungs."""


@dataclass(frozen=True, order=True)
class Run:
    """A trial that a policy asks for: a position, a learning rate and a seed."""

    layer: int
    module: str
    learning_rate: float
    seed: int = 0

    @property
    def position(self) -> str:
        return f"{self.layer}.{self.module}"


@dataclass(frozen=True)
class Score:
    """The result of a run."""

    row: Mapping[str, Any]
    """Of the results table (`TrialResult.to_row`)."""
    seconds: float
    """What it cost, in seconds of one worker."""

    @property
    def comparable(self) -> bool:
        """Whether the setting can be picked: the run is done, did not diverge and has a reliability."""
        row = self.row
        return row["status"] == "done" and row.get("diverged") != 1 and math.isfinite(row.get("reliability", math.nan))


@dataclass(frozen=True)
class Candidate:
    """A position and what the probe says about it (`locft.probe`)."""

    layer: int
    module: str
    disturbance: float
    """How much of the model an edit here would disturb; low is good."""
    gain: float
    """How much one step learns here; the learning rate is proportional to its inverse."""

    @property
    def position(self) -> str:
        return f"{self.layer}.{self.module}"


@dataclass(frozen=True)
class SelectionTask:
    """What a policy is given."""

    candidates: tuple[Candidate, ...]
    layers: int
    """Of the model."""
    seconds: Callable[[Run], float]
    """Expected cost of a run. Policies correct its scale by what finished runs cost."""
    rate: Callable[[Candidate], float]
    """The learning rate that a position starts with."""
    budget: float
    """Seconds of one worker that all runs together may cost."""
    concurrent: int = 1
    """Runs at a time."""
    gentler: bool = True
    """Whether half the starting rate may be tried as well."""
    priors: tuple[tuple[float, str], ...] = ()
    """Relative depth and module of positions that served in other models; they are tried early."""


@dataclass(frozen=True)
class Rung:
    """Runs that are started together."""

    name: str
    runs: tuple[Run, ...]
    why: str
    """For people."""


Scores = Mapping[Run, Score]
Policy = Callable[[SelectionTask], Generator[Rung, Scores, None]]


def survey(task: SelectionTask) -> Generator[Rung, Scores, None]:
    """Half the budget goes to priors and the probe's best positions, the rest to the kinds of modules `in_turn`.

    Enough is kept to try half the leader's rate and a second seed of it. Each rung spends half of what is left, so that
    estimated costs are corrected before the money is gone. When only few runs are left they form one rung, so that no worker
    waits for another to end a long one.
    """
    served = [nearest(task, depth, module) for depth, module in task.priors]
    best = [first_run(task, c) for c in dict.fromkeys([*served, *probe_order(task)])]
    runs = affordable(task, {}, best, task.budget / 2) or best[:1]
    scores = yield _rung(task, runs, "the probe's best, whatever their kind")
    left = [run for run in in_turn(task) if run not in scores]
    while left:
        rest, kept = task.budget - spent(scores), confirmations(task, scores)[: 2 if task.gentler else 1]
        fit = affordable(task, scores, [*kept, *left], rest)[len(kept) :]
        half = max(len(affordable(task, scores, left, rest / 2)), task.concurrent)
        runs = fit if len(fit) <= FEW * task.concurrent else fit[:half]
        if not runs:
            break
        scores = yield _rung(task, runs, "the best of each kind of module, in turn")
        left = left[len(runs) :]
    yield from confirm(task, scores)


def confirm(task: SelectionTask, scores: Scores) -> Generator[Rung, Scores, None]:
    """Run what could still change the answer, the most telling first. The budget need not be used up."""
    while True:
        wanted = confirmations(task, scores)
        runs = affordable(task, scores, wanted[: task.concurrent], task.budget - spent(scores))
        if not runs:
            return
        scores = yield Rung("confirm", tuple(runs), "; ".join(intent(run, scores) for run in runs))


def confirmations(task: SelectionTask, scores: Scores) -> list[Run]:
    """The runs not made yet of: half the leader's rate, its second seed, further seeds of the two leaders."""
    leaders = leading(scores)[:2]
    halved = [gentler(run) for run in leaders[:1] if task.gentler]
    seeds = [replace(run, seed=seed) for seed in (1, 2) for run in leaders]
    return [run for run in dict.fromkeys([*halved, *seeds]) if run not in scores]


def intent(run: Run, scores: Scores) -> str:
    """What a confirming run adds to what is known of its position, in words."""
    rates = {known.learning_rate for known in scores if known.position == run.position}
    return f"{run.position} with seed {run.seed}" if run.learning_rate in rates else f"{run.position} at half the rate"


def in_turn(task: SelectionTask) -> list[Run]:
    """All positions: each kind of module in the probe's order, the kinds taking turns so that each gets the same time."""
    lines: dict[str, list[Run]] = {}
    for candidate in probe_order(task):
        lines.setdefault(candidate.module, []).append(first_run(task, candidate))
    taken, order = dict.fromkeys(lines, 0.0), []
    while lines:
        after = {module: taken[module] + task.seconds(line[0]) for module, line in lines.items()}
        module = min(after, key=lambda module: after[module])
        taken[module] = after[module]
        order.append(lines[module].pop(0))
        if not lines[module]:
            del lines[module]
    return order


def leading(scores: Scores) -> list[Run]:
    """The settings that can be picked, the one to use first by the rule of `analysis.stats.pick`. Seed 0 stands for a
    setting: its seeds are averaged, as `by_setting` does (which takes a hundred times longer)."""
    groups: dict[Run, list[Mapping[str, Any]]] = {}
    for run in sorted(run for run, score in scores.items() if score.comparable):
        groups.setdefault(replace(run, seed=0), []).append(scores[run].row)
    if not groups:
        return []
    means = pd.DataFrame([{name: _mean(rows, name) for name in JUDGED} for rows in groups.values()])
    means["right_by_edit"] = [mean_right([row.get("right") for row in rows]) for rows in groups.values()]
    settings = list(groups)
    return [settings[index] for index in judge(evidence_of(means)).order]


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over the rows that have a finite value; NaN where none has."""
    found = [value for row in rows if math.isfinite(value := row.get(name, math.nan))]
    return sum(found) / len(found) if found else math.nan


def probe_order(task: SelectionTask) -> list[Candidate]:
    """The candidates, those first where learning disturbs least."""
    return sorted(task.candidates, key=lambda c: (c.disturbance, c.layer, c.module))


def nearest(task: SelectionTask, depth: float, module: str) -> Candidate:
    """The candidate of this module nearest to this relative depth; of any module where the model lacks it."""
    having = [c for c in task.candidates if c.module == module] or list(task.candidates)
    return min(having, key=lambda c: (abs(c.layer / max(1, task.layers - 1) - depth), c.layer, c.module))


def start_rate(candidate: Candidate, steps: int) -> float:
    """The learning rate to start with when training takes this many optimiser steps, to two significant digits."""
    nats = STEP_GAIN * math.sqrt(max(1.0, USUAL_STEPS / steps))
    return float(f"{nats / candidate.gain:.2g}") if candidate.gain > 0 else 1e-3


def first_run(task: SelectionTask, candidate: Candidate) -> Run:
    """The run of a position at its starting rate."""
    return Run(candidate.layer, candidate.module, task.rate(candidate))


def gentler(run: Run) -> Run:
    """The same at half the learning rate."""
    return replace(run, learning_rate=float(f"{run.learning_rate / 2:.2g}"))


def spent(scores: Scores) -> float:
    """What all runs cost together, in seconds of one worker."""
    return sum(score.seconds for score in scores.values())


def affordable(task: SelectionTask, scores: Scores, runs: Sequence[Run], seconds: float) -> list[Run]:
    """The longest prefix of the runs that these seconds pay for."""
    predicted = sum(task.seconds(run) for run in scores)
    scale = spent(scores) / predicted if predicted else 1.0
    costs = np.cumsum([scale * task.seconds(run) for run in runs])
    return list(runs[: int(np.searchsorted(costs, seconds, side="right"))])


def _rung(task: SelectionTask, runs: Sequence[Run], what: str) -> Rung:
    """Longest first, so that workers end together."""
    return Rung("survey", tuple(sorted(runs, key=task.seconds, reverse=True)), f"{len(runs)} positions: {what}")
