"""How sure front and pick are, when everything is drawn again."""

import numpy as np
import pytest

from analysis.stats.bootstrap import measured_again
from analysis.stats.pareto import pareto_front
from analysis.stats.pick import ranked
from analysis.stats.table import by_setting, expected, results_frame
from tests.analysis.stats.test_pick import answers, row


def settings_of(*rows):
    return by_setting(results_frame([row(chr(97 + i), i, **values) for i, values in enumerate(rows)]))


def chances(settings):
    return measured_again(settings).picks


def test_chances_add_up_and_say_how_sure_it_is():
    clear = chances(settings_of({}, {"drift_kl": 0.5}, {"reliability": 0.3}))
    assert clear["a"] > 0.95 and clear["c"] == 0 and sum(clear.values()) == pytest.approx(1)
    twins = chances(settings_of({}, {}))
    assert 0.4 < twins["a"] < 0.6
    assert chances(settings_of({}, {"generalization": 0.51})) == chances(settings_of({}, {"generalization": 0.51}))
    assert chances(settings_of()) == {} and chances(settings_of({})) == {"a": 1.0}
    assert list(clear) == list(ranked(settings_of({}, {"drift_kl": 0.5}, {"reliability": 0.3}))["trial_id"])


def test_edits_are_drawn_again_for_all_settings_at_once():
    """Ten edits that both miss decide nothing; ten that only one of them misses do."""
    both = [answers(range(10), 100) | {"drift_kl": drift} for drift in (0.01, 0.5)]
    assert chances(settings_of(*both))["a"] > 0.95
    apart = [answers(range(10), 100) | {"drift_kl": 0.01}, answers([], 100) | {"drift_kl": 0.5}]
    assert chances(settings_of(*apart))["b"] > 0.95
    again = measured_again(settings_of(*both))
    assert again.by_edit and sum(again.chances.values()) == pytest.approx(1)
    assert not measured_again(settings_of({}, answers([0], 100))).by_edit


def test_the_front_is_that_of_the_objectives_asked_for():
    settings = settings_of(
        {"reliability": 1.0, "capability": 0.5, "capability_change": -0.1, "capability_change_high": -0.09, "capability_change_low": -0.11},
        {"reliability": 0.6},
        {"reliability": 0.5, "capability": 0.4, "capability_change": -0.2, "capability_change_high": -0.19, "capability_change_low": -0.21},
    )  # fmt: skip
    again = measured_again(settings)
    assert again.chances == {"a": 1.0, "b": 1.0, "c": 0.0}
    other = measured_again(settings, pareto_front(settings, ("reliability", "generalization")))
    assert set(other.chances) == {"a", "b", "c"} and other.chances["a"] > 0.9
    bare = measured_again(settings.assign(capability=np.nan))
    assert bare.chances == {} and sum(bare.picks.values()) == pytest.approx(1)


def test_seeds_that_differ_make_it_less_sure():
    def two(spread):
        lower, higher = {"drift_kl": 0.5}, {"drift_kl": 0.1}
        shares = (0.9 + spread, 0.9 - spread)
        rows = [row(f"a{i}", 0, seed=i, reliability=share, **higher) for i, share in enumerate(shares)]
        return by_setting(results_frame([*rows, row("b", 1, reliability=0.92, **lower)]))

    assert chances(two(0.1))["a0"] < chances(two(0.0))["a0"]


def test_a_mean_over_few_edits_makes_it_less_sure():
    def two(**count):
        alike = {"n_edits": 1000, "drift_kl": 0.01, **count}
        return settings_of(alike | {"generalization": 0.8}, alike | {"generalization": 0.7})

    assert chances(two())["a"] > 0.95 > 0.85 > chances(two(**{"n_edits.generalization": 10}))["a"]


def test_what_to_expect_has_intervals_and_only_what_was_measured():
    (one,) = settings_of({"reliability": 0.9, "drift_kl": 0.2}).to_dict("records")
    found = expected(one)
    assert found["reliability"] == pytest.approx((0.9, 0.8256, 0.9448), abs=1e-4)
    assert found["capability_change"] == pytest.approx((0.0, -0.01, 0.01))
    assert found["drift_kl"] == pytest.approx((0.2, 0.1608, 0.2392), abs=1e-4)
    pair = by_setting(results_frame([row("a", drift_kl=0.2), row("b", seed=1, drift_kl=0.2)])).iloc[0]
    assert expected(pair)["drift_kl"][1] == pytest.approx(0.2 - 0.0392 / np.sqrt(2), abs=1e-4)
    assert set(expected(settings_of({"drift_kl": None, "n_edits": None}).iloc[0])) == {"capability_change"}
