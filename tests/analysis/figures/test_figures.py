"""What the figures show is tested on their info; the drawing only for being drawable and for escaping."""

import json
import math

import pytest

from analysis.figures.curves import (
    latency_figure,
    loss_figure,
    loss_info,
    parallel_figure,
    parallel_info,
    pipeline_figure,
    pipeline_info,
    retention_figure,
)
from analysis.figures.front import front_figure, front_info
from analysis.figures.maps import heatmap_figure, heatmap_info
from analysis.figures.style import hover_text
from analysis.stats.table import by_setting, pack_right, results_frame

NAN = math.nan


def row(trial_id, layer=0, module="mlp_down", reliability=0.9, capability=0.5, **others):
    base = {
        "trial_id": trial_id, "status": "done", "layers": 11, "layer": layer, "module": module, "pipeline": "breadth_first",
        "batch_size": 8, "learning_rate": 0.004, "seed": 0, "reliability": reliability, "capability": capability,
        "generalization": 0.6, "capability_change": capability - 0.6, "n_edits": 100, "diverged": 0,
        "epoch_losses": [4.0, 1.0, 0.25],
    }  # fmt: skip
    return base | others


def small():
    return results_frame(
        [
            row("a", 2, "mlp_down", 0.9, 0.50),
            row("b", 5, "mlp", 1.0, 0.40),
            row("c", 5, "mlp", 1.0, 0.45, learning_rate=0.001),
            row("d", 10, "mlp", 0.2, 0.30),
            row("x", 2, "mlp", diverged=1, reliability=1.0, capability=1.0),
            row("f", 10, "mlp_down", NAN, NAN, status="failed", error="out of memory", epoch_losses=[]),
        ]
    )


def drawn(figure):
    """The figure as a browser gets it; fails on anything JSON has no word for."""
    return json.loads(json.dumps(figure.to_plotly_json(), allow_nan=False, default=lambda array: array.tolist()))


def test_hover_names_trial_position_settings_and_metrics():
    one = results_frame(
        [row("a1b2", 3, drift_kl=0.0125, capability_change_low=-0.12, capability_change_high=-0.08)]
    ).iloc[0]
    text = hover_text(one)
    for part in (
        "3.mlp_down", "a1b2", "batch 8", "rate 0.004", "seed 0", "90.0%", "60.0%", "−10.0 points [−12.0, −8.0]", "0.0125",
    ):  # fmt: skip
        assert part in text, part


def test_hover_leaves_out_what_was_not_measured_and_escapes():
    rows = results_frame([row("<b>&", 3, "<script>", NAN, NAN, capability_change=NAN)])
    text = hover_text(rows.iloc[0])
    assert "&lt;b&gt;&amp;" in text and "&lt;script&gt;" in text and "<script>" not in text
    assert "reliability" not in text and "capability" not in text


def test_front_info_of_a_small_table():
    info = front_info(small(), baseline={"capability": 0.6}, pick="c")
    assert [point.trial_id for point in info.points] == ["a", "b", "c", "d"]  # neither diverged nor failed
    assert {point.trial_id for point in info.points if point.on_front} == {"a", "c"}
    assert info.modules == ("mlp_down", "mlp")
    assert info.step == ((0.2, 0.5), (0.9, 0.5), (0.9, 0.45), (1.0, 0.45), (1.0, 0.3))
    assert (info.pick, info.unedited) == ("c", 0.6)
    assert [point.depth for point in info.points] == [0.2, 0.5, 0.5, 1.0]


def test_front_averages_seeds_and_takes_other_objectives():
    rows = [row("a", reliability=0.8, seed=0), row("b", reliability=1.0, seed=1)]
    info = front_info(results_frame(rows), objectives=("reliability", "capability_change"), pick="gone")
    assert len(info.points) == 1 and info.points[0].values == pytest.approx((0.9, -0.1))
    assert "seeds 0, 1" in info.points[0].hover
    assert (info.pick, info.unedited) == (None, 0.0)
    assert (
        front_info(
            results_frame(rows), objectives=("reliability", "generalization"), baseline={"generalization": 0.1}
        ).unedited
        is None
    )


def test_front_figure_has_a_symbol_per_module_and_marks_pick_and_unedited():
    figure = drawn(front_figure(front_info(small(), baseline={"capability": 0.6}, pick="c")))
    names = [trace["name"] for trace in figure["data"]]
    assert names == ["front", "mlp_down", "mlp", "pick"]
    assert figure["data"][1]["marker"]["symbol"] != figure["data"][2]["marker"]["symbol"]
    assert figure["data"][2]["customdata"] == ["b", "c", "d"]
    assert figure["data"][3]["x"] == [1.0] and figure["data"][3]["y"] == [0.45]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["unedited model", "<b>5.mlp</b>"]
    low, high = figure["layout"]["yaxis"]["range"]
    assert low < 0.3 and high > 0.6


def test_the_front_has_bars_of_its_intervals_and_of_many_only_the_pick(monkeypatch):
    rows = small().assign(capability_change_low=lambda t: t["capability_change"] - 0.02, capability_change_high=0.1)
    info = front_info(rows, pick="c")
    assert [mark.trial_id for mark in info.points if mark.intervals] == ["a", "c"]
    (low, high), (least, most) = info.points[2].intervals
    assert (low, high) == pytest.approx((0.963, 1.0), abs=1e-3) and (least, most) == pytest.approx((0.43, 0.7))
    figure = drawn(front_figure(info))
    assert figure["data"][2]["error_x"]["arrayminus"] == [None, pytest.approx(0.037, abs=1e-3), None]
    assert figure["layout"]["yaxis"]["range"][1] > 0.7, "bars are not cut off"
    monkeypatch.setattr("analysis.figures.front.MAX_BARS", 1)
    assert [mark.trial_id for mark in front_info(rows, pick="c").points if mark.intervals] == ["c"]


def test_bars_are_left_out_where_nothing_is_known_of_the_error():
    info = front_info(small().assign(n_edits=NAN), pick="c")
    assert info.n_barred == 0 and "array" not in drawn(front_figure(info))["data"][1].get("error_x", {})


def test_too_many_settings_are_thinned_but_never_the_front_the_pick_and_what_is_to_be_kept(monkeypatch):
    for place in ("front.MAX_MARKS", "curves.MAX_LINES", "curves.MAX_PAIRS"):
        monkeypatch.setattr(f"analysis.figures.{place}", 12)
    rows = [
        row(f"t{i}", i % 11, capability=0.5 - abs(i - 30) / 100, reliability=0.5 + i / 200, learning_rate=i + 1.0)
        for i in range(50)
    ]
    results = results_frame(rows)
    info = front_info(results, pick="t3", keep={"t5"})
    ids = [mark.trial_id for mark in info.points]
    assert len(ids) == max(12, 20 + 2) and info.left_out == 50 - 22 and info.n_front == 20
    assert {f"t{i}" for i in range(30, 50)} | {"t3", "t5"} == set(ids)
    lines = parallel_info(results, keep={"t5"})
    assert len(lines.trial_ids) == 12 and "t5" in lines.trial_ids and lines.left_out == 38
    assert lines.trial_ids == parallel_info(results, keep={"t5"}).trial_ids, "the same ones every time"
    assert len({int(trial[1:]) // 10 for trial in lines.trial_ids}) >= 4, "from everywhere"
    both = [
        item | {"trial_id": f"{item['trial_id']}-{name}", "pipeline": name}
        for item in rows
        for name in ("breadth_first", "depth_first")
    ]
    pairs = pipeline_info(results_frame(both))
    assert len(pairs.pairs) == 12 and pairs.left_out == 38 and pairs.mean_difference == ((8, 0.0, 50),)


def test_heatmaps_show_the_best_setting_of_each_cell_and_the_same_in_all():
    for metric, there in (("reliability", 1.0), ("capability", 0.45), ("capability_change", -0.15)):
        info = heatmap_info(small(), metric, pick="c")
        assert (info.layers, info.modules) == ((2, 5, 10), ("mlp_down", "mlp"))
        assert info.trial_ids == (("a", None, None), (None, "c", "d"))  # c ties with b in reliability, more capability
        assert info.values[1][1] == pytest.approx(there)
        assert info.values[0][1] is None and info.values[0][2] is None and info.values[1][0] is None
        assert "no result" in info.hover[0][2] and "5.mlp" in info.hover[1][1]
        assert info.pick == (1, 1)
    assert heatmap_info(small(), pick="b").pick is None


def test_colours_of_a_change_are_centred_on_zero():
    info = heatmap_info(small(), "capability_change")
    assert info.limits == pytest.approx((-0.3, 0.3))
    assert heatmap_info(small(), "reliability").limits == (0.0, 1.0)
    trace = drawn(heatmap_figure(info))["data"][0]
    assert (trace["zmin"], trace["zmax"]) == pytest.approx((-30, 30))
    assert trace["z"][1][1] == pytest.approx(-15) and trace["z"][0][1] is None


def test_loss_curves_keep_the_pick_and_the_front_when_there_are_too_many(monkeypatch):
    monkeypatch.setattr("analysis.figures.curves.MAX_CURVES", 3)
    rows = [row(f"t{i}", i % 11, seed=i, epoch_losses=[2.0, 1.0]) for i in range(9)]
    info = loss_info(results_frame(rows), front=("t7", "t8"), pick="t8")
    assert [(curve.trial_id, curve.highlight) for curve in info.curves] == [
        ("t8", "pick"),
        ("t7", "front"),
        ("t0", "other"),
    ]
    assert info.left_out == 6
    assert [trace["name"] for trace in drawn(loss_figure(info))["data"]] == ["other settings", "on the front", "pick"]


def test_loss_curves_of_one_pipeline_without_what_a_logarithm_cannot_show():
    rows = [
        row("a", pipeline="depth_first"),
        row("b", epoch_losses=[1.0, math.inf, NAN, 0.0]),
        row("c", epoch_losses=[]),
    ]
    info = loss_info(results_frame(rows))
    assert info.pipeline == "breadth_first"
    assert [(curve.trial_id, curve.losses) for curve in info.curves] == [("b", (1.0, None, None, None))]
    assert loss_info(results_frame(rows[:1])).pipeline == "depth_first"
    assert "batch" in drawn(loss_figure(loss_info(results_frame(rows[:1]))))["layout"]["xaxis"]["title"]["text"]


def test_pipelines_are_paired_over_everything_else_by_batch_size():
    rows = [
        row("a", batch_size=8, reliability=0.9),
        row("b", batch_size=8, reliability=0.5, pipeline="depth_first"),
        row("c", batch_size=1, reliability=0.8, seed=0),
        row("d", batch_size=1, reliability=0.6, seed=1),
        row("e", batch_size=1, reliability=0.3, pipeline="depth_first"),
        row("lonely", layer=4, batch_size=1),
        row("other rate", batch_size=1, learning_rate=0.1, pipeline="depth_first"),
        row("gone", layer=5, batch_size=1, diverged=1),
        row("half", layer=5, batch_size=1, pipeline="depth_first"),
    ]
    info = pipeline_info(results_frame(rows))
    assert [(p.batch_size, p.trial_ids) for p in info.pairs] == [(1, ("c", "e")), (8, ("a", "b"))]
    assert [(size, pytest.approx(gap), n) for size, gap, n in info.mean_difference] == [(1, 0.4, 1), (8, 0.4, 1)]
    lines, wide, deep = drawn(pipeline_figure(info))["data"]
    assert wide["y"] == pytest.approx([0.7, 0.9]) and deep["y"] == pytest.approx([0.3, 0.5])
    assert wide["customdata"] == ["c", "a"] and len(lines["x"]) == 6


def test_one_pipeline_gives_no_pairs():
    assert pipeline_info(small()).pairs == () and pipeline_info(results_frame([])).pairs == ()


def test_parallel_axes_are_those_that_vary_and_metrics_that_all_have():
    info = parallel_info(small())
    assert info.trial_ids == ("a", "b", "c", "d")
    assert [axis.name for axis in info.axes] == [
        "layer", "module", "learning_rate", "reliability", "generalization", "capability_change",
    ]  # fmt: skip
    rate = info.axes[2]
    assert rate.values == pytest.approx((math.log10(0.004), math.log10(0.004), -3.0, math.log10(0.004)))
    assert [text for _, text in rate.ticks] == ["0.001", "0.004"]
    counts = parallel_info(results_frame([row("a", edit_count=0), row("b", edit_count=100)])).axes[0]
    assert counts.name == "edit_count" and counts.values == (0, 100), "a zero has no logarithm"
    trace = drawn(parallel_figure(info))["data"][0]
    assert len(trace["dimensions"]) == 6 and trace["line"]["color"] == [0.9, 1.0, 1.0, 0.2]


@pytest.mark.parametrize("rows", [[], [row("f", status="failed", reliability=NAN, capability=NAN, epoch_losses=[])]])
def test_every_figure_can_be_drawn_from_nothing(rows):
    results = results_frame(rows)
    for figure in (
        front_figure(front_info(results)),
        heatmap_figure(heatmap_info(results)),
        heatmap_figure(heatmap_info(results, "capability_change")),
        loss_figure(loss_info(results)),
        pipeline_figure(pipeline_info(results)),
        parallel_figure(parallel_info(results)),
    ):
        assert "layout" in drawn(figure)


def test_names_are_escaped_in_every_figure():
    evil = "<script>alert(1)</script>"
    rows = [
        row("a", module=evil, drift_kl=0.1),
        row("b", 3, module="mlp"),
        row("c", module=evil, pipeline="depth_first"),
    ]
    results = results_frame(rows)
    figures = (
        front_figure(front_info(results, pick="a")),
        heatmap_figure(heatmap_info(results)),
        loss_figure(loss_info(results)),
        pipeline_figure(pipeline_info(results)),
        parallel_figure(parallel_info(results)),
    )
    for figure in figures:
        text = json.dumps(drawn(figure))
        assert "<script" not in text and "&lt;script&gt;" in text


def test_retention_is_reliability_by_time_of_arrival():
    forgets = pack_right([place >= 10 for place in range(20)])
    keeps = pack_right([True] * 20)
    stages = json.dumps([{"arrived": 10.0, "first_tenth": 0.5}, {"arrived": 20.0, "first_tenth": 0.25}])
    streams = [
        row("a", pipeline="stream", replay=0, right=forgets, n_edits=20),
        row("b", pipeline="stream", replay=8, right=keeps, n_edits=20, stages=stages, arrival_seconds=2.0)
        | {"arrival_seconds_p95": 3.0},
        row("c", pipeline="stream", replay=32, right=None, n_edits=20),
    ]
    figure = retention_figure(results_frame(streams))
    assert {line.name: line.y for line in figure.data if line.line.dash == "solid"} == {
        "0.mlp_down at replay 0": (0.0,) * 5 + (1.0,) * 5,
        "0.mlp_down at replay 8": (1.0,) * 10,
    }
    assert list(figure.data[0].x) == pytest.approx([part / 10 for part in range(1, 11)])
    (dotted,) = (line for line in figure.data if line.line.dash == "dot")
    assert dotted.legendgroup == "0.mlp_down at replay 8"
    assert list(zip(dotted.x, dotted.y, strict=True)) == [(0.5, 0.5), (1.0, 0.25)]
    sampled = json.dumps(
        [{"arrived": 30.0}, {"arrived": 60.0, "first_tenth": 0.5}, {"arrived": 120.0, "first_tenth": 0.25}]
    )
    (dotted,) = (
        line
        for line in retention_figure(results_frame([streams[1] | {"stages": sampled}])).data
        if line.line.dash == "dot"
    )
    assert list(dotted.x) == [0.5, 1.0], "of 120 edits, of which 20 are asked"
    (timed,) = latency_figure(results_frame(streams)).data
    assert (list(timed.x), list(timed.error_x.array)) == ([2.0], [1.0])
    together = results_frame([row("a", right=keeps, n_edits=20)])
    assert retention_figure(together) is None and latency_figure(together) is None, "age means nothing without a stream"


def test_infos_do_not_change_the_table():
    results = small()
    before = results.copy(deep=True)
    front_info(results), heatmap_info(results), loss_info(results), pipeline_info(results), parallel_info(results)
    assert results.equals(before) and len(by_setting(results)) == 5
