"""The survey: each kind of module its share of the time, the probe's order within it, and enough left to confirm."""

import pytest

from sweeps.race import first_run, leading, spent
from sweeps.race_search import replayed
from sweeps.survey import in_turn, survey
from tests.test_race import MODULES, World, drift_of


def test_every_kind_gets_the_same_time_and_its_best_first():
    world = World()
    task = world.task(1.0)
    order = in_turn(task)
    assert sorted(order, key=lambda c: c.position) == sorted(world.candidates, key=lambda c: c.position)
    dearest = max(world.seconds(first_run(task, c, task.full)) for c in order)
    for upto in range(1, len(order) // 2):
        taken = dict.fromkeys(MODULES, 0.0)
        for candidate in order[:upto]:
            taken[candidate.module] += world.seconds(first_run(task, candidate, task.full))
        assert max(taken.values()) - min(taken.values()) <= dearest
    for module in MODULES:
        line = [c.disturbance for c in order if c.module == module]
        assert line == sorted(line)


def test_what_served_elsewhere_comes_first_of_its_kind():
    task = World().task(1.0, priors=((0.0, "attn"), (0.5, "mlp")))
    order = in_turn(task)
    assert next(c.layer for c in order if c.module == "attn") == 0
    assert next(c.layer for c in order if c.module == "mlp") in (11, 12)


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_it_finds_the_best_of_every_kind_and_confirms_the_leader(share):
    world = World()
    rungs, scores = replayed(survey, world.task(share), world.score)
    assert {run.level for run in scores} == {2}, "whatever it runs is run in full"
    assert share < 0.1 or {run.module for run in scores} == set(MODULES)
    run, _ = leading(scores, 2)[0]
    assert drift_of(run.layer, run.module) <= 0.05
    confirmed = rungs[-1].runs
    assert {(r.learning_rate, r.seed) for r in confirmed} == {(0.001, 0), (0.002, 1)}, "half the rate, and a second seed"
    leader = {r.position for r in confirmed}.pop()
    before = {run: score for run, score in scores.items() if run not in confirmed}
    assert [r.position for r in confirmed] == [leader] * 2 and leading(before, 2)[0][0].position == leader
    assert [rung.name for rung in rungs][-1] == "confirm" and rungs[0].name == "survey"
    assert share < 0.1 or len(rungs[0].runs) > 2, "workers are not held up by pairs of runs"
    assert spent(scores) > 0.75 * share * world.grid


def test_costs_that_were_underrated_are_noticed_in_time():
    world = World()
    task = world.task(0.2)

    def dear(run):
        score = world.score(run)
        return type(score)(score.outcome, 1.8 * score.seconds)

    _, scores = replayed(survey, task, dear)
    assert spent(scores) <= task.budget
