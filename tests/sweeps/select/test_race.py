"""The race and the policies it is compared with, against tables of known scores."""

import math
import random

import pytest

from analysis.stats.choice import FAILED, Outcome
from sweeps.select.baselines import POLICIES
from sweeps.select.race import Candidate, Run, Score, Task, affordable, first_run, leading, race, spent, start_rate
from sweeps.select.race_search import RaceSearch, replayed
from sweeps.study.trial_types import TrialConfig, TrialResult

MODULES = ("mlp_down", "mlp", "attn")
LEVELS = (10, 30, 100)
COSTS = (1.0, 4.0, 16.0)


def drift_of(layer, module):
    """Late middle is best, attention is bad."""
    return 0.02 + 0.01 * abs(layer - 20) + (0.5 if module == "attn" else 0.0)


class World:
    """Twenty-four layers of three modules with known drift; cost falls with depth, as with the engine."""

    def __init__(self, noise=0.05, seed=0, probe_noise=0.2):
        self.random = random.Random(seed)
        self.noise = noise
        self.known = {}
        self.candidates = tuple(
            Candidate(layer, module, drift_of(layer, module) * math.exp(self.random.gauss(0, probe_noise)), 500.0)
            for layer in range(24)
            for module in MODULES
        )

    def seconds(self, run):
        return COSTS[run.level] * (1 + (23 - run.layer) / 12)

    def score(self, run):
        if run not in self.known:
            drift = drift_of(run.layer, run.module) * math.exp(self.random.gauss(0, self.noise))
            drift *= run.learning_rate / 0.002
            reliable = 1.0 if run.learning_rate > 0.0015 else 0.7
            outcome = Outcome(reliable, 0.01, 0.6, 0.05, 0.0, 0.01, drift, self.noise * drift)
            self.known[run] = Score(outcome, self.seconds(run))
        return self.known[run]

    @property
    def grid(self):
        return sum(self.seconds(Run(c.layer, c.module, 0.002, 2)) for c in self.candidates)

    def task(self, share, **changes):
        given = {"budget": share * self.grid, "concurrent": 2, "seed": 0, **changes}
        return Task(self.candidates, LEVELS, 24, self.seconds, lambda candidate, level: 0.002, **given)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_every_policy_answers_within_its_budget_and_runs_nothing_twice(name, share):
    world = World()
    rungs, scores = replayed(POLICIES[name], world.task(share), world.score)
    asked = [run for rung in rungs for run in rung.runs]
    assert len(set(asked)) == len(asked), "nothing twice"
    assert all(rung.runs and rung.why for rung in rungs)
    full = [run for run in scores if run.level == 2]
    assert full, "there is always an answer at full fidelity"
    most = max(world.seconds(run) for run in full)
    assert spent(scores) <= share * world.grid + (most if len(full) == 1 else 1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_a_function_of_its_task(name):
    first = replayed(POLICIES[name], World().task(0.1), World().score)
    assert replayed(POLICIES[name], World().task(0.1), World().score) == first


def test_the_race_finds_the_best_position_and_says_why_the_others_are_out():
    world = World()
    rungs, scores = replayed(race, world.task(0.2), world.score)
    (run, outcome), *_ = leading(scores, 2)
    assert drift_of(run.layer, run.module) <= 0.04 and outcome.reliability == 1.0
    assert [rung.name for rung in rungs[:3]] == ["scouts", "semifinal", "finals"]
    assert set(rungs[1].runs) <= {Run(r.layer, r.module, r.learning_rate, 1) for r in rungs[0].runs}
    for before, after in zip(rungs[:2], rungs[1:3], strict=True):
        out = {r.position for r in before.runs} - {r.position for r in after.runs}
        assert out and out <= set(after.dropped), "every position that is out has a reason"
        assert all(after.dropped[position] for position in out)
    assert {"attn"} & {run.module for run in rungs[0].runs}, "the insurance share looks everywhere"
    assert not {"attn"} & {run.module for run in rungs[2].runs}


def test_the_race_survives_a_probe_that_is_wrong():
    """With the probe's order reversed the insurance share still brings a decent position, only not the best."""
    world = World()
    worst = max(c.disturbance for c in world.candidates)
    misled = tuple(Candidate(c.layer, c.module, worst - c.disturbance, c.gain) for c in world.candidates)
    task = Task(misled, LEVELS, 24, world.seconds, lambda candidate, level: 0.002, 0.2 * world.grid, 2, 0)
    _, scores = replayed(race, task, world.score)
    run, _ = leading(scores, 2)[0]
    assert run.module != "attn" and drift_of(run.layer, run.module) < 0.2


def test_confirming_tries_a_gentler_rate_and_further_seeds_and_ends_by_itself():
    world = World()
    rungs, scores = replayed(race, world.task(1.0), world.score)
    best = leading(scores, 2)[0][0]
    assert {0.001, 0.002} <= {run.learning_rate for run in scores if run.level == 2}
    assert best.learning_rate == 0.002, "the gentler one learns too little here"
    assert {0, 1, 2} <= {run.seed for run in scores if run.position == best.position and run.level == 2}
    assert spent(scores) < 0.9 * world.grid, "it does not use up what it cannot learn from"
    fixed, known = replayed(race, world.task(1.0, gentler=False), world.score)
    assert {run.learning_rate for run in known} == {0.002}


def test_a_failed_run_does_not_stop_the_race():
    world = World()

    def score(run):
        return Score(FAILED, 1.0) if run.layer in (19, 20, 21) else world.score(run)

    _, scores = replayed(race, world.task(0.2), score)
    assert leading(scores, 2)[0][0].layer not in (19, 20, 21)


def test_costs_are_corrected_by_what_runs_turn_out_to_cost():
    world = World()
    task = world.task(1.0)
    runs = [first_run(task, candidate, 0) for candidate in world.candidates]
    assert len(affordable(task, {}, runs, 20.0)) > len(affordable(task, {runs[0]: Score(FAILED, 100.0)}, runs, 20.0))
    assert affordable(task, {}, runs, 0.0) == []


def test_one_level_is_enough():
    world = World()
    task = Task(world.candidates, (8,), 24, lambda run: 1.0, lambda candidate, level: 0.002, 10.0, 2, 0)
    rungs, scores = replayed(race, task, lambda run: Score(world.score(run).outcome, 1.0))
    assert rungs[0].name == "finals" and 1 <= len(scores) <= 10


def test_the_starting_rate_goes_with_the_inverse_of_the_gain_and_grows_where_steps_are_few():
    few, usual = start_rate(Candidate(0, "mlp", 1.0, 500.0), 25), start_rate(Candidate(0, "mlp", 1.0, 500.0), 250)
    assert (few, usual) == (0.004, 0.002)
    assert start_rate(Candidate(0, "mlp", 1.0, 50.0), 250) == 0.02
    assert start_rate(Candidate(0, "mlp", 1.0, 0.0), 100) > 0


def test_seeds_of_a_setting_are_one_setting():
    good, bad = (Outcome(1.0, 0.01, g, 0.05, 0.0, 0.01, d, 0.1 * d) for g, d in ((0.8, 0.1), (0.4, 0.3)))
    scores = {Run(3, "mlp", 0.002, 2, seed): Score(good if seed else bad, 1.0) for seed in (0, 1, 2)}
    ((run, mean),) = leading(scores, 2)
    assert run.seed == 0 and mean.drift == pytest.approx((0.1 + 0.1 + 0.3) / 3)
    assert mean.drift_se == pytest.approx(math.sqrt(((0.1 / 1.5) ** 2 * 2 + (0.2 / 1.5) ** 2) / 2 / 3), rel=1e-6)


def config_of(run):
    return TrialConfig(
        model_fingerprint="m",
        data_fingerprint=f"d{run.level}",
        layers=24,
        layer=run.layer,
        module=run.module,
        pipeline="breadth_first",
        batch_size=8,
        learning_rate=run.learning_rate,
        seed=run.seed,
        loss_average="edit",
        epochs=5,
        skip_below=0,
        stop_below=0,
    )


def test_a_search_waits_for_the_rung_and_goes_on_from_what_is_known():
    world, told = World(), []

    def search(known):
        task = world.task(0.1)
        return RaceSearch(race, task, config_of, lambda run, _: world.score(run), known, lambda r, n: told.append(n))

    found, started = search({}), 0
    first = found.propose("a")
    assert found.propose("b") not in ("wait", None)
    found.learn("a", TrialResult(first, "done"))
    found.learn("b", None)  # its worker was killed
    while (config := found.propose("x")) is not None:
        assert config != "wait"
        found.learn("x", TrialResult(config, "done"))
        started += 1
    assert started == sum(told) - 2 and len(found.scores) == sum(told) - 1
    again = search(found.scores)
    missing = again.propose("x")
    assert missing is not None and again.propose("y") == "wait", "only the lost run is open in the first rung"
    again.learn("x", TrialResult(missing, "done"))
    while (config := again.propose("x")) is not None:
        again.learn("x", TrialResult(config, "done"))
    assert set(again.rungs[0].runs) <= set(again.scores) and [rung.name for rung in again.rungs[:2]] == [
        "scouts",
        "semifinal",
    ]
