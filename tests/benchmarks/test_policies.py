"""The policies that the survey is compared with, against tables of known scores."""

import pandas as pd
import pytest

from sweeps.select.policy import spent
from tests.benchmarks.policies import POLICIES, ReplayTask, replayed
from tests.benchmarks.replay import calibration, replays, summary, worlds
from tests.sweeps.select.test_policy import World


def task_of(world, share):
    return ReplayTask(**vars(world.task(share)), seed=3, probed=world.candidates)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("share", [0.02, 0.1, 0.5])
def test_every_policy_answers_within_its_budget_and_runs_nothing_twice(name, share):
    world = World()
    rungs, scores = replayed(POLICIES[name], task_of(world, share), world.score)
    asked = [run for rung in rungs for run in rung.runs]
    assert len(set(asked)) == len(asked), "nothing twice"
    assert all(rung.runs and rung.why for rung in rungs)
    assert scores, "there is always an answer"
    most = max(map(world.seconds, scores))
    assert spent(scores) <= share * world.grid + (most if len(scores) == 1 else 1e-6)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_is_a_function_of_its_task(name):
    first = replayed(POLICIES[name], task_of(World(), 0.1), World().score)
    assert replayed(POLICIES[name], task_of(World(), 0.1), World().score) == first


def test_a_replay_knows_what_it_missed():
    """On the published table, small enough to be quick: no regret is negative, and what is run is paid for."""
    found = replays("t", worlds("smollm2-zsre-plain", 2, 5, ("mlp_down", "attn"), equal_costs=True))
    assert (found[["drift", "capability", "capability lost"]] >= -1e-12).all(axis=None)
    assert found.volume.between(0, 1 + 1e-9).all()
    assert set(summary(found).index.get_level_values("policy")) == set(POLICIES)


def test_calibration_compares_what_was_stated_with_what_came():
    rows = [("survey", 0.02, False)] * 9 + [("survey", 0.02, True)] + [("survey", 0.5, True), ("probe", None, None)]
    table, brier, base = calibration(pd.DataFrame(rows, columns=["policy", "stated", "elsewhere"]))
    assert table["came true"].tolist() == [0.1, 1.0] and table["replays"].tolist() == [10, 1]
    assert brier == pytest.approx((9 * 0.02**2 + 0.98**2 + 0.5**2) / 11)
    assert base == pytest.approx(2 / 11 * 9 / 11)
