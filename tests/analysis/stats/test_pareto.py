"""The results table and the front: small tables worked out by hand, and brute force on random ones."""

import functools
import itertools
import math

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from analysis.stats.pareto import DEFAULT_OBJECTIVES, pareto_front
from analysis.stats.table import (
    COLUMNS,
    METRICS,
    SETTING_AXES,
    SPREADS,
    by_setting,
    done,
    failed,
    interval,
    is_fraction,
    pack_right,
    part_columns,
    proportion_se,
    results_frame,
    setting_names,
    standard_error,
    task_columns,
    unpack_right,
    wilson_interval,
)

INF, NAN = math.inf, math.nan


def row(trial_id, reliability=NAN, capability=NAN, *, status="done", layer=0, **others):
    base = {
        "trial_id": trial_id, "status": status, "error": None if status == "done" else "cause", "layers": 30, "layer": layer,
        "module": "mlp_down", "pipeline": "breadth_first", "batch_size": 32, "learning_rate": 0.004, "seed": 0,
        "reliability": reliability, "capability": capability, "n_edits": 100, "diverged": 0,
    }  # fmt: skip
    return base | others


def table(*points, **others):
    """Trials a, b, c, ... on layers 0, 1, 2, ... at these (reliability, capability)."""
    frame = blank_table(len(points), tuple(others.items())).copy()
    frame["reliability"], frame["capability"] = ([float(point[axis]) for point in points] for axis in (0, 1))
    return frame


@functools.cache
def blank_table(n, others):
    return results_frame([row(chr(97 + i), layer=i, **dict(others)) for i in range(n)])


# the table


def test_parts_of_metrics_are_columns_in_order_and_averaged_over_seeds():
    parts = ["generalization.raw", "reliability.unseen", "capability.world", "reliability.brief-1a2b", "reliability.chat",
             "reliability.raw", "capability.chat", "reliability.qa"]  # fmt: skip
    rows = [row(name, 0.5, 0.6, seed=seed, **dict.fromkeys(parts, value)) for name, seed, value in
            (("a", 0, 0.25), ("b", 1, 0.75))]  # fmt: skip
    frame = results_frame(rows)
    ordered = (
        *(f"reliability.{form}" for form in ("raw", "qa", "chat", "brief-1a2b", "unseen")),
        "generalization.raw", "capability.chat", "capability.world",
    )  # fmt: skip
    assert part_columns(frame) == ordered and task_columns(frame) == ordered[-2:]
    one = by_setting(frame).iloc[0]
    assert [one[name] for name in ordered] == [0.5] * len(ordered)
    assert interval(one, "reliability.chat") == wilson_interval(0.5, 100)


def test_what_an_earlier_version_called_locality_is_that_of_whole_answers():
    earlier, todays = row("a", locality=0.1, locality_tf=0.2), row("b", layer=1, locality=0.8, locality_exact=0.1)
    frame = results_frame([earlier, todays])
    assert frame["locality_exact"].tolist() == [0.1, 0.1] and "locality_tf" not in frame
    assert math.isnan(frame["locality"][0]) and frame["locality"][1] == 0.8


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=40))
def test_which_edits_are_right_survives_packing(right):
    assert unpack_right(pack_right(right)).tolist() == pytest.approx([sum(formats) / 3 for formats in right])
    first = [formats[0] for formats in right]
    assert unpack_right(pack_right(first)).tolist() == first
    assert pack_right(first).startswith(f"{len(right)}:"), "as it was when there was one format only"


def test_what_an_earlier_version_packed_is_still_read():
    assert unpack_right("10:c-q_80005x0Wt").tolist() == [1, 0, 1, 1, 0, 0, 0, 1, 1, 0]


def test_every_documented_column_is_there_with_its_dtype_even_without_rows():
    for frame in (results_frame([]), results_frame([row("a", 0.5, 0.6)])):
        assert list(frame.columns)[: len(COLUMNS)] == list(COLUMNS)
        for name, column in COLUMNS.items():
            expected = {"integer": "Int64", "number": "float64"}.get(column.kind, "object")
            assert str(frame[name].dtype) == expected, name
    assert set(SETTING_AXES) | set(METRICS) <= set(COLUMNS)


def test_absent_values_are_absent_in_the_way_of_their_kind():
    one = results_frame([{"trial_id": "a", "status": "failed", "layer": 3, "module": "mlp"}]).iloc[0]
    assert one["error"] is None and one["run_id"] is None
    assert one["batch_size"] is pd.NA and math.isnan(one["reliability"]) and one["epoch_losses"] == []


def test_numbers_may_come_as_text_and_tasks_and_unknown_columns_are_kept():
    given = row("a", "0.5", layer="7", layers="15", batch_size="32", **{"capability.world": "0.25", "note": "x"})
    one = results_frame([given]).iloc[0]
    assert (one["layer"], one["depth"], one["reliability"], one["batch_size"]) == (7, 0.5, 0.5, 32)
    assert one["capability.world"] == 0.25 and one["note"] == "x"


def test_the_table_survives_being_read_back():
    frame = results_frame([row("a", 0.5, epoch_losses=[1.0, 0.5]), row("b", status="failed")])
    pd.testing.assert_frame_equal(results_frame(frame.to_dict("records")), frame)


def test_done_and_failed_part_the_table():
    frame = results_frame([row("a"), row("b", status="failed"), row("c", diverged=1)])
    assert list(done(frame)["trial_id"]) == ["a", "c"]
    assert list(failed(frame)["trial_id"]) == ["b"]


def test_the_standard_error_is_the_usual_one_away_from_the_ends_and_never_zero():
    assert proportion_se(0.5, 10_000) == pytest.approx(0.005, rel=1e-3)
    assert proportion_se(0.9, 10_000) == pytest.approx(math.sqrt(0.09 / 10_000), rel=1e-3)
    assert proportion_se(1.0, 100) == pytest.approx(proportion_se(0.0, 100)) == pytest.approx(0.00966, abs=1e-4)
    assert (
        math.isnan(proportion_se(NAN, 100))
        and math.isnan(proportion_se(0.5, NAN))
        and math.isnan(proportion_se(0.5, 0))
    )


def test_wilson_interval_known_values():
    assert wilson_interval(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert wilson_interval(1.0, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)


def test_seeds_of_a_setting_are_averaged_and_counted():
    frame = results_frame(
        [
            row("b", 0.8, 0.5, seed=1, run_id="r1"),
            row("a", 0.6, 0.7, seed=0, run_id="r0"),
            row("c", status="failed", seed=2),
            row("d", 0.9, 0.5, layer=1, diverged=1),
        ]
    )
    first, second = by_setting(frame).to_dict("records")
    assert (first["trial_id"], first["run_id"], first["trial_ids"], first["seeds"]) == ("a", "r0", ("a", "b"), (0, 1))
    assert first["reliability"] == pytest.approx(0.7) and first["capability"] == pytest.approx(0.6)
    assert (first["n_seeds"], first["n_failed"], first["diverged"]) == (2, 1, 0)
    between = math.sqrt(0.02)
    assert first["reliability_sd"] == pytest.approx(between)
    error = math.hypot(proportion_se(0.7, 100), between / math.sqrt(2))
    assert standard_error(first, "reliability") == pytest.approx(error)
    assert (second["trial_ids"], second["n_failed"], second["diverged"]) == (("d",), 0, 1)
    assert math.isnan(second["reliability_sd"])
    assert standard_error(second, "reliability") == pytest.approx(proportion_se(0.9, 100))


def test_what_the_seeds_of_a_setting_did_is_kept_and_absent_for_one():
    rows = [
        row("a", 0.6, drift_kl=0.2, locality=0.5),
        row("b", 0.8, seed=1, drift_kl=0.1, locality=0.5),
        row("c", 0.7, layer=1),
    ]
    both, one = by_setting(results_frame(rows)).to_dict("records")
    assert (both["drift_kl_low"], both["drift_kl_high"], both["locality_sd"]) == (0.1, 0.2, 0.0)
    assert all(math.isnan(one[name]) for name in SPREADS) and math.isnan(both["generalization_sd"])


def test_intervals_come_from_edits_seeds_and_items():
    rows = [
        row("a", 0.6, 0.5, capability_change=-0.01, capability_change_low=-0.03, capability_change_high=0.02),
        row("b", 0.8, 0.5, seed=1, capability_change=-0.01, capability_change_low=-0.03, capability_change_high=0.02),
        row("c", 0.7, 0.5, layer=1),
        row("d", 0.7, layer=2, n_edits=NAN),
    ]
    both, one, bare = by_setting(results_frame(rows)).to_dict("records")
    assert interval(one, "reliability") == pytest.approx(wilson_interval(0.7, 100))
    low, high = interval(both, "reliability")
    more = 1.96 * 0.1  # two seeds 0.2 apart: their mean has a standard error of 0.1
    assert low == pytest.approx(0.7 - math.hypot(0.7 - wilson_interval(0.7, 100)[0], more), abs=1e-4)
    assert high == pytest.approx(0.7 + math.hypot(wilson_interval(0.7, 100)[1] - 0.7, more), abs=1e-4)
    assert interval(both, "capability") == pytest.approx((0.48, 0.53))
    assert interval(both, "capability_change") == pytest.approx((-0.03, 0.02))
    assert standard_error(both, "reliability") == pytest.approx(math.hypot(proportion_se(0.7, 100), 0.1))
    for found in (
        interval(bare, "reliability"),
        interval(one, "capability"),
        interval(one, "drift_kl"),
        interval(one, "locality"),
    ):
        assert all(map(math.isnan, found))


def test_a_fraction_of_fewer_edits_is_as_sure_as_these_allow():
    some = {"n_edits.generalization": 10, "n_edits.reliability_long": 20}
    shares = dict.fromkeys(
        ("generalization", "generalization_tf", "generalization.raw", "reliability_f1", "locality_first"), 0.8
    )
    rows = [row(name, 0.8, n_edits=1000, **shares, **some, seed=seed) for seed, name in enumerate("ab")]
    both, older = by_setting(results_frame([*rows, row("c", 0.8, layer=1, n_edits=1000, **shares)])).to_dict("records")
    counts = dict(zip(shares, (10, 10, 10, 20, 1000), strict=True)) | {"reliability": 1000}
    for name, count in counts.items():
        assert interval(both, name) == pytest.approx(wilson_interval(0.8, count)), name
        assert standard_error(both, name) == pytest.approx(proportion_se(0.8, count)), name
        assert interval(older, name) == pytest.approx(wilson_interval(0.8, 1000)), "which kept no such count"
    assert not is_fraction("n_edits.generalization") and "n_edits.generalization" in part_columns(results_frame(rows))


def test_settings_are_named_by_their_position_and_by_what_tells_them_apart_there():
    rows = [
        row("a"),
        row("b", learning_rate=0.002),
        row("c", layer=1),
        row("d", learning_rate=0.002, pipeline="depth_first"),
    ]
    names = setting_names(by_setting(results_frame(rows)))
    assert names["a"] == "0.mlp_down at breadth-first, rate 0.004" and names["c"] == "1.mlp_down"
    assert names["d"] == "0.mlp_down at depth-first, rate 0.002"


def test_averaging_twice_changes_no_metric_and_leaves_the_table_alone():
    frame = table((0.5, 0.6), (0.7, INF))
    before = frame.copy(deep=True)
    once = by_setting(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert list(once["reliability"]) == [0.5, 0.7] and math.isnan(once["capability"][1])
    assert by_setting(results_frame([])).empty


# the front


def test_points_of_a_front_in_order_with_its_hypervolume():
    front = pareto_front(table((0.9, 0.2), (0.5, 0.5), (0.4, 0.4), (0.1, 0.9)))
    assert front.trial_ids == ("a", "b", "d")
    assert front.points == ((0.9, 0.2), (0.5, 0.5), (0.1, 0.9))
    assert front.objectives == DEFAULT_OBJECTIVES and front.reference == (0.0, 0.0)
    assert front.hypervolume == pytest.approx(0.9 * 0.2 + 0.5 * 0.3 + 0.1 * 0.4)


def brute_force(points):
    """Indices that no other point dominates, compared pair by pair."""
    return {
        i
        for i, p in enumerate(points)
        if not any(all(b >= a for a, b in zip(p, q, strict=True)) and q != p for q in points)
    }


VALUES = (0.0, 0.5, 1.0, NAN, INF, -INF)


def test_every_table_of_two_trials_with_infinities_and_nan():
    every_point = itertools.product(VALUES, repeat=2)
    for points in itertools.combinations_with_replacement(every_point, 2):
        finite = [i for i, point in enumerate(points) if all(map(math.isfinite, point))]
        expected = {"ab"[finite[i]] for i in brute_force([points[i] for i in finite])}
        assert set(pareto_front(table(*points)).trial_ids) == expected, points


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])] * 2), min_size=1, max_size=12))
def test_the_front_is_what_brute_force_finds(points):
    front = pareto_front(table(*points))
    assert set(front.trial_ids) == {chr(97 + i) for i in brute_force(points)}
    assert list(front.points) == sorted(front.points, reverse=True)
    cells = itertools.product(range(5), repeat=2)  # of the 0.2 grid: covered by some point?
    covered = sum(any(x >= 0.2 * (i + 1) - 1e-9 and y >= 0.2 * (j + 1) - 1e-9 for x, y in points) for i, j in cells)
    assert front.hypervolume == pytest.approx(covered * 0.04)


def test_failed_and_diverged_trials_are_on_no_front():
    frame = results_frame([row("a", 0.5, 0.5), row("b", 0.9, 0.9, diverged=1), row("c", 0.9, 0.9, status="failed")])
    assert pareto_front(frame).trial_ids == ("a",)


def test_an_empty_front():
    front = pareto_front(results_frame([]))
    assert (front.trial_ids, front.points, front.hypervolume) == ((), (), 0.0)


def test_other_objectives_and_their_references():
    frame = results_frame(
        [row("a", 0.5, 0.1, generalization=0.9, capability_change=-0.1), row("b", 0.6, 0.2, generalization=0.1)]
    )
    assert pareto_front(frame, ("reliability", "generalization")).trial_ids == ("b", "a")
    three = pareto_front(frame, ("reliability", "capability", "generalization"))
    assert three.trial_ids == ("b", "a") and three.reference == (0.0, 0.0, 0.0)
    change = pareto_front(frame, ("reliability", "capability_change"))
    assert change.reference == (0.0, -1.0)
    assert change.trial_ids == ("a",) and change.hypervolume == pytest.approx(0.5 * 0.9)
