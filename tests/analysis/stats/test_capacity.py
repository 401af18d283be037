"""How full a position can be: the points where reliability breaks, and the law of several."""

import math

import pytest

from analysis.figures.curves import capacity_figure
from analysis.page.gallery import gallery
from analysis.stats.capacity import fillings, law_of
from analysis.stats.pareto import pareto_front
from analysis.stats.table import by_setting, results_frame

SIZE = 1000.0


def trial(module: str, edits: int, reliability: float, **more) -> dict:
    """A trial with 20 bits an edit, at a position of `SIZE` parameters."""
    row = {
        "trial_id": f"{module}-{edits}-{more.get('seed', 0)}", "status": "done", "layers": 12, "layer": 5, "module": module,
        "edit_count": edits, "n_edits": float(min(edits, 1000)), "bits_per_parameter": 20 * edits / SIZE,
        "reliability": reliability, "seed": 0, "diverged": 0.0, "pipeline": "breadth_first", "batch_size": 32,
        "learning_rate": 0.002, "loss_average": "edit", "epochs": 50,
    }  # fmt: skip
    return row | more


def table(**by_module) -> list[dict]:
    return [trial(module, edits, value) for module, points in by_module.items() for edits, value in points.items()]


def test_a_position_breaks_where_reliability_crosses_the_level():
    (found,) = fillings(results_frame(table(attn_v={100: 1.0, 1000: 0.9})))
    assert found.label == "5.attn_v" and found.edits == (100, 1000) and found.bits == (2, 20)
    assert found.breaks_at == pytest.approx(math.sqrt(2 * 20))  # half way between 1 and 0.9, in the logarithm
    low, high = found.breaks_between
    assert low < found.breaks_at < high < 20 and "about 316 edits" in found.sentence()


def test_what_never_or_always_breaks_has_no_point():
    rows = table(mlp={100: 1.0, 1000: 0.99}, attn_v={100: 0.5, 1000: 0.1}, attn_o={100: 1.0, 1000: 0.0})
    broken, full, held = fillings(results_frame(rows))
    assert math.isnan(held.breaks_at) and "holds the most edits tried (1,000, 20 bits" in held.sentence()
    assert math.isnan(full.breaks_at) and "overfull with the fewest edits tried (100, 2 bits" in full.sentence()
    assert full.breaks_between == (0, 0) and held.breaks_between[1] == math.inf
    law = law_of([held, full, broken])
    assert law.positions == 1 and law.bits == pytest.approx(broken.breaks_at) and math.isnan(law.spread)
    assert law_of([held, full]) is None and "factor" not in law.sentence()


def test_edits_with_which_training_diverged_are_said():
    gone = {"diverged": 1.0}
    rows = [*table(mlp={100: 1.0, 1000: 1.0}), trial("mlp", 10000, 0.0, **gone), trial("attn", 100, 0.0, **gone)]
    (held,) = fillings(results_frame(rows))
    assert held.edits == (100, 1000) and held.diverged == (10000,) and law_of([held]) is None
    assert held.sentence() == (
        "5.mlp holds the most edits trained without divergence (1,000, 20 bits per parameter); training diverged with 10,000"
    )
    (one,) = fillings(results_frame([rows[0], rows[2]]))
    assert one.edits == (100,) and one.sentence().endswith("diverged with 10,000"), (
        "it was tried with two numbers of edits"
    )


def test_all_edits_are_those_trained_and_not_the_sample_asked_about():
    """A study of 10,000 edits, of which 1,000 are asked about."""
    timed = {"train_seconds": 3000.0, "seconds_per_edit": 3000 / 10000}
    everything = trial("mlp", 0, 0.9, n_edits=1000.0, bits_per_parameter=200.0, **timed)
    (found,) = fillings(results_frame([*table(mlp={1000: 1.0, 3000: 0.97}), everything]))
    assert found.edits == (1000, 3000, 10000)


def test_the_law_is_the_geometric_mean_of_the_points():
    one, two = {100: 1.0, 1000: 0.9}, {400: 1.0, 4000: 0.9}
    found = fillings(results_frame(table(attn_v=one, attn_o=two)))
    law = law_of(found)
    assert law.bits == pytest.approx(2 * math.sqrt(40)) and law.spread == pytest.approx(4 ** (1 / math.sqrt(2)))
    assert "2 positions" in law.sentence()


def test_the_law_takes_the_best_setting_of_a_position():
    weak = [trial("attn_v", edits, value, batch_size=8) for edits, value in ((100, 1.0), (1000, 0.0))]
    rows = [*table(attn_v={100: 1.0, 1000: 0.9}), *(row | {"trial_id": "b" + row["trial_id"]} for row in weak)]
    found = fillings(results_frame(rows))
    assert len(found) == 2 and law_of(found).positions == 1 and law_of(found).bits == pytest.approx(math.sqrt(40))
    held = [trial("attn_v", edits, 1.0, batch_size=16, trial_id=f"c{edits}") for edits in (100, 1000)]
    assert law_of(fillings(results_frame([*rows, *held]))) is None


def test_seeds_are_averaged_and_other_settings_are_lines_of_their_own():
    rows = [*table(attn_v={100: 1.0, 1000: 0.8}), trial("attn_v", 1000, 1.0, seed=1)]
    (found,) = fillings(results_frame(rows))
    assert found.reliability == (1.0, 0.9)
    rows += [trial("attn_v", edits, 1.0, batch_size=8, trial_id=f"b{edits}") for edits in (100, 1000)]
    assert [one.label for one in fillings(results_frame(rows))] == ["5.attn_v at batch 32", "5.attn_v at batch 8"]


@pytest.mark.parametrize("rows", [[], table(attn_v={100: 1.0}), [trial("mlp", 5, 1.0, bits_per_parameter=None)]])
def test_a_study_of_one_number_of_edits_has_no_such_figure(rows):
    assert fillings(results_frame(rows)) == ()


def test_the_report_draws_a_line_per_position_and_marks_the_breaks():
    results = results_frame(table(attn_v={100: 1.0, 1000: 0.9}, mlp={100: 1.0, 1000: 1.0}))
    found = fillings(results)
    figure = capacity_figure(found, law_of(found))
    assert [trace.name for trace in figure.data] == ["5.attn_v", "5.mlp", "breaks"]
    assert figure.data[0].error_y.arrayminus[1] > 0.01 and list(figure.data[2].x) == [pytest.approx(math.sqrt(40))]
    plots = {plot.id: plot for plot in gallery(results, pareto_front(by_setting(results)), {}, None, {})}
    assert "5.mlp holds the most edits tried" in plots["capacity"].caption
    assert plots["capacity"].trials == set(results["trial_id"])
