"""Decisions taken coarsely first come out as the exact ones, and most of them are taken once only."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.data.suites import load_suite
from locft.measure.capability import encode_suite, item_margins, score_suite
from locft.measure.token_scores import FEWEST, SAFETY, retake
from locft.train.reference import full_forward
from tests.tiny import tiny_loaded, watched_and_coarse


@given(
    margins=st.lists(st.floats(-5, 5), max_size=120),
    shifts=st.lists(st.floats(-1, 1), min_size=120, max_size=120),
    scale=st.sampled_from([0.0, 1e-3, 0.1, 10.0]),
)
@settings(max_examples=300)
def test_every_decision_within_reach_of_a_shift_is_the_exact_one(margins, shifts, scale):
    exact = np.array(margins)
    moved = scale * np.array(shifts[: len(exact)])
    found, taken = exact + moved, []

    def exactly(indices):
        taken.extend(indices)
        found[indices] = exact[indices]
        return np.abs(moved[indices])

    coarse = np.abs(found.copy())
    retake(coarse, exactly)
    assert len(set(taken)) == len(taken) >= min(len(exact), FEWEST)
    seen = np.sqrt(np.mean(moved[taken] ** 2)) if taken else 0.0
    left = [index for index in range(len(exact)) if index not in taken]
    assert all(coarse[index] > SAFETY * seen * (1 - 1e-9) for index in left)
    settled = [index for index in left if abs(moved[index]) <= SAFETY * seen]
    assert ((found > 0) == (exact > 0))[[*taken, *settled]].all()


def test_margins_that_are_no_numbers_have_everything_taken_again():
    taken = []
    retake(np.arange(100.0), lambda indices: taken.extend(indices) or np.full(len(indices), np.nan))
    assert sorted(taken) == list(range(100))


@pytest.fixture
def tiny():
    loaded = tiny_loaded("llama")
    exact = full_forward(loaded.model)
    watched, asked, coarse = watched_and_coarse(exact, 0.04)
    return loaded, exact, watched, coarse, asked


def test_scores_are_those_of_the_exact_computation(tiny):
    loaded, exact, watched, coarse, asked = tiny
    suite = encode_suite(loaded.tokenizer, load_suite("probes", limit=60), 0)
    items = [item for task in suite.tasks.values() for item in task]
    plain = item_margins(exact, items) > 0
    assert (item_margins(coarse, items) > 0).tolist() != plain.tolist(), "the noise decides nothing: nothing is tested"
    assert score_suite(watched, suite, coarse=coarse) == score_suite(exact, suite)
    assert 0 < len(asked) < 0.8 * sum(len(item.rows) for item in items)
