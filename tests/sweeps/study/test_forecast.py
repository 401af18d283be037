"""What a study will take, and whether that comes out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest

import sweeps
from sweeps.study.calibration import calibrated
from sweeps.study.estimate import (
    Costs,
    Pass,
    default_costs,
    estimate,
    memory_bytes,
    memory_range,
    trial_seconds,
)
from sweeps.study.forecast import Forecast, foresee, learnt, machine, places
from sweeps.study.plan import make_plan
from sweeps.study.plan import PreparedStudy
from sweeps.study.resolve import prepare
from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.study.schema import Limits
from sweeps.study.reader import load_study
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.study_run import Tracker
from tests.mlflow_store import result
from tests.sweeps.study.test_plan import FACTS, make_facts, make_study

MEASURED = Path(__file__).parents[2] / "benchmarks" / "table.csv"
COSTS = Costs(Pass(0.1, 0.02), Pass(0.01, 0.002), Pass(3.0, 0.5), Pass(2.0, 0.25), unedited=7.0, spread=2.0, busy=1.5)


def test_an_estimate_is_its_written_formula():
    facts = make_facts(10, n_edits=6, edit_tokens=100, evaluation_tokens=500, capability_tokens=1500,
                       trained_parameters={"5.mlp": 40}, parameters=1000, vocabulary=50, head_parameters=200)  # fmt: skip
    space = {"layer": 5, "module": "mlp", "batch_size": 4, "seed": [0, 1, 2]}
    plan = make_plan(make_study(space, epochs=10), facts)
    got = estimate(plan, facts, COSTS, concurrent=2)
    training = 10 * (2 * (0.1 + 5 * 0.02) + 6 * (0.01 + 5 * 0.002))
    measuring = 3 + 5 * 0.5 + 2 + 5 * 0.25
    assert got.seconds_per_trial == pytest.approx(0.9 * training + measuring)
    assert got.seconds == pytest.approx(40 + 7 + 2 * (0.9 * training + measuring)), "the third waits for a place"
    assert got.seconds_high == pytest.approx(2 * (47 + 2 * (training + measuring)))
    assert got.seconds_low == pytest.approx((47 + 2 * (0.3 * training + measuring)) / 2 / 1.5)
    held, logits = 1_050_000_000 + 4 * 1000 + 2 * (380_000_000 + 16 * 40), int(1.6 * 4 * 50 * int(1.5 * 2048))
    assert (got.memory_bytes_low, got.memory_bytes_high) == (held, held + 2 * logits)
    assert got.disk_bytes_high == got.disk_bytes_low + 4 * 4 * 2000 * 2
    assert got.disk_bytes_low == 10_000_000 + 3 * (30_000 + 24 * 400)
    left = estimate(plan, facts, COSTS, concurrent=2, done=[plan.trials[0].id])
    assert (
        left.trials == left.left == 2
        and left.ended_by is None
        and left.seconds == pytest.approx(47 + 0.9 * training + measuring)
    )
    assert estimate(plan, facts, COSTS, done=[trial.id for trial in plan.trials]).seconds == 0


def test_estimates_grow_with_what_costs():
    def seconds(facts=FACTS, cpus=2, **space):
        return estimate(make_plan(make_study({"layer": 22, **space}), facts), facts, default_costs(facts, cpus)).seconds

    base = seconds()
    assert seconds(layer=3) > base and seconds(batch_size=1) > base and seconds(seed=[0, 1]) > base
    assert seconds(cpus=1) > base and seconds(make_facts(n_edits=200)) > base
    optuna = make_plan(make_study(search={"method": "optuna", "trials": 10}), FACTS)
    assert estimate(optuna, FACTS, default_costs(FACTS)).seconds > 0


@pytest.mark.parametrize("search", [{}, {"search": {"method": "optuna", "trials": 300}}], ids=["grid", "optuna"])
def test_an_estimate_ends_with_the_budget(search):
    space = {"layer": 5, "seed": list(range(300))}
    study, facts = make_study(space, **search), make_facts(10)
    plan, costs = make_plan(study, facts), default_costs(facts)

    def ends(done=(), **budget):
        return estimate(plan, facts, costs, concurrent=2, done=done, budget=Limits(**budget))

    whole, ten = ends(), ends(trials=10)
    assert (whole.trials, whole.left, whole.ended_by) == (300, 300, None)
    assert (ten.trials, ten.left, ten.ended_by) == (10, 300, "trials")
    started = whole.seconds - 150 * whole.seconds_per_trial
    assert ten.seconds == pytest.approx(started + 5 * ten.seconds_per_trial)
    assert ten.seconds_high < whole.seconds_high and ten.disk_bytes_high < whole.disk_bytes_high
    more = ends([trial.id for trial in plan.sample[:4]], trials=10)
    assert (more.trials, more.left) == (6, 296), "those that are done count"
    assert ends([trial.id for trial in plan.sample[:4]], trials=3).trials == 0
    minutes = (started + 20 * whole.seconds_per_trial + 0.1) / 60
    short = ends(minutes=minutes)
    assert (short.trials, short.left, short.ended_by) == (40, 300, "minutes")
    assert short.seconds == short.seconds_high == pytest.approx(60 * minutes) and short.seconds_low <= short.seconds
    assert ends(minutes=1e6).ended_by is None


def test_a_forecast_is_for_the_machines_there_are(monkeypatch):
    study = make_study({"seed": list(range(8))})
    forecast = Forecast(PreparedStudy(study, FACTS, make_plan(study, FACTS), None, None), default_costs(FACTS))
    wide = forecast.on([{"CPU": 16.0, "GPU": 0.0}])
    assert (forecast.estimate.concurrent, wide.estimate.concurrent) == (1, 16)
    assert wide.estimate.seconds < forecast.estimate.seconds / 4
    assert (
        forecast.on([{"CPU": 16.0, "memory": 2.5 * memory_bytes(forecast.prepared.plan.sample[0], FACTS)}]).concurrent
        == 2
    )
    gpu = replace(forecast.prepared, study=make_study(resources={"gpus": 0.5}))
    assert places(gpu, [{"CPU": 16.0, "GPU": 2.0}]) == 4 and places(gpu, [{"CPU": 16.0}]) == 1


def test_memory_is_what_was_measured():
    """Two workers, proportional set size of all processes: 5.4 and 5.8 GiB in two runs at the first layers of SmolLM2-135M."""
    facts = replace(make_facts(edit_tokens=500, trained_parameters={"0.mlp": 2_654_208}), precision="bfloat16")
    trial = make_plan(make_study({"layer": 0, "module": "mlp", "batch_size": 4}), facts).trials[0]
    low, high = memory_range([trial] * 2, facts, 2)
    assert low < 5.4 * 2**30 < 5.8 * 2**30 < high < 1.2 * 5.4 * 2**30
    alone = memory_range([trial], facts, 2)
    assert (2 * alone[1] - high) / 2**30 > 1.5, "driver and weights are there once"


def test_what_does_not_fit_is_told(monkeypatch):
    study = make_study({"seed": list(range(8))})
    forecast = Forecast(
        PreparedStudy(study, FACTS, make_plan(study, FACTS), None, None), default_costs(FACTS), concurrent=8
    )
    expected = forecast.estimate
    assert expected.memory_bytes_low < expected.memory_bytes_high

    def warnings(memory):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory, available=memory))
        return forecast.warnings

    assert warnings(expected.memory_bytes_high) == []
    assert "8 at a time may take" in warnings(expected.memory_bytes_high - 1)[0]
    assert "8 at a time take at least" in warnings(expected.memory_bytes_low - 1)[0]


def measured(rows: pd.DataFrame, facts, n_edits: int) -> list[TrialResult]:
    """Trials of the exhaustive table."""
    names = ("steps", "train_seconds", "evaluate_seconds", "capability_seconds", "diverged")
    return [
        TrialResult(
            TrialConfig(
model_fingerprint="model", data_fingerprint=facts.data_fingerprint if n_edits == 100 else "other", layers=30, layer=row["layer"], module=row["module"], pipeline="breadth_first", batch_size=10, learning_rate=row["learning_rate"], seed=row["seed"], loss_average="edit", epochs=25, skip_below=0.01, stop_below=0.01),
            "done", None, {"n_edits": float(n_edits), **{name: row[name] for name in names}},
        )
        for row in rows.to_dict("records")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("part", "n_edits", "taken"),
    [
        ("full", 100, lambda rows: rows[rows.layer % 6 == 0]),
        ("full", 100, lambda rows: rows[(rows.layer < 15)]),
        ("full", 100, lambda rows: rows[(rows.layer >= 15)]),
        ("tune", 40, lambda rows: rows),
    ],
    ids=["a sample", "the early layers", "the late layers", "other edits"],
)
def test_earlier_trials_tell_what_a_real_study_took(part, n_edits, taken):
    table = pd.read_csv(MEASURED)
    facts = replace(make_facts(capability_tokens=22_105), precision="bfloat16")
    study = make_study(resources={"cpus": 1})
    earlier = taken(table[table.part == part])
    costs = learnt(measured(earlier, facts, n_edits), PreparedStudy(study, facts, make_plan(study, facts), None, None))
    rest = table[table.part == "full"].drop(earlier.index, errors="ignore")
    truth = rest[["train_seconds", "evaluate_seconds", "capability_seconds"]].to_numpy().sum()
    expected = sum(trial_seconds(trial.config, facts, costs, None) for trial in measured(rest, facts, 100))
    assert 1 / 1.5 < expected / truth < 1.5
    assert costs.shares["breadth_first"] == pytest.approx(0.95, abs=0.1) and costs.shares["depth_first"] == 0.8


def test_too_few_earlier_trials_tell_nothing():
    study = make_study()
    prepared = PreparedStudy(study, FACTS, make_plan(study, FACTS), None, None)
    table = pd.read_csv(MEASURED)
    assert learnt(measured(table[table.part == "full"][:2], FACTS, 100), prepared) is None


def test_a_calibration_measures_this_machine(study_file):
    prepared = prepare(load_study(str(study_file(space__batch_size=[1, 4]))))
    costs = calibrated(prepared)
    assert costs.source.startswith("a calibration on this machine")
    assert costs.step.seconds(3) + costs.edit.seconds(3) > 0 and costs.busy >= 1
    assert costs.evaluation.seconds(3) > 0 and costs.capability.seconds(3) > 0 and costs.unedited >= 0
    elsewhere = prepared.study.model_copy(update={"resources": make_study(resources={"gpus": 1}).resources})
    assert calibrated(replace(prepared, study=elsewhere)).source == "rough rates, nothing measured here"


def test_a_forecast_takes_the_trials_of_the_store(workplace, study_file, ray_running):
    file = study_file(space__layer=[0, 1, 2])
    sweeps.run_study(file)
    wider = prepare(load_study(str(file), ["space.seed=[0, 1]"]))
    forecast = foresee(wider, resolve_uri(None))
    assert forecast.estimate.trials == 3 and forecast.estimate.source == "3 earlier trials of this model"
    results = sweeps.load_results(file)
    expected = sum(forecast.seconds(trial) for trial in wider.plan.trials if trial.seed == 0)
    assert 1 / 3 < expected / results["seconds"].sum() < 3, "milliseconds each, so only roughly"
    assert foresee(wider, f"sqlite:///{workplace}/absent.db").estimate.trials == 6
    assert not (workplace / "absent.db").exists()
    assert machine(wider.study.resources).endswith(" 1 CPU 0 GPU")


def test_finished_trials_count_wherever_they_ran(workplace, study_file):
    prepared = prepare(load_study(str(study_file())))
    tracker = Tracker.open(resolve_uri(None), "tiny", prepared.id)
    tracker.open_run("tiny", study_yaml="", description="", environment={})
    for trial in prepared.plan.trials:
        tracker.log_trial(result(trial))
    whole = foresee(prepared, resolve_uri(None)).estimate
    assert (whole.trials, whole.seconds, whole.source) == (0, 0, "rough rates, nothing measured here")
