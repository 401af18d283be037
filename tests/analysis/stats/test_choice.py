"""The rule of the selection: which setting is used, in what order the others come, and how sure that is."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.stats.choice import FAILED, Outcome, outcome_of, preference, probabilities

GOOD = Outcome(1.0, 0.01, 0.6, 0.05, 0.0, 0.01, 0.05, 0.005)


def like(**changes):
    return dataclasses.replace(GOOD, **changes)


outcomes = st.builds(
    Outcome,
    st.floats(0, 1), st.floats(0.005, 0.1), st.floats(0, 1), st.floats(0.005, 0.1), st.floats(-0.3, 0.1),
    st.floats(0.001, 0.05), st.floats(0, 5), st.floats(0.001, 0.1),
)  # fmt: skip


@pytest.mark.parametrize(
    "worse, why",
    [
        (like(reliability=0.98, drift=0.01, generalization=1.0), "reliability first"),
        (like(capability_change=-0.021, drift=0.01, generalization=1.0), "then no loss of capability"),
        (like(drift=0.061, generalization=1.0), "then drift"),
        (like(generalization=0.55, drift=0.041), "of about the same drift the higher generalization"),
        (FAILED, "a failure comes last"),
    ],
)
def test_each_step_of_the_rule_decides(worse, why):
    assert preference([worse, GOOD]) == [1, 0] and preference([GOOD, worse]) == [0, 1], why


def test_differences_within_the_errors_do_not_count():
    assert preference([GOOD, like(reliability=0.995, generalization=0.7)]) == [1, 0]
    assert preference([GOOD, like(capability_change=-0.019, generalization=0.7)]) == [1, 0]
    assert preference([GOOD, like(drift=0.059, generalization=0.7)]) == [1, 0]


def test_a_gain_in_accuracy_is_no_aim():
    """A setting that shakes the model more but answers a few more items right is not preferred."""
    assert preference([GOOD, like(capability_change=0.06, drift=1.9)]) == [0, 1]


def test_where_all_lose_capability_those_that_lose_least_are_left():
    assert preference([like(capability_change=-0.2, drift=0.01), like(capability_change=-0.1)]) == [1, 0]


@given(st.lists(outcomes, min_size=1, max_size=8), st.randoms())
def test_the_order_is_complete_and_does_not_depend_on_the_order_given(found, random):
    order = preference(found)
    assert sorted(order) == list(range(len(found)))
    shuffled = random.sample(found, len(found))
    assert shuffled[preference(shuffled)[0]] == found[order[0]] or len(set(found)) < len(found)


@settings(deadline=None, max_examples=20)
@given(st.lists(outcomes, min_size=1, max_size=5))
def test_chances_add_up_to_one(found):
    chances = probabilities(found)
    assert len(chances) == len(found) and sum(chances) == pytest.approx(1) and min(chances) >= 0


def test_chances_say_how_sure_it_is():
    clear = probabilities([GOOD, like(drift=0.5), FAILED])
    assert clear[0] > 0.95 and clear[2] == 0
    by_edit = np.ones((2, 2, 50))
    by_edit[1, 0, :3] = 0  # one setting misses three edits that the other has
    assert probabilities([GOOD, GOOD], by_edit)[0] > 0.9
    by_edit[0, 0, 40:] = by_edit[1, 0, 40:] = 0  # edits that both miss decide nothing
    assert probabilities([GOOD, GOOD], by_edit)[0] > 0.75
    twins = probabilities([GOOD, GOOD])
    assert 0.45 < twins[0] < 0.55
    assert probabilities([GOOD, like(generalization=0.61)]) == probabilities([GOOD, like(generalization=0.61)])
    assert preference([]) == [] and probabilities([]) == []


def test_an_outcome_comes_from_the_metrics_of_a_trial():
    metrics = {
        "reliability": 0.9, "generalization": 0.5, "n_edits": 40.0, "capability_change": -0.01,
        "capability_change_low": -0.0296, "capability_change_high": 0.0096, "drift_kl": 0.2,
    }  # fmt: skip
    found = outcome_of(metrics)
    assert (found.reliability, found.generalization, found.drift) == (0.9, 0.5, 0.2)
    assert found.capability_se == pytest.approx(0.01, rel=1e-3) and found.drift_se == pytest.approx(0.02)
    assert 0.03 < found.reliability_se < 0.06
    assert outcome_of({**metrics, "diverged": 1.0}) == FAILED
    bare = outcome_of({"reliability": 0.5, "n_edits": 4.0, "drift_kl": math.nan})
    assert (bare.drift, bare.capability_change, bare.capability_se) == (0.0, 0.0, 0.0)
