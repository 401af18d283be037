"""What is said while a study runs."""

from dataclasses import replace

import pytest

from sweeps.commands.progress import Progress
from sweeps.select.policy import Run, Rung
from sweeps.study.estimate import Costs, Forecast
from sweeps.study.plan import PreparedStudy, make_plan
from tests.mlflow_store import config, failure, result
from tests.sweeps.study.test_plan import FACTS, make_study

SETTING = "breadth-first, batch 10, rate 0.004, loss by edit, seed 0"


def progress(planned=4, earlier=(), **budget):
    study = make_study(name="layers", search={"method": "optuna", "trials": planned}, budget=budget)
    plan, costs = make_plan(study, FACTS), Costs()
    prepared = PreparedStudy(study, FACTS, plan, None, None)
    return Progress("layers", Forecast(prepared, costs), [config(layer).id for layer in earlier])


def test_a_line_for_every_trial(capsys):
    shown = progress()
    shown.started(1)
    shown.finished(result(config(3)), 1)
    shown.finished(failure(config(4), "OutOfMemoryError: 3 GiB [wanted]"), 0)
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith(f"[1/4] 3.mlp_down, {SETTING}: reliability ")
    assert "capability" in first and "left" in first
    assert second.startswith("[2/4] 4.mlp_down") and "failed: OutOfMemoryError: 3 GiB [wanted]" in second
    assert (shown.done, shown.failed) == (1, 1)


def test_a_resumed_study_says_what_it_keeps(capsys):
    shown = progress(planned=10, earlier=range(6))
    shown.finished(result(config(7)), 1)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "layers: 6 of 10 trials are already finished and are kept"
    assert lines[1].startswith("[7/10]")


def test_the_time_left_is_the_forecast_set_right_by_what_trials_took():
    shown = progress(planned=10)
    mean = shown.pace._forecast.estimate.seconds_per_trial
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


def test_a_budget_of_trials_is_what_is_counted_down_from(capsys):
    shown = progress(planned=300, earlier=range(6), trials=10)
    mean = shown.pace._forecast.estimate.seconds_per_trial
    assert shown.seconds_left() == pytest.approx(4 * mean)
    shown.finished(result(config(7)), 1)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "layers: 6 of 10 trials are already finished and are kept" and second.startswith("[7/10]")
    assert progress(planned=5, trials=10).planned == 5


def test_no_more_time_is_left_than_the_budget_has():
    shown = progress(planned=300, minutes=2)
    assert shown.seconds_left() == pytest.approx(120, abs=5)


def test_nothing_is_left_after_the_last(capsys):
    shown = progress(planned=1)
    shown.finished(result(config(3)), 0)
    assert shown.seconds_left() is None and "left" not in capsys.readouterr().err


def test_a_divergence_is_called_so(capsys):
    shown = progress()
    wild = result(config(3))
    wild.metrics["diverged"] = 1.0
    shown.finished(wild, 0)
    said = capsys.readouterr().err
    assert said.splitlines()[0].startswith("[1/4] 3.mlp_down") and "diverged" in said


def test_a_trial_heard_of_twice_counts_once():
    shown = progress()
    shown.finished(failure(config(3)), 1)
    shown.finished(failure(config(3)), 1)
    assert (shown.done, shown.failed) == (0, 1)
    shown.finished(result(config(3)), 0)
    shown.finished(result(config(3)), 0)
    assert (shown.done, shown.failed) == (1, 0)


def test_a_worker_that_died_is_told(capsys):
    shown = progress()
    shown.retried(config(3), "out of memory")
    assert capsys.readouterr().err.strip() == (f"3.mlp_down, {SETTING}: its worker died; trying again (out of memory)")


def test_a_selection_is_told_rung_by_rung(capsys):
    """It plans no number of trials ahead, so no time is left to tell but that of its budget."""
    shown = Progress("select-it")
    run = Run(3, "mlp_down", 0.004)
    shown.note("measuring the unedited model")
    shown.rung(Rung("rung 1", (run, replace(run, layer=4), replace(run, layer=5)), "the probe's best"), 2, 700.0)
    shown.finished(result(config(3)), 1)
    shown.finished(failure(config(4), "OutOfMemoryError"), 0)
    shown.rung(Rung("rung 2", (replace(run, layer=6),), "further kinds"), 1, 90.0)
    shown.rung(Rung("rung 3", (replace(run, layer=7),), "beside a run that is not over"), 1, 60.0)
    shown.finished(result(config(6)), 1)
    shown.finished(result(config(7)), 0)
    said = capsys.readouterr().err
    lines = said.splitlines()
    told = "rung 1: the probe's best (1 already known); about 12 min of the budget remain (--budget-share or --budget-minutes sets it)"
    assert lines[:2] == ["measuring the unedited model", told]
    assert lines[2].startswith(f"[1/2] 3.mlp_down, {SETTING}: reliability ") and "drift 0.0" in lines[2]
    assert (
        lines[3].endswith("failed: OutOfMemoryError")
        and lines[4] == "rung 2: further kinds; about 90 s of the budget remain"
    )
    assert lines[6].startswith("[3/4] 6.mlp_down") and lines[7].startswith("[4/4] 7.mlp_down") and "left" not in said
