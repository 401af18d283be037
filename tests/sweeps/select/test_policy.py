"""The survey: the probe's best, some of each kind of module, and enough left to confirm."""

import pytest

from sweeps.select.race import leading, spent
from sweeps.select.race_search import replayed
from sweeps.select.policy import in_turn, survey
from tests.sweeps.select.test_race import MODULES, World, drift_of


def test_kinds_in_turn_get_the_same_time_and_the_best_of_each_comes_first():
    world = World()
    task = world.task(1.0)
    order = in_turn(task)
    assert sorted(run.position for run in order) == sorted(c.position for c in world.candidates)
    dearest = max(map(world.seconds, order))
    for upto in range(1, len(order) // 2):
        taken = dict.fromkeys(MODULES, 0.0)
        for run in order[:upto]:
            taken[run.module] += world.seconds(run)
        assert max(taken.values()) - min(taken.values()) <= dearest
    disturbance = {c.position: c.disturbance for c in world.candidates}
    for module in MODULES:
        line = [disturbance[run.position] for run in order if run.module == module]
        assert line == sorted(line)


def test_what_served_elsewhere_is_in_the_first_rung():
    world = World()
    rungs, _ = replayed(survey, world.task(0.2, priors=((0.0, "attn"), (0.5, "mlp"))), world.score)
    first = {run.position for run in rungs[0].runs}
    best = sorted(world.candidates, key=lambda c: c.disturbance)
    assert {"0.attn", *(c.position for c in best[: len(first) - 2])} < first and first & {"11.mlp", "12.mlp"}
    costs = [world.seconds(run) for run in rungs[0].runs]
    assert costs == sorted(costs, reverse=True), "longest first: workers end together"


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_it_finds_the_best_looks_at_every_kind_and_confirms_the_leader(share):
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
