"""The survey: which positions to run when only a share of the grid can be paid for.

Before anything runs, what earlier models showed is all that is known, and where the method needs a probe, its order. Each run
then tells something of its position, its neighbours and its kind of module, and of how far the probe can be trusted on this
model (`sweeps.select.belief`). The next runs are those most likely to matter for what they cost. `tests/benchmarks/replay.py`
compares this with other policies.

A policy is a generator: it yields rungs of runs and is sent the scores of all runs so far, those that are still running
included. So a free worker need not wait for the others. A policy knows nothing of Ray, files or clocks (what a run cost is
part of its score), so the same code selects live, resumes from stored scores, and is replayed in milliseconds against a
table of known results.
"""

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from analysis.stats.pick import evidence_of, judge
from analysis.stats.table import mean_right
from analysis.stats.wording import plural
from sweeps.select.belief import REACH, SCALES, Chances, Place, chances

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
RUNGS = 4
"""A rung spends at most this part of what is left."""
CONFIRMED = 0.15
"""Share of the budget that is kept to confirm the leader."""
LEARNT = 0.95
"""Reliability of a run whose rate could have been lower; below it the rate was rather too low."""
FIRST = 2
"""Runs at depths apart, with which a survey begins."""
SETTLED = 8
"""After this many runs the chance to be on the front counts half as much as the chance to be the pick."""
UNLIKELY = 0.05
"""The survey ends when the chance that something not run is clearly better than the pick falls below this."""


@dataclass(frozen=True, order=True)
class Run:
    """A trial that a policy asks for: a position, a learning rate and a seed."""

    layer: int
    module: str
    learning_rate: float
    seed: int = 0
    edit_count: int = 0
    """Edits that it trains, the first ones; 0 for all."""

    @property
    def position(self) -> str:
        return f"{self.layer}.{self.module}"


@dataclass(frozen=True)
class Score:
    """The result of a run."""

    row: Mapping[str, Any]
    """Of the results table (`TrialResult.to_row`); of a run that is not over, its status "running" alone."""
    seconds: float
    """What it cost, or is expected to cost, in seconds of one worker."""

    @property
    def is_running(self) -> bool:
        return self.row["status"] == "running"

    @property
    def comparable(self) -> bool:
        """Whether the setting can be picked: the run is done, did not diverge and has a reliability."""
        row = self.row
        return row["status"] == "done" and row.get("diverged") != 1 and math.isfinite(row.get("reliability", math.nan))


@dataclass(frozen=True)
class Candidate:
    """A position and what the probe says about it (`locft.probe`), if there was one."""

    layer: int
    module: str
    disturbance: float = math.inf
    """How much of the model an edit here would disturb; low is good."""
    gain: float = 0.0
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
    method: str = ""
    """Value of the axis `method`, the same for all runs; "" if nothing is known of it."""
    concurrent: int = 1
    """Runs at a time."""
    timed: bool = False
    """Whether the budget is that of a clock: then it pays for everything, else for comparing positions alone."""
    compared_on: int = 0
    """Edits on which positions are compared, where it is not all; the leader is then run with all of them at last."""
    other_rate: bool = True
    """Whether the leader may be tried at another than its starting rate as well."""
    priors: tuple[tuple[float, str], ...] = ()
    """Relative depth and module of positions that served in other models; they are tried early."""
    known: Mapping[Run, Score] = field(default_factory=dict)
    """Of the runs of an earlier call."""


@dataclass(frozen=True)
class Rung:
    """Runs that are started together."""

    name: str
    runs: tuple[Run, ...]
    why: str
    """For people."""


Scores = Mapping[Run, Score]
Rungs = Generator[Rung | None, Scores, None]
"""Yields None to be sent the scores again when a run that is still going is over."""
Policy = Callable[[SelectionTask], Rungs]


def survey(task: SelectionTask) -> Rungs:
    """Spends each second where it is most likely to matter: at positions that may be the pick or on the front, by what the
    runs so far let one expect (`sweeps.select.belief`).

    It begins with two runs at depths apart. Rungs are small, since each corrects what is expected and what runs cost. Of the
    budget a little is kept to confirm the leader, if that pays for a run at all. The survey ends early when
    nothing left is likely to be clearly better.
    """
    scores: Scores = task.known
    if scores:
        scores = yield Rung("earlier", tuple(scores), "the runs of an earlier call of this command")
    while any(first_run(task, candidate) not in scores for candidate in task.candidates):
        rung = _next_positions(task, scores)
        if rung is None and not running(scores):
            break
        scores = yield rung
    scores = yield from confirm(task, scores)
    if runs := with_all_edits(task, scores):
        yield Rung("all edits", tuple(runs), "the leader with all edits, to know what to expect of it")


def _next_positions(task: SelectionTask, scores: Scores) -> Rung | None:
    """None where nothing that is left is affordable, or likely to be clearly better than the pick."""
    expected = expectations(task, scores)
    if scores and chance_elsewhere(task, scores, expected) < UNLIKELY:
        return None
    telling, why = _most_telling(task, expected, len(scores)), "the likeliest to matter for what they cost"
    if len(scores) < FIRST:
        telling, why = _apart(task, telling, scores), f"{why}, apart in depth"
    served = [nearest(task, depth, module) for depth, module in task.priors]
    asked = [run for run in dict.fromkeys(first_run(task, c) for c in (*served, *telling)) if run not in scores]
    kept = affordable(task, scores, confirmations(task, scores)[:2], CONFIRMED * task.budget)
    slow = slowness(task, scores)
    rest = budget_left(task, scores) - slow * sum(map(task.seconds, kept))
    fit = affordable(task, scores, [run for run in asked if slow * task.seconds(run) <= rest], rest)
    most = len(fit) // RUNGS
    if len(scores) < FIRST:
        most = min(most, FIRST - len(scores))
    runs = fit[: max(task.concurrent, most)] or ([] if scores else asked[:1])
    if not runs:
        return None
    runs = sorted(runs, key=task.seconds, reverse=True)  # the longest first, so that workers end together
    return Rung("survey", tuple(runs), f"{plural(len(runs), 'position')}: {why}")


def running(scores: Scores) -> list[Run]:
    """The runs that are not over."""
    return [run for run, score in scores.items() if score.is_running]


def all_over(scores: Scores) -> Generator[None, Scores, Scores]:
    """Wait for the runs that are still going. Returns all scores."""
    while running(scores):
        scores = yield None
    return scores


def best_guess(task: SelectionTask) -> Candidate:
    """The position that is the most likely pick before anything was run."""
    return task.candidates[int(expectations(task, {}).pick.argmax())]


def expectations(task: SelectionTask, scores: Scores) -> Chances:
    """The chances of the candidates at their starting rates, in their order."""
    known, places = _settings(scores), []
    for candidate in task.candidates:
        run = first_run(task, candidate)
        metrics = {name: _mean(known[run], name) for name in SCALES} if run in known else None
        depth = candidate.layer / max(1, task.layers - 1)
        places.append(Place(depth, candidate.module, candidate.disturbance, task.seconds(run), metrics))
    return chances(places, task.method)


def chance_elsewhere(task: SelectionTask, scores: Scores, expected: Chances | None = None) -> float:
    """That a position which was not run at its starting rate is clearly better than the best of those that were (see
    `Chances.better`). expected: the `expectations`, where they are known."""
    left = [first_run(task, candidate) not in scores for candidate in task.candidates]
    return float((expected or expectations(task, scores)).better[left].sum())


def _apart(task: SelectionTask, order: Sequence[Candidate], scores: Scores) -> list[Candidate]:
    """In this order, but what lies near a better one, or near a run, comes behind all that does not."""
    taken, far = [run.layer for run in scores], []
    for candidate in order:
        if all(abs(candidate.layer - layer) >= REACH * task.layers for layer in taken):
            taken.append(candidate.layer)
            far.append(candidate)
    return list(dict.fromkeys([*far, *order]))


def _most_telling(task: SelectionTask, expected: Chances, runs: int) -> list[Candidate]:
    """The candidates by the chance, per second of their run, to be the pick, and the more was run already, to be on the
    front."""
    chance = expected.pick + runs / (runs + SETTLED) * expected.front
    seconds = [task.seconds(first_run(task, candidate)) for candidate in task.candidates]
    worth = dict(zip(task.candidates, chance / np.array(seconds), strict=True))
    return sorted(task.candidates, key=lambda c: (-worth[c], c.disturbance, c.layer, c.module))


def confirm(task: SelectionTask, scores: Scores) -> Generator[Rung | None, Scores, Scores]:
    """Run what could still change the answer, the most telling first, once the runs before are over. The budget need not be
    used up. Returns all scores."""
    scores = yield from all_over(scores)
    while True:
        wanted = confirmations(task, scores)
        runs = affordable(task, scores, wanted[: task.concurrent], budget_left(task, scores))
        if runs:
            scores = yield Rung("confirm", tuple(runs), "; ".join(intent(run, scores) for run in runs))
        elif running(scores):
            scores = yield None
        else:
            return scores


def with_all_edits(task: SelectionTask, scores: Scores) -> list[Run]:
    """The leader with all edits, where positions are compared on fewer and it was not run yet. Of a clock's time it may
    take half."""
    runs = [replace(run, edit_count=0) for run in leading(scores)[:1] if task.compared_on]
    runs = affordable(task, scores, runs, task.budget / 2) if task.timed else runs
    return [run for run in runs if run not in scores]


def budget_left(task: SelectionTask, scores: Scores) -> float:
    """Seconds of one worker for comparing positions: of a clock's, the run with all edits is kept."""
    kept = with_all_edits(task, scores) if task.timed else []
    return task.budget - spent(scores) - slowness(task, scores) * sum(map(task.seconds, kept))


def confirmations(task: SelectionTask, scores: Scores) -> list[Run]:
    """The runs not made yet of: the leader at another rate, its second seed, further seeds of the two leaders."""
    leaders = leading(scores)[:2]
    moved = [another_rate(run, scores) for run in leaders[:1] if task.other_rate]
    seeds = [replace(run, seed=seed) for seed in (1, 2) for run in leaders]
    return [run for run in dict.fromkeys([*moved, *seeds]) if run not in scores]


def intent(run: Run, scores: Scores) -> str:
    """What a confirming run adds to what is known of its position, in words."""
    rates = {known.learning_rate for known in scores if known.position == run.position}
    if not rates or run.learning_rate in rates:
        return f"{run.position} with seed {run.seed}"
    return f"{run.position} at {'twice' if run.learning_rate > max(rates) else 'half'} the rate"


def leading(scores: Scores) -> list[Run]:
    """The settings that can be picked, the one to use first by the rule of `analysis.stats.pick`. Seed 0 stands for a
    setting: its seeds are averaged, as `by_setting` does (which takes a hundred times longer). Runs with all edits are
    left out where there are others: they do not compare."""
    fewer = any(run.edit_count for run in scores)
    groups = {run: rows for run, rows in _settings(scores).items() if rows and bool(run.edit_count) == fewer}
    if not groups:
        return []
    means = pd.DataFrame([{name: _mean(rows, name) for name in JUDGED} for rows in groups.values()])
    means["right_by_edit"] = [mean_right([row.get("right") for row in rows]) for rows in groups.values()]
    return [list(groups)[index] for index in judge(evidence_of(means)).order]


def _settings(scores: Scores) -> dict[Run, list[Mapping[str, Any]]]:
    """The settings of the runs that are over, in order, each as its run with seed 0 -> the rows of its runs that can be
    picked."""
    found: dict[Run, list[Mapping[str, Any]]] = {}
    for run, score in sorted(scores.items(), key=lambda item: item[0]):
        if not score.is_running:
            rows = found.setdefault(replace(run, seed=0), [])
            rows += [score.row] if score.comparable else []
    return found


def _mean(rows: Sequence[Mapping[str, Any]], name: str) -> float:
    """Over the rows that have a finite value; NaN where none has."""
    found = [value for row in rows if math.isfinite(value := row.get(name, math.nan))]
    return sum(found) / len(found) if found else math.nan


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
    return Run(candidate.layer, candidate.module, task.rate(candidate), edit_count=task.compared_on)


def another_rate(run: Run, scores: Scores) -> Run:
    """A leading setting at half the learning rate, which disturbs less, or where it learnt too little, at twice the rate."""
    factor = 2.0 if _mean(_settings(scores)[run], "reliability") < LEARNT else 0.5
    return replace(run, learning_rate=float(f"{factor * run.learning_rate:.2g}"))


def spent(scores: Scores) -> float:
    """What all runs cost together, in seconds of one worker."""
    return sum(score.seconds for score in scores.values())


def slowness(task: SelectionTask, scores: Scores) -> float:
    """What the runs that are over cost, by what was expected of them."""
    over = {run: score for run, score in scores.items() if not score.is_running}
    predicted = sum(map(task.seconds, over))
    return spent(over) / predicted if predicted else 1.0


def affordable(task: SelectionTask, scores: Scores, runs: Sequence[Run], seconds: float) -> list[Run]:
    """The longest prefix of the runs that these seconds pay for."""
    costs = slowness(task, scores) * np.cumsum([task.seconds(run) for run in runs])
    return list(runs[: int(np.searchsorted(costs, seconds, side="right"))])
