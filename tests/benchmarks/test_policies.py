"""The policies that the survey is compared with, against tables of known scores."""

from dataclasses import replace

import pytest

from sweeps.select.policy import Candidate, Run, leading, spent
from tests.benchmarks.policies import POLICIES, replayed
from tests.benchmarks.race import ReplayTask, Scout, in_full, race
from tests.sweeps.select.test_policy import World, drift_of

LEVELS = (10, 30)
COSTS = (1.0, 4.0, 16.0)


class LevelledWorld(World):
    """Scouts cost less than full runs, and say the same."""

    def seconds(self, run):
        return COSTS[run.level if isinstance(run, Scout) else -1] / COSTS[-1] * super().seconds(run)

    def task(self, share, **changes):
        task = super().task(share, **changes)
        return ReplayTask(**vars(task), levels=LEVELS)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_every_policy_answers_within_its_budget_and_runs_nothing_twice(name, share):
    world = LevelledWorld()
    rungs, scores = replayed(POLICIES[name], world.task(share), world.score)
    asked = [run for rung in rungs for run in rung.runs]
    assert len(set(asked)) == len(asked), "nothing twice"
    assert all(rung.runs and rung.why for rung in rungs)
    full = in_full(scores)
    assert full, "there is always an answer at full fidelity"
    most = max(map(world.seconds, full))
    assert spent(scores) <= share * world.grid + (most if len(full) == 1 else 1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_a_function_of_its_task(name):
    first = replayed(POLICIES[name], LevelledWorld().task(0.1), LevelledWorld().score)
    assert replayed(POLICIES[name], LevelledWorld().task(0.1), LevelledWorld().score) == first


def test_the_race_finds_the_best_position():
    world = LevelledWorld()
    rungs, scores = replayed(race, world.task(0.2), world.score)
    run = leading(in_full(scores))[0]
    assert drift_of(run.layer, run.module) <= 0.04 and scores[run].row["reliability"] == 1.0
    assert [rung.name for rung in rungs[:3]] == ["scouts", "semifinal", "finals"]
    places = [{run.position for run in rung.runs} for rung in rungs[:3]]
    assert places[1] < places[0] and places[2] <= places[1], "a rung is a part of the one before"
    assert {"attn"} & {run.module for run in rungs[0].runs}, "the insurance share looks everywhere"
    assert not {"attn"} & {run.module for run in rungs[2].runs}


def test_the_race_survives_a_probe_that_is_wrong():
    """With the probe's order reversed the insurance share still brings a decent position, only not the best."""
    world = LevelledWorld()
    worst = max(c.disturbance for c in world.candidates)
    world.candidates = tuple(Candidate(c.layer, c.module, worst - c.disturbance, c.gain) for c in world.candidates)
    _, scores = replayed(race, world.task(0.2), world.score)
    run = leading(in_full(scores))[0]
    assert run.module != "attn" and drift_of(run.layer, run.module) < 0.2


def test_the_race_confirms_and_ends_by_itself():
    world = LevelledWorld()
    _, scores = replayed(race, world.task(1.0), world.score)
    best = leading(in_full(scores))[0]
    assert {0.001, 0.002} <= {run.learning_rate for run in in_full(scores)}
    assert best.learning_rate == 0.002, "the gentler one learns too little here"
    assert {0, 1, 2} <= {run.seed for run in in_full(scores) if run.position == best.position}
    assert spent(scores) < 0.9 * world.grid, "it does not use up what it cannot learn from"
    _fixed, known = replayed(race, world.task(1.0, other_rate=False), world.score)
    assert {run.learning_rate for run in known} == {0.002}


def test_without_levels_a_race_begins_with_its_finals():
    world = World()
    task = ReplayTask(world.candidates, 24, lambda run: 1.0, lambda candidate: 0.002, 10.0, 2)
    rungs, scores = replayed(race, task, lambda run: replace(world.score(run), seconds=1.0))
    assert rungs[0].name == "finals" and 1 <= len(scores) <= 10
    assert all(type(run) is Run for run in scores)
