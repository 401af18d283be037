"""The survey: runs apart in depth, then what is likeliest to matter, then the leader again; against tables of known scores."""

import math
import random
from dataclasses import replace

import pytest

from analysis.stats.pick import ranked
from analysis.stats.table import by_setting, pack_right, results_frame
from sweeps.select.belief import Place, chances
from sweeps.select.policy import (
    Candidate,
    Run,
    Score,
    SelectionTask,
    affordable,
    confirmations,
    expectations,
    first_run,
    intent,
    leading,
    spent,
    start_rate,
    survey,
)
from sweeps.select.selection import PolicySearch, seconds_left
from sweeps.study.trial_types import TrialResult
from tests import mlflow_store
from tests.benchmarks.full_table import everything
from tests.benchmarks.policies import replayed

MODULES = ("mlp_down", "mlp", "attn")


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
        return 16 * (1 + (23 - run.layer) / 12)

    def score(self, run):
        if run not in self.known:
            drift = drift_of(run.layer, run.module) * math.exp(self.random.gauss(0, self.noise))
            drift *= run.learning_rate / 0.002
            reliable = 1.0 if run.learning_rate > 0.0015 else 0.7
            row = {"reliability": reliable, "generalization": 0.6, "drift_kl": drift, "n_edits": 100}
            self.known[run] = Score({"status": "done", **row}, self.seconds(run))
        return self.known[run]

    @property
    def grid(self):
        return sum(self.seconds(Run(c.layer, c.module, 0.002)) for c in self.candidates)

    def task(self, share, **changes):
        given = {"budget": share * self.grid, "concurrent": 2, **changes}
        return SelectionTask(self.candidates, 24, self.seconds, lambda candidate: 0.002, **given)


@pytest.mark.parametrize("order", [1, -1, 0])
def test_with_three_runs_they_are_apart_in_depth_whatever_the_probe_says(order):
    """A model on which the probe is right, wrong or says nothing; every run costs the same."""
    world = World()
    world.seconds = lambda run: 10.0
    world.candidates = tuple(replace(c, disturbance=c.disturbance**order) for c in world.candidates)
    rungs, _ = replayed(survey, world.task(3.4 / len(world.candidates)), world.score)
    assert [len(rung.runs) for rung in rungs] == [2, 1] and {rung.name for rung in rungs} == {"survey"}
    layers = sorted(run.layer for run in rungs[0].runs)
    assert layers[1] - layers[0] >= 6


def test_a_probe_that_is_wrong_is_found_out():
    """A few runs show what the probe does not."""
    world = World(probe_noise=0.0)
    world.candidates = tuple(replace(c, disturbance=1 / c.disturbance) for c in world.candidates)
    _, scores = replayed(survey, world.task(0.2), world.score)
    run = leading(scores)[0]
    assert run.module != "attn" and drift_of(run.layer, run.module) <= 0.05


def test_clearly_better_is_what_may_be_the_pick_and_gains_more_than_a_margin():
    depths = [0.1, 0.3, 0.6, 0.9]
    measured = {"reliability": 1.0, "generalization": 0.6, "drift_kl": 0.02, "capability_change": 0.0}
    unknown = [Place(depth, "mlp", 1.0, 10.0) for depth in depths]
    first = chances(unknown)
    assert (first.better == first.pick).all(), "whatever is run first is better than nothing"
    one = chances([replace(unknown[0], measured=measured), *unknown[1:]])
    assert one.better[0] == 0 and (one.better <= one.pick).all() and 0 < one.better.sum() < one.pick[1:].sum()
    failed = {name: math.nan for name in measured}
    assert chances([replace(unknown[0], measured=failed), *unknown[1:]]).better.sum() == pytest.approx(1.0)
    twins = [replace(place, measured=measured | {"generalization": 0.6 + 0.01 * i}) for i, place in enumerate(unknown)]
    assert chances(twins).better.sum() == 0 and chances(twins).pick[3] == 1


def test_it_ends_when_nothing_left_is_likely_to_be_clearly_better():
    world = World(noise=0.0, probe_noise=0.0)
    task = world.task(1.0)
    rungs, scores = replayed(survey, task, world.score)
    left = [run for run in (first_run(task, candidate) for candidate in world.candidates) if run not in scores]
    expected = expectations(task, scores)
    better = [expected.better[i] for i, candidate in enumerate(task.candidates) if first_run(task, candidate) in left]
    assert left and sum(better) < 0.05
    assert spent(scores) < 0.9 * world.grid and rungs[-1].name == "confirm"


def test_what_served_elsewhere_is_in_the_first_rung():
    world = World()
    rungs, _ = replayed(survey, world.task(0.2, priors=((0.0, "attn"), (0.5, "mlp"))), world.score)
    first = {run.position for run in rungs[0].runs}
    assert "0.attn" in first and first & {"11.mlp", "12.mlp"}
    costs = [world.seconds(run) for run in rungs[0].runs]
    assert costs == sorted(costs, reverse=True), "longest first: workers end together"


@pytest.mark.parametrize("share", [0.05, 0.1, 0.2])
def test_it_finds_the_best_and_confirms_the_leader(share):
    world = World()
    rungs, scores = replayed(survey, world.task(share), world.score)
    run = leading(scores)[0]
    assert drift_of(run.layer, run.module) <= 0.05
    confirmed = [run for rung in rungs if rung.name == "confirm" for run in rung.runs]
    names = [rung.name for rung in rungs]
    assert names == sorted(names, reverse=True) and set(names) <= {"survey", "confirm"}, "it confirms at the end"
    if share < 0.1:
        assert len(scores) - len(confirmed) >= 3 > len(confirmed), "few runs are spread before one is confirmed"
        return
    before = {run: score for run, score in scores.items() if run not in confirmed}
    leader = leading(before)[0].position
    asked = {(run.learning_rate, run.seed) for run in confirmed if run.position == leader}
    wanted = [(0.001, 0), (0.002, 1)]
    assert set(wanted[: 1 if share < 0.2 else 2]) <= asked, "half the rate, and with a larger budget a second seed"
    assert spent(scores) > 0.7 * share * world.grid


@pytest.mark.parametrize("timed, dearer", [(False, 3), (False, 900), (True, 3), (True, 900)])
def test_positions_are_compared_on_some_edits_and_the_leader_is_run_with_all(timed, dearer):
    """A run with all edits drifts more, and does not compare. A share of the grid's cost does not count it; a clock does, and
    has no time for one that takes most of it."""
    world = World()

    def seconds(run):
        return (1 if run.edit_count else dearer) * world.seconds(run)

    def score(run):
        found = world.score(replace(run, edit_count=0))
        return Score({**found.row, "drift_kl": (1 if run.edit_count else 3) * found.row["drift_kl"]}, seconds(run))

    task = replace(world.task(0.2, compared_on=40, timed=timed), seconds=seconds)
    rungs, scores = replayed(survey, task, score)
    assert {run.edit_count for rung in rungs[:-1] for run in rung.runs} == {40}
    compared = {run: found for run, found in scores.items() if run.edit_count}
    whole = [run for run in scores if not run.edit_count]
    assert leading(scores) == leading(compared) and 0.7 * task.budget < spent(compared) <= task.budget
    if timed and dearer == 900:
        assert not whole and rungs[-1].name != "all edits"
    else:
        assert rungs[-1].name == "all edits" and whole == [replace(leading(compared)[0], edit_count=0)]
    assert not timed or spent(scores) <= task.budget


def test_costs_that_were_underrated_are_noticed_in_time():
    world = World()
    task = world.task(0.2)

    def dear(run):
        score = world.score(run)
        return replace(score, seconds=1.8 * score.seconds)

    _, scores = replayed(survey, task, dear)
    assert spent(scores) <= task.budget


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 1.0])
def test_it_answers_within_any_budget_and_runs_nothing_twice(share):
    world = World()
    rungs, scores = replayed(survey, world.task(share), world.score)
    asked = [run for rung in rungs for run in rung.runs]
    assert len(set(asked)) == len(asked) and all(rung.runs and rung.why for rung in rungs)
    most = max(map(world.seconds, scores))
    assert spent(scores) <= share * world.grid + (most if len(scores) == 1 else 1e-6)


def test_a_failed_run_does_not_stop_it():
    world = World()

    def score(run):
        return Score({"status": "failed"}, 1.0) if run.layer in (19, 20, 21) else world.score(run)

    _, scores = replayed(survey, world.task(0.2), score)
    assert leading(scores)[0].layer not in (19, 20, 21)


def test_costs_are_corrected_by_what_runs_turn_out_to_cost():
    world = World()
    task = world.task(1.0)
    runs = [first_run(task, candidate) for candidate in world.candidates]
    assert len(affordable(task, {}, runs, 320.0)) > len(
        affordable(task, {runs[0]: Score({"status": "failed"}, 1600.0)}, runs, 320.0)
    )
    assert affordable(task, {}, runs, 0.0) == []


def test_the_starting_rate_goes_with_the_inverse_of_the_gain_and_grows_where_steps_are_few():
    few, usual = start_rate(Candidate(0, "mlp", 1.0, 500.0), 25), start_rate(Candidate(0, "mlp", 1.0, 500.0), 250)
    assert (few, usual) == (0.004, 0.002)
    assert start_rate(Candidate(0, "mlp", 1.0, 50.0), 250) == 0.02
    assert start_rate(Candidate(0, "mlp", 1.0, 0.0), 100) > 0


def test_a_leader_that_learnt_too_little_is_tried_at_twice_the_rate():
    """By the mean over its seeds, of which the first failed."""

    def asked(*reliabilities):
        rows = [{"status": "done", "reliability": share, "drift_kl": 0.1, "n_edits": 40} for share in reliabilities]
        scores = {Run(3, "mlp", 0.002, seed): Score(row, 1.0) for seed, row in enumerate(rows, 1)}
        scores[Run(3, "mlp", 0.002, 0)] = Score({"status": "failed"}, 1.0)
        first = confirmations(World().task(1.0), scores)[0]
        return first, intent(first, scores)

    assert asked(0.9, 0.99) == (Run(3, "mlp", 0.004), "3.mlp at twice the rate")
    assert asked(0.96, 0.99) == (Run(3, "mlp", 0.001), "3.mlp at half the rate")


def test_seeds_of_a_setting_are_one_setting():
    def row(drift, generalization=0.5):
        measured = {"reliability": 1.0, "generalization": generalization, "drift_kl": drift, "n_edits": 100}
        return {"status": "done", **measured}

    scores = {Run(3, "mlp", 0.002, seed): Score(row(drift), 1.0) for seed, drift in enumerate((0.3, 0.1, 0.1))}
    assert leading(scores) == [Run(3, "mlp", 0.002)]
    mean, better = (0.3 + 0.1 + 0.1) / 3, Run(5, "mlp", 0.002)
    assert leading({**scores, better: Score(row(mean + 0.009, 0.8), 1.0)})[0] == better, "within the margin of the mean"
    assert leading({**scores, better: Score(row(mean + 0.011, 0.8), 1.0)})[0] != better


def test_the_policy_leads_with_what_the_results_table_picks():
    draw = random.Random(1)
    scores = {}
    for layer in range(8):
        for seed in range(1 + layer % 3):
            right = [draw.random() < 0.97 for _ in range(40)]
            row = {
                "trial_id": f"{layer} {seed}", "status": "failed" if layer == 3 else "done", "layer": layer, "module": "mlp",
                "layers": 8, "learning_rate": 0.01, "seed": seed, "reliability": sum(right) / 40,
                "generalization": draw.random(), "capability_change": draw.uniform(-0.1, 0.05), "n_edits": 40,
                "drift_kl": draw.uniform(0, 0.05), "seconds_per_edit": 1.0, "diverged": float(layer == 5),
                "right": pack_right(right),
            }  # fmt: skip
            scores[Run(layer, "mlp", 0.01, seed)] = Score(row, 1.0)
    table = ranked(by_setting(results_frame([score.row for score in scores.values()])))
    assert [run.layer for run in leading(scores)] == table["layer"].tolist() and len(table) == 6


def config_of(run):
    return mlflow_store.config(run.layer, run.module, learning_rate=run.learning_rate, seed=run.seed)


def recorded(policy, sent):
    """The policy, while what it is sent is kept."""
    answer = next(policy)
    while True:
        sent.append((yield answer))
        try:
            answer = policy.send(sent[-1])
        except StopIteration:
            return


def searched(world, share=0.1, wrapped=lambda policy: policy):
    """A search over the world, by what is known; and what it told of its rungs."""
    told, task = [], world.task(share)

    def search(known):
        scored = lambda run, _: world.score(run)  # noqa: E731
        known_task = replace(task, known=known)
        return PolicySearch(lambda t: wrapped(survey(t)), known_task, config_of, scored, lambda r, n: told.append(n))

    return search, told


def finish(search, running=()):
    """Runs all that a search proposes, one after the other, beside what is running; returns the configurations."""
    found, running = [], dict(running)
    while (config := search.propose(key := f"x{len(found)}")) is not None:
        if config == "wait":
            key, config = running.popitem()
        else:
            found.append(config)
        search.learn(key, TrialResult(config, "done"))
    return found


def test_a_search_goes_on_from_what_is_known():
    search, told = searched(World())
    found = search({})
    first = found.propose("a")
    second = found.propose("b")
    assert second not in ("wait", None)
    found.learn("a", TrialResult(first, "done"))
    found.learn("b", None)  # its worker was killed
    started = 2 + len(finish(found))
    assert started == sum(told) == len(found.scores), (
        "what is lost has been tried often enough, and is not asked for again"
    )
    (lost,) = (run for run, score in found.scores.items() if score.row["status"] == "failed")
    assert config_of(lost) == second and found.scores[lost].seconds == World().seconds(lost), "it is charged"
    again = search(found.scores)
    assert finish(again) == [] and again.scores == found.scores
    assert [rung.name for rung in again.rungs] == ["earlier"] and set(again.rungs[0].runs) == set(found.scores)
    half = dict(list(found.scores.items())[: len(found.scores) // 2])
    resumed = search(half)
    assert finish(resumed) and set(half) < set(resumed.scores) and resumed.rungs[1].name == "survey"


@pytest.mark.parametrize("concurrent", [1, 2, 8])
def test_how_long_the_budget_lasts_goes_by_the_runs_that_are_over(concurrent):
    """Here they take twice the time expected; what runs beside them, or lost its worker, says nothing of that."""
    world = World()
    task = world.task(0.3, concurrent=concurrent)
    runs = [first_run(task, candidate) for candidate in world.candidates[:4]]
    over = {run: Score({"status": "done", "seconds": 2 * world.seconds(run)}, world.seconds(run)) for run in runs[:2]}
    going = {runs[2]: Score({"status": "running"}, world.seconds(runs[2]))}
    lost = {runs[3]: Score({"status": "failed"}, world.seconds(runs[3]))}
    for scores in (over, over | going, over | going | lost):
        expected = 2 * (task.budget - sum(map(world.seconds, scores))) / concurrent
        assert seconds_left(task, scores) == pytest.approx(expected)


def test_a_free_worker_does_not_wait_for_a_slow_one():
    sent = []
    search, _ = searched(World(), 0.2, lambda policy: recorded(policy, sent))
    found = search({})
    slow = found.propose("slow")
    beside = []
    while (config := found.propose("quick")) not in ("wait", None):
        assert config != slow
        beside.append(config)
        found.learn("quick", TrialResult(config, "done"))
    assert config == "wait" and {rung.name for rung in found.rungs} == {"survey"}, "the leader is known at the end only"
    assert len(beside) > 4 and len(set(beside)) == len(beside)
    assert spent(found.so_far) <= World().task(0.2).budget
    before = len(sent)
    assert found.propose("quick") == "wait" and len(sent) == before, "nothing is over that the policy does not know of"
    rest = finish(found, {"slow": slow})
    assert rest and {rung.name for rung in found.rungs[-2:]} == {"confirm"} and found.propose("x") is None


def test_a_full_table_has_every_position_before_its_front_is_known():
    world = World()
    policy = everything(world.task(1.0))
    scores = {run: world.score(run) for run in next(policy).runs}
    slow = next(iter(scores))
    assert policy.send(scores | {slow: Score({"status": "running"}, world.seconds(slow))}) is None
    front = policy.send(scores)
    assert front.name == "front" and {run.seed for run in front.runs} == {1}


def test_where_edits_usually_drift_little_late_layers_count_more():
    """They usually generalize better, and there is little drift to lose."""
    places = [Place(depth, "mlp", 1.0 + depth, 10.0) for depth in (0.1, 0.3, 0.6, 0.9)]
    assert chances(places, "natural_gradient").pick[3] > chances(places, "full").pick[3]
    assert (chances(places, "full").pick == chances(places).pick).all()
