"""The rule of the pick: every step by a small table, all small tables by brute force, and what holds of any table."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from analysis.stats.pick import DRIFT_MARGIN, RULE, Evidence, judge, ranked, recommend
from analysis.stats.table import OF_LONG, by_setting, is_fraction, pack_right, part_columns, results_frame

INF, NAN = math.inf, math.nan


def row(trial_id, layer=0, **values):
    base = {
        "trial_id": trial_id, "status": "done", "layers": 30, "layer": layer, "module": "mlp_down", "seed": 0,
        "pipeline": "breadth_first", "batch_size": 32, "learning_rate": 0.004, "n_edits": 100, "diverged": 0,
        "reliability": 1.0, "generalization": 0.5, "drift_kl": 0.05, "seconds_per_edit": 1.0,
        "capability": 0.6, "capability_change": 0.0, "capability_change_low": -0.01, "capability_change_high": 0.01,
    }  # fmt: skip
    return base | values


def picked(*rows, floor=None):
    frame = results_frame([row(chr(97 + i), i, **values) for i, values in enumerate(rows)])
    found = recommend(frame, floor)
    return found and found.trial_id


def answers(missed, n=40):
    """`right` of a trial that missed these edits, and the reliability that goes with it."""
    right = [edit not in missed for edit in range(n)]
    return {"right": pack_right(right), "reliability": sum(right) / n, "n_edits": n}


# each step


@pytest.mark.parametrize("known", [True, False])
def test_one_edit_missed_does_not_outweigh_drift(known):
    """Up to the seventh layer every position misses one of 40 edits: 97.5%, where a standard error from 100% is 97.6%."""
    gentle, sure = answers([3]), answers([])
    if not known:
        gentle["right"] = sure["right"] = None
    early = [row(f"e{layer}", layer, drift_kl=0.019 + layer / 1000, **gentle) for layer in range(7)]
    late = [row(f"l{layer}", layer, drift_kl=0.077 + layer / 1000, **sure) for layer in range(7, 20)]
    found = recommend(results_frame(early + late))
    assert found.position == "0.mlp_down" and found.metrics["reliability"] == 0.975


@pytest.mark.parametrize(
    ("worse", "why"),
    [
        ({"reliability": 0.94, "drift_kl": 0.01, "generalization": 1.0}, "reliability first"),
        ({"capability_change": -0.03, "capability_change_high": -0.01, "drift_kl": 0.01}, "then no loss of capability"),
        ({"drift_kl": 0.061, "generalization": 1.0}, "then drift"),
        ({"generalization": 0.45, "drift_kl": 0.041}, "then generalization, whatever the drift within the margin"),
        ({"seconds_per_edit": 2.0, "drift_kl": 0.04}, "then the cost"),
        ({"drift_kl": 0.055}, "then the drift"),
        ({"generalization": NAN}, "not measured loses against measured"),
        ({"drift_kl": INF}, "so does what is not finite"),
        ({"diverged": 1, "generalization": 1.0}, "a setting that diverged is never picked"),
    ],
)
def test_each_step_of_the_rule_decides(worse, why):
    assert picked(worse, {}) == "b" and picked({}, worse) == "a", why


@pytest.mark.parametrize(
    "better",
    [{"reliability": 0.96}, {"capability_change": -0.009, "capability_change_high": 0.001}, {"drift_kl": 0.06},
     {"capability_change": NAN, "capability_change_high": NAN}],
)  # fmt: skip
def test_differences_that_say_nothing_do_not_count(better):
    assert picked({}, better | {"generalization": 0.6}) == "b"


def test_a_gain_in_capability_is_no_aim():
    assert picked({}, {"capability_change": 0.06, "capability_change_high": 0.08, "drift_kl": 1.9}) == "a"


def test_where_all_lose_capability_those_that_lose_least_are_left():
    worst = {"capability_change": -0.2, "capability_change_high": -0.15, "drift_kl": 0.01}
    least = {"capability_change": -0.1, "capability_change_high": -0.08}
    about = {"capability_change": -0.11, "capability_change_high": -0.09, "generalization": 0.9}
    assert picked(worst, least) == "b" and picked(worst, least, about) == "c"
    rows = [row(name, place, **one) for place, (name, one) in enumerate(zip("abc", (worst, least, about), strict=True))]
    assert recommend(results_frame(rows)).reasons[0] == (
        "Of 3 settings, 3 are about as reliable as the best; all show a loss of capability; 2 of them lose least, as far as the"
        " items show, and 2 of those are within the margin of drift."
    )
    rows[0]["reliability"] = rows[1]["reliability"] = 0.5
    assert recommend(results_frame(rows)).reasons[0].endswith("as the best; it shows a loss of capability.")


@pytest.mark.parametrize(
    ("missed", "best", "n", "reliable"),
    [
        ([0], [], 40, True),
        ([0, 1], [], 40, True),  # 5 points
        ([0, 1, 2], [], 40, False),  # more than 5 points, which a sign test would not show: 12.5%
        ([0], [], 10, True),  # one edit is 10 points
        ([0, 1], [], 10, False),
        (range(4), [], 100, True),
        (range(5), [], 100, False),  # 3.1%
        (range(5), [10], 100, True),  # one the other way: 10.9%
        (range(12), range(20, 25), 1000, True),  # 12 against 5: 7.2%
        (range(13), range(20, 24), 1000, False),  # 13 against 4: 2.5%
    ],
)
def test_reliable_is_what_an_exact_sign_test_over_the_same_edits_does_not_reject(missed, best, n, reliable):
    frame = results_frame([row("a", **answers(missed, n)), row("b", 1, **answers(best, n))])
    found = ranked(by_setting(frame)).set_index("trial_id")["reliable"]
    assert found.to_dict() == {"a": reliable, "b": True}


def test_without_answers_by_edit_the_counts_decide_and_without_a_number_of_edits_only_ties_count():
    assert picked({"reliability": 0.96, "generalization": 0.9}, {}) == "a"
    assert picked({"reliability": 0.95, "generalization": 0.9}, {}) == "b"
    assert picked({"reliability": 0.999, "generalization": 0.9, "n_edits": NAN}, {"n_edits": NAN}) == "b"
    assert picked({"reliability": 1 - 1e-12, "generalization": 0.9, "n_edits": NAN}, {"n_edits": NAN}) == "a"


def test_seeds_count_as_one_setting_and_their_mean_decides():
    rows = [
        row("lucky", 1, generalization=0.9),
        row("unlucky", 1, generalization=0.1, seed=1),
        row("steady", generalization=0.6),
    ]
    assert recommend(results_frame(rows)).trial_id == "steady"
    pick = recommend(results_frame(rows[:2]))
    assert (pick.trial_id, pick.trial_ids, pick.runner_up) == ("lucky", ("lucky", "unlucky"), None)
    assert pick.settings["seeds"] == (0, 1) and any("Mean of 2 seeds" in reason for reason in pick.reasons)
    rows[1]["diverged"] = 1
    assert recommend(results_frame(rows)).trial_id == "steady", "a setting that diverged with one seed is not picked"


def test_a_floor_stands_in_for_the_comparison_with_the_best():
    rows = [{}, {"reliability": 0.9, "generalization": 0.6}, {"reliability": 0.6, "generalization": 0.7}]
    assert [picked(*rows, floor=floor) for floor in (None, 0.9, 0.0, 1.01)] == ["a", "b", "c", None]
    found = recommend(results_frame([row("a")]), 0.9)
    assert "at least 90.0% reliable" in found.rule and found.rule.count(". ") == RULE.count(". ") == 1


def test_there_is_no_pick_when_nothing_was_measured():
    assert recommend(results_frame([])) is None
    assert (
        recommend(results_frame([row("a", status="failed"), row("b", reliability=INF), row("c", reliability=NAN)]))
        is None
    )


def test_what_is_said_of_the_pick():
    rows = [row("a", 3, reliability=0.98, drift_kl=0.01), row("b", 7), row("c", 8, reliability=0.5)]
    pick = recommend(results_frame(rows))
    assert (pick.position, pick.runner_up, pick.rule) == ("3.mlp_down", "b", RULE)
    assert pick.reasons == (
        "Of 3 settings, 2 are about as reliable as the best; 2 of them show no loss of capability, and 1 of those is within"
        " the margin of drift.",
        "The best reliability, 100%, is at 7.mlp_down, where drift is 0.05 nats against 0.01 here.",
        "Capability changed by 0.0 points [−1.0, +1.0], which chance could explain.",
        "One seed only: the effect of another order of the edits is not known.",
    )
    assert pick.settings["batch_size"] == 32 and pick.metrics["reliability"] == 0.98
    assert all(map(math.isfinite, pick.metrics.values()))


# any table


def evidence(rows, right=None):
    """rows: (reliability, generalization, change, change_high, drift, cost) of each setting."""
    columns = np.array(rows, dtype="float64").reshape(-1, 6).T
    columns = np.where(np.isfinite(columns), columns, NAN)
    right = np.empty((len(rows), 0)) if right is None else np.array(right, dtype="float64")
    return Evidence(*columns, edits=np.full(len(rows), 100.0), right=right, counts=np.ones(right.shape[1]))


def the_order(rows):
    """The rule as one would do it by hand, for 100 edits whose single answers are not known."""

    def loses(value, absent, sign=1):
        return sign * value if math.isfinite(value) else absent

    drifts = [loses(row[4], INF) for row in rows]
    best = min(range(len(rows)), key=lambda i: (-rows[i][0], drifts[i]))
    reliable = [i for i, row in enumerate(rows) if round(100 * (rows[best][0] - row[0])) <= 4]
    able = [i for i in reliable if not rows[i][3] < 0]
    if not able:
        least = max(rows[i][2] for i in reliable)
        able = [i for i in reliable if rows[i][3] >= least]
    gentle = [i for i in able if drifts[i] <= min(drifts[j] for j in able) + DRIFT_MARGIN + 1e-9]
    last = [(loses(row[1], 1.0, -1), loses(row[5], INF), drifts[i], -row[0], i) for i, row in enumerate(rows)]
    groups = [
        sorted(gentle, key=lambda i: last[i]),
        sorted(set(able) - set(gentle), key=lambda i: (drifts[i], last[i])),
        sorted(set(reliable) - set(able), key=lambda i: (drifts[i], last[i])),
        sorted(set(range(len(rows))) - set(reliable), key=lambda i: (-rows[i][0], last[i])),
    ]
    return [i for group in groups for i in group]


SMALL = list(
    itertools.product(
        (1.0, 0.9), (0.5, 0.7, NAN), ((0.0, 0.01), (-0.1, -0.05), (NAN, NAN)), (0.01, 0.1, INF), (1.0, NAN)
    )
)


def test_every_table_of_two_settings_with_infinities_and_nan():
    rows = [(r, g, *change, drift, cost) for r, g, change, drift, cost in SMALL]
    for pair in itertools.product(rows, repeat=2):
        assert judge(evidence(pair)).order.tolist() == the_order(pair), pair


values = st.tuples(
    st.sampled_from([1.0, 0.99, 0.97, 0.9, 0.3]),
    st.sampled_from([0.0, 0.4, 0.41, 0.9, NAN]),
    st.sampled_from([(0.0, 0.01), (0.02, 0.04), (-0.1, -0.05), (-0.08, -0.06), (-0.3, -0.2), (NAN, NAN)]),
    st.sampled_from([0.0, 0.01, 0.0199, 0.03, 2.0, INF, NAN]),
    st.sampled_from([0.1, 0.2, NAN]),
).map(lambda v: (v[0], v[1], *v[2], v[3], v[4]))


@settings(max_examples=300, deadline=None)
@given(st.lists(values, min_size=1, max_size=8))
def test_the_order_is_that_of_the_rule_done_by_hand(rows):
    verdict = judge(evidence(rows))
    assert verdict.order.tolist() == the_order(rows)
    assert (verdict.gentle <= verdict.able).all() and (verdict.able <= verdict.reliable).all() and verdict.gentle.any()


@settings(max_examples=50, deadline=None)
@given(st.lists(values, min_size=1, max_size=6), st.randoms())
def test_the_pick_does_not_depend_on_the_order_of_rows(found, random):
    names = (
        "reliability",
        "generalization",
        "capability_change",
        "capability_change_high",
        "drift_kl",
        "seconds_per_edit",
    )
    rows = [row(f"t{i}", i, **dict(zip(names, one, strict=True))) for i, one in enumerate(found)]
    ids = [
        list(ranked(by_setting(results_frame(order)))["trial_id"]) for order in (rows, random.sample(rows, len(rows)))
    ]
    assert ids[0] == ids[1] and len(ids[0]) == len(rows)


answered = st.lists(st.lists(st.booleans(), min_size=12, max_size=12), min_size=2, max_size=6)


@settings(max_examples=200, deadline=None)
@given(st.data(), answered)
def test_a_dominated_setting_changes_no_pick_unless_it_changes_who_is_best(data, right):
    """The last setting is made worse than another in everything, edit by edit."""
    rows = [data.draw(values) for _ in right]
    over = data.draw(st.integers(0, len(rows) - 2))
    right = np.array(right, dtype=float)
    right[-1] = np.minimum(right[-1], right[over])

    def worse(mine, other, down=True):
        return NAN if math.isnan(mine) or not math.isfinite(other) else (min if down else max)(mine, other)

    (_, gen, change, high, drift, cost), other = rows[-1], rows[over]
    if math.isnan(other[2]) or math.isnan(change):  # not measured counts as no loss
        change, high = other[2:4]
    else:
        change, high = worse(change, other[2]), worse(high, other[3])
    rows = [(share, *one[1:]) for share, one in zip(right.mean(axis=1), rows, strict=True)]
    rows[-1] = (
        rows[-1][0],
        worse(gen, other[1]),
        change,
        high,
        worse(drift, other[4], False),
        worse(cost, other[5], False),
    )
    with_it = replace(evidence(rows, right), edits=np.full(len(rows), 12.0))
    without = replace(evidence(rows[:-1], right[:-1]), edits=np.full(len(rows) - 1, 12.0))
    drifts = np.nan_to_num(with_it.drift, nan=INF)
    best = min(range(len(rows)), key=lambda i: (-with_it.reliability[i], drifts[i]))
    assume(best != len(rows) - 1)
    assert judge(with_it).order[0] == judge(without).order[0]


def test_edits_that_a_bootstrap_drew_twice_count_twice():
    right = np.ones((2, 100))
    right[1, :3] = 0
    given = evidence([(1.0, 0.5, 0, 0.01, 0.1, 1), (0.97, 0.9, 0, 0.01, 0.1, 1)], right)
    assert judge(given).reliable.tolist() == [True, True]
    counts = np.ones(100)
    counts[:3], counts[90:93] = 2, 0
    assert judge(replace(given, counts=counts)).reliable.tolist() == [True, False]


def test_columns_of_long_targets_are_there_only_where_there_are_some():
    short = results_frame([row("a", 1)])
    assert not [name for name in short.columns if name in OF_LONG]
    long = results_frame([row("a", 1, reliability_f1=0.9, reliability_contains="0.5"), row("b", 1, seed=1)])
    assert (long["reliability_f1"][0], long["reliability_contains"][0]) == (0.9, 0.5)
    assert "reliability_f1" in part_columns(long) and is_fraction("reliability_f1")
    assert by_setting(long)["reliability_f1"][0] == 0.9
