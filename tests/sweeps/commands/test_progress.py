"""What is seen while a study runs: lines where output is kept, a table on a terminal."""

import io
from dataclasses import replace

import pytest
from rich.console import Console

from analysis.stats.pareto import pareto_front
from analysis.stats.table import results_frame
from sweeps.commands.progress import Progress
from sweeps.select.policy import Run, Rung
from sweeps.study.estimate import Forecast, rough_costs
from sweeps.study.plan import PreparedStudy, make_plan
from tests.mlflow_store import config, failure, result
from tests.sweeps.study.test_plan import FACTS, make_study

SETTING = "breadth-first, batch 10, rate 0.004, loss by edit, seed 0"


def progress(planned=4, earlier=(), terminal=False, **budget):
    study = make_study(name="layers", search={"method": "optuna", "trials": planned}, budget=budget)
    plan, costs = make_plan(study, FACTS), rough_costs(FACTS)
    prepared = PreparedStudy(study, FACTS, plan, None, None)
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal, width=160, color_system=None)
    forecast = Forecast(prepared, costs)
    return Progress("layers", forecast, [r.to_row() for r in earlier], console), screen


def test_a_line_for_every_trial():
    shown, screen = progress()
    with shown:
        shown.started(1)
        shown.finished(result(config(3)), 1)
        shown.finished(failure(config(4), "OutOfMemoryError: 3 GiB [wanted]"), 0)
    first, second = screen.getvalue().splitlines()
    assert first.startswith(f"[1/4] 3.mlp_down, {SETTING}: reliability ")
    assert "capability" in first and "left" in first
    assert second.startswith("[2/4] 4.mlp_down") and "failed: OutOfMemoryError: 3 GiB [wanted]" in second
    assert (shown.done, shown.failed) == (1, 1)


def test_a_resumed_study_says_what_it_keeps():
    shown, screen = progress(planned=10, earlier=[result(config(layer)) for layer in range(6)])
    with shown:
        shown.finished(result(config(7)), 1)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "layers: 6 of 10 trials were finished before and are kept"
    assert lines[1].startswith("[7/10]")


def test_the_time_left_is_the_forecast_set_right_by_what_trials_took():
    shown, _ = progress(planned=10)
    mean = shown.pace._forecast.estimate.seconds_per_trial
    with shown:
        shown.started(2)
        assert shown.seconds_left() == pytest.approx(mean * 9 / 2), "two at a time, and half of each is done"
        late = result(config(20))
        expected = shown.pace._forecast.seconds(late.config)
        late.metrics["seconds"] = 3 * expected
        shown.finished(late, 2)
        pace = (mean + 3 * expected) / (mean + expected)
        assert shown.seconds_left() == pytest.approx(pace * mean * 8 / 2), "more than was expected"
        shown.finished(failure(config(4)), 2)
        assert shown.seconds_left() == pytest.approx(pace * mean * 7 / 2), "a failure says nothing about the pace"


def test_a_budget_of_trials_is_what_is_counted_down_from():
    shown, screen = progress(planned=300, earlier=[result(config(layer)) for layer in range(6)], trials=10)
    mean = shown.pace._forecast.estimate.seconds_per_trial
    with shown:
        assert shown.seconds_left() == pytest.approx(4 * mean)
        shown.finished(result(config(7)), 1)
    first, second = screen.getvalue().splitlines()
    assert first == "layers: 6 of 10 trials were finished before and are kept" and second.startswith("[7/10]")
    assert progress(planned=5, trials=10)[0].planned == 5


def test_no_more_time_is_left_than_the_budget_has():
    shown, _ = progress(planned=300, minutes=2)
    assert shown.seconds_left() == pytest.approx(120, abs=5)


def test_nothing_is_left_after_the_last():
    shown, screen = progress(planned=1)
    with shown:
        shown.finished(result(config(3)), 0)
    assert shown.seconds_left() is None and "left" not in screen.getvalue()


def test_a_divergence_is_called_so():
    shown, screen = progress()
    wild = result(config(3))
    wild.metrics["diverged"] = 1.0
    with shown:
        shown.finished(wild, 0)
    assert screen.getvalue().splitlines()[0].startswith("[1/4] 3.mlp_down") and "diverged" in screen.getvalue()


def test_a_trial_heard_of_twice_counts_once():
    shown, _ = progress()
    with shown:
        shown.finished(failure(config(3)), 1)
        shown.finished(failure(config(3)), 1)
        assert (shown.done, shown.failed) == (0, 1)
        shown.finished(result(config(3)), 0)
        shown.finished(result(config(3)), 0)
    assert (shown.done, shown.failed) == (1, 0)


def test_a_worker_that_died_is_told():
    shown, screen = progress()
    with shown:
        shown.retried(config(3), "out of memory")
    assert screen.getvalue().strip() == (
        f"3.mlp_down, {SETTING}: its worker died and it is tried again (out of memory)"
    )


def test_the_table_on_a_terminal():
    shown, screen = progress(planned=9, earlier=[result(config(layer)) for layer in (1, 2)], terminal=True)
    with shown:
        shown.started(2)
        shown.finished(result(config(3)), 1)
        for seed in range(2):
            shown.finished(failure(config(4, seed=seed), "[red] OutOfMemoryError"), 1)
        shown._live.refresh()
    text = screen.getvalue()
    assert "layers: 3 done, 1 running, 2 failed of 9" in text
    assert "2 failed" in text and "[red] OutOfMemoryError" in text, "a cause is text, not markup"
    assert "front so far" in text and SETTING in text
    assert "[1/9]" not in text, "no lines between the redrawn table"


def test_redrawing_computes_nothing_and_the_front_stays_that_of_all(monkeypatch):
    from sweeps.commands import progress as module

    shown, _ = progress(planned=99, earlier=[result(config(layer)) for layer in range(10)], terminal=True)
    for layer in range(10, 30):
        shown.finished(result(config(layer)), 1)
    shown.finished(result(config(3)), 0)
    everything = [result(config(layer)).to_row() for layer in range(30)]
    assert [row["trial_id"] for row in shown._front] == list(pareto_front(results_frame(everything)).trial_ids)
    monkeypatch.setattr(module, "results_frame", lambda rows: pytest.fail("the table of all trials is made again"))
    assert shown._table().row_count == min(len(shown._front), module.SHOWN)


def test_of_equal_trials_the_front_shows_one():
    equal = [replace(result(config(layer)), metrics=result(config(0)).metrics) for layer in range(20)]
    shown, _ = progress(planned=99, earlier=equal[:10], terminal=True)
    for one in equal[10:]:
        shown.finished(one, 1)
    assert shown._table().row_count == 1


def test_the_table_before_anything_came_in():
    shown, screen = progress(terminal=True)
    with shown:
        shown._live.refresh()
    assert "layers: 0 done, 0 running, 0 failed of 4" in screen.getvalue()


def test_a_selection_is_told_rung_by_rung():
    """It plans no number of trials ahead, so no time is left to tell."""
    screen = io.StringIO()
    shown = Progress("select-it", console=Console(file=screen, width=160, color_system=None))
    run = Run(3, "mlp_down", 0.004)
    with shown:
        shown.note("measuring the unedited model")
        shown.rung(Rung("rung 1", (run, replace(run, layer=4), replace(run, layer=5)), "the probe's best"), open_runs=2)
        shown.finished(result(config(3)), 1)
        shown.finished(failure(config(4), "OutOfMemoryError"), 0)
        shown.rung(Rung("rung 2", (replace(run, layer=6),), "further kinds"), open_runs=1)
        shown.finished(result(config(6)), 0)
    lines = screen.getvalue().splitlines()
    assert lines[:2] == ["measuring the unedited model", "rung 1: the probe's best (1 known already)"]
    assert lines[2].startswith(f"[1/2] 3.mlp_down, {SETTING}: reliability ") and "drift 0.0" in lines[2]
    assert lines[3].endswith("failed: OutOfMemoryError") and lines[4] == "rung 2: further kinds"
    assert lines[5].startswith("[3/3] 6.mlp_down") and "left" not in screen.getvalue()


def test_a_selection_on_a_terminal_shows_the_same_table():
    screen = io.StringIO()
    shown = Progress("select-it", console=Console(file=screen, force_terminal=True, width=160, color_system=None))
    with shown:
        shown.rung(Rung("rung 1", (Run(3, "mlp_down", 0.004),), "the probe's best"), open_runs=1)
        shown.finished(result(config(3)), 0)
        shown._live.refresh()
    text = screen.getvalue()
    assert "rung 1: the probe's best" in text and "select-it: 1 done, 0 running, 0 failed of 1" in text
    assert "front so far" in text and SETTING in text
