"""What a study will take, and whether that comes out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from locft.curvature import factor_bytes
from locft.model.positions import TuningPosition, parameter_names
from sweeps.answer import foresee
from sweeps.study.estimate import (
    Costs,
    Estimate,
    Forecast,
    costs_from_steps,
    costs_from_trials,
    make_forecast,
    trial_seconds,
)
from sweeps.study.footprint import curvature_bytes, depth_bytes, memory_bytes, memory_range
from sweeps.study.plan import PreparedStudy, make_plan
from sweeps.study.reader import load_study
from sweeps.study.resolve import prepare
from sweeps.study.schema import Limits
from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.tracking.address import resolve_uri
from sweeps.tracking.study_run import Tracker
from tests.mlflow_store import result
from tests.sweeps.study.test_plan import FACTS, make_facts, make_study
from tests.tiny import tiny_model

MEASURED = Path(__file__).parents[2] / "benchmarks" / "table.csv"
COSTS = Costs(1, 1e6, 2e6, 3e6, spread=2.0, busy=1.5)


def prepared_study(study, facts=FACTS) -> PreparedStudy:
    """With no edits and items: what an estimate needs to know of them is in the facts."""
    return PreparedStudy(study, facts, make_plan(study, facts), None, None)


def estimate(study, facts, costs, *, concurrent=1, done=()) -> Estimate:
    return Forecast(prepared_study(study, facts), costs, frozenset(done), concurrent).estimate


def test_an_estimate_is_its_written_formula():
    facts = make_facts(10, n_edits=6, edit_tokens=100, evaluation_tokens=500, capability_tokens=1500,
                       trained_parameters={"5.mlp": 40}, parameters=1000, vocabulary=50, head_parameters=200)  # fmt: skip
    space = {"layer": 5, "module": "mlp", "batch_size": 4, "seed": [0, 1, 2]}
    study = make_study(space, epochs=10)
    got, trials = estimate(study, facts, COSTS, concurrent=2), make_plan(study, facts).trials
    head, through, slow = 200, 5 * facts.layer_parameters, 2.0 if facts.precision == "float32" else 1.0
    step = 8e-3 + 0.5e-9 * head + 1.1e-9 * through
    training = 1e6 * slow * 10 * (2 * step + 9e-12 * 100 * (0.3 * head + through))
    measuring = 2e6 * slow * 10e-12 * (500 * (0.3 * head + through) + 0.3 * 500 * 1000)
    measuring += 3e6 * slow * 1500 * (15e-12 * 0.3 * head + 7e-12 * through)
    start = 40 + 3e6 * slow * 15e-12 * 2000 * 1000
    assert got.seconds_per_trial == pytest.approx(0.9 * training + measuring)
    assert got.seconds == pytest.approx(start + 2 * (0.9 * training + measuring)), "the third waits for a place"
    assert got.seconds_high == pytest.approx(2 * (start + 2 * (training + measuring)))
    assert got.seconds_low == pytest.approx((start + 2 * (0.3 * training + measuring)) / 2 / 1.5)
    held, logits = 1_050_000_000 + 4 * 1000 + 2 * (380_000_000 + 16 * 40), 4 * 50 * int(1.5 * 2048)
    assert (got.memory_bytes_low, got.memory_bytes_high) == (held, held + 2 * logits)
    assert got.disk_bytes_high == got.disk_bytes_low + 4 * 4 * 2000 * 2
    assert got.disk_bytes_low == 10_000_000 + 3 * (30_000 + 24 * 400)
    left = estimate(study, facts, COSTS, concurrent=2, done=[trials[0].id])
    assert (
        left.trials == left.left == 2
        and left.ended_by is None
        and left.seconds == pytest.approx(start + 0.9 * training + measuring)
    )
    assert estimate(study, facts, COSTS, done=[trial.id for trial in trials]).seconds == 0


def test_estimates_grow_with_what_costs():
    def seconds(facts=FACTS, cpus=2, **space):
        return estimate(make_study({"layer": 22, **space}), facts, Costs(cpus)).seconds

    base = seconds()
    assert seconds(layer=3) > base and seconds(batch_size=1) > base and seconds(seed=[0, 1]) > base
    assert seconds(cpus=1) > base and seconds(make_facts(n_edits=200)) > base
    longer = make_facts(row_sizes={"chat": 3.0})
    assert seconds(longer) == base < seconds(longer, train_formats="raw,chat") < seconds(longer, train_formats="chat")
    assert seconds(guard="prose") > base and seconds(prefix_share=0.5) > base
    optuna = make_study(search={"method": "optuna", "trials": 10})
    assert estimate(optuna, FACTS, Costs()).seconds > 0


@pytest.mark.parametrize("search", [{}, {"search": {"method": "optuna", "trials": 300}}], ids=["grid", "optuna"])
def test_an_estimate_ends_with_the_budget(search):
    space = {"layer": 5, "seed": list(range(300))}
    study, facts = make_study(space, **search), make_facts(10)
    plan, costs = make_plan(study, facts), Costs()

    def ends(done=(), **budget):
        limited = study.model_copy(update={"budget": Limits(**budget)})
        return estimate(limited, facts, costs, concurrent=2, done=done)

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
    forecast = Forecast(prepared_study(study), Costs())
    wide = forecast.on([{"CPU": 16.0, "GPU": 0.0}])
    assert (forecast.estimate.concurrent, wide.estimate.concurrent) == (1, 16)
    assert wide.estimate.seconds < forecast.estimate.seconds / 4
    assert (
        forecast.on([{"CPU": 16.0, "memory": 2.5 * memory_bytes(forecast.prepared.plan.sample[0], FACTS)}]).concurrent
        == 2
    )
    gpu = Forecast(prepared_study(make_study(resources={"gpus": 0.5})), Costs())
    assert gpu.on([{"CPU": 16.0, "GPU": 2.0}]).concurrent == 4
    assert gpu.on([{"CPU": 16.0}]).concurrent == 1


def test_memory_is_what_was_measured():
    """Proportional set sizes on SmolLM2-135M: two workers 2.4 GiB (0.8 shared, 0.8 each of its own), the driver 0.7 GiB."""
    facts = replace(make_facts(edit_tokens=500, trained_parameters={"0.mlp": 2_654_208}), precision="bfloat16")
    trial = make_plan(make_study({"layer": 0, "module": "mlp", "batch_size": 4}), facts).trials[0]
    low, high = memory_range([trial] * 2, facts, 2)
    assert low < 3.1 * 2**30 < high < 1.2 * 3.1 * 2**30
    alone = memory_range([trial], facts, 2)
    assert (2 * alone[1] - high) / 2**30 > 1.5, "driver and weights are there once"


def test_what_does_not_fit_is_told(monkeypatch):
    study = make_study({"seed": list(range(8))})
    forecast = Forecast(prepared_study(study), Costs(), concurrent=8)
    expected = forecast.estimate
    assert expected.memory_bytes_low < expected.memory_bytes_high

    def warnings(memory):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory, available=memory))
        return forecast.warnings

    assert warnings(expected.memory_bytes_high) == []
    assert "8 trials at a time may take" in warnings(expected.memory_bytes_high - 1)[0]
    assert "8 trials at a time take at least" in warnings(expected.memory_bytes_low - 1)[0]


LLAMA_8B = replace(
    make_facts(32, n_edits=3000, parameters=8_030_000_000, layer_parameters=218_000_000, head_parameters=525_000_000,
               vocabulary=128_256, edit_tokens=46_500, trained_parameters={"22.mlp_down": 58_700_000}),
    precision="bfloat16",
)  # fmt: skip


def gpu_notes(monkeypatch, memory, gpus, dtype="bfloat16"):
    monkeypatch.setattr("torch.cuda.is_available", lambda: memory > 0)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(total_memory=memory * 2**30))
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=2**50, available=2**50))
    space = {"layer": 22, "module": "mlp_down", "batch_size": 100}
    study = make_study(space, dtype=dtype, resources={"gpus": gpus})
    return Forecast(prepared_study(study, LLAMA_8B), Costs()).memory_notes


def test_a_trial_keeps_what_lies_above_its_layer():
    """An 8B in bfloat16 at layer 22: ten layers and the head, 380 MB of a process, 16 bytes a trained number, the logits."""
    trial = make_plan(
        make_study({"layer": 22, "module": "mlp_down", "batch_size": 8}, dtype="bfloat16"), LLAMA_8B
    ).trials[0]
    found = depth_bytes(trial, LLAMA_8B)
    assert list(found) == [8, 16, 22, 28]
    weights, logits = 2 * (10 * 218_000_000 + 525_000_000), 4 * 128_256 * 3 * 2048 // 2
    assert found[22] == weights + 380_000_000 + 16 * 58_700_000 + logits
    both = replace(trial, dtype="float32")  # float32 beside what trains in bfloat16
    assert depth_bytes(both, LLAMA_8B)[22] - found[22] == 2 * weights


def test_what_fits_into_memory_is_told_by_depth(monkeypatch):
    def said(memory):
        monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=memory, available=memory))
        study = make_study({"layer": 22, "module": "mlp_down"}, dtype="bfloat16")
        return Forecast(prepared_study(study, LLAMA_8B), Costs()).memory_notes[0]

    assert "all fit in the 64.0 GiB that are free" in said(2**36)
    assert "from layer 22 up they fit in the 10.0 GiB" in said(10 * 2**30)
    assert "none fits in the 1.0 GiB" in said(2**30)


def test_what_fits_on_a_gpu_is_told(monkeypatch):
    """An 8B in bfloat16: 16 GB of weights, and what a trial adds."""
    assert gpu_notes(monkeypatch, 80, 2) == []
    (said,) = gpu_notes(monkeypatch, 80, 0.5)
    assert "3 on a GPU of 80 GiB; resources.gpus: 0.5 puts 2 on each" in said and "not measured" in said
    (said,) = gpu_notes(monkeypatch, 80, 0.1)
    assert "resources.gpus: 0.1 puts 10 on it; expected at least 0.34" in said
    (said,) = gpu_notes(monkeypatch, 16, 0.5)
    assert "0 on a GPU of 16 GiB" in said and "expected a smaller dtype or batch" in said
    (said,) = gpu_notes(monkeypatch, 0, 1)
    assert "1 on a GPU of 24 GiB and 3 on a GPU of 80 GiB" in said
    taken = [float(gpu_notes(monkeypatch, 80, 1, dtype)[0].split()[6]) for dtype in ("bfloat16", "float32")]
    assert 16 < taken[0] < 26 and taken[1] - taken[0] > 29


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
    costs = costs_from_trials(measured(earlier, facts, n_edits), prepared_study(study, facts))
    rest = table[table.part == "full"].drop(earlier.index, errors="ignore")
    truth = rest[["train_seconds", "evaluate_seconds", "capability_seconds"]].to_numpy().sum()
    expected = sum(trial_seconds(trial.config, facts, costs, None) for trial in measured(rest, facts, 100))
    assert 1 / 1.5 < expected / truth < 1.5
    assert costs.shares["breadth_first"] == pytest.approx(0.95, abs=0.1) and costs.shares["depth_first"] == 0.8


def test_too_few_earlier_trials_tell_nothing():
    study = make_study()
    prepared = prepared_study(study)
    table = pd.read_csv(MEASURED)
    assert costs_from_trials(measured(table[table.part == "full"][:2], FACTS, 100), prepared) is None


def test_timed_steps_measure_this_machine(study_file):
    prepared = prepare(load_study(str(study_file(space__batch_size=[1, 4]))))
    costs = costs_from_steps(prepared)
    assert costs.source.startswith("timed steps of this model") and costs.measured and costs.busy >= 1
    assert costs.train > 0 and costs.train != 1
    assert costs.evaluate == costs.capability == pytest.approx(1.7 * costs.train), "these are not timed"
    elsewhere = prepared.study.model_copy(update={"resources": make_study(resources={"gpus": 1}).resources})
    assert costs_from_steps(replace(prepared, study=elsewhere)) is None


def test_steps_are_timed_only_where_nothing_else_tells(study_file, monkeypatch):
    prepared, asked = prepare(load_study(str(study_file()))), []
    monkeypatch.setattr("sweeps.study.estimate.costs_from_steps", asked.append)
    took = {"train_seconds": 2.0, "steps": 4.0}
    earlier = [replace(done := result(trial), metrics=done.metrics | took) for trial in prepared.plan.trials]
    assert make_forecast(prepared, earlier=(earlier * 3)[:3]).costs.source == "3 earlier trials of this model"
    assert not make_forecast(prepared, [trial.id for trial in prepared.plan.trials]).costs.measured
    assert not make_forecast(prepared, timed=False).costs.measured and asked == []
    assert not make_forecast(prepared).costs.measured and len(asked) == 1


def test_steps_of_a_real_study_tell_what_its_trials_took():
    """Steps at the first, middle and last layer of the exhaustive table against the time of all its trials."""
    table = pd.read_csv(MEASURED)
    facts = replace(make_facts(capability_tokens=22_105), precision="bfloat16")
    prepared = prepared_study(make_study(resources={"cpus": 1}), facts)
    full = table[(table.part == "full") & (table.diverged != 1)]
    steps = [
        replace(trial, metrics={name: trial.metrics[name] for name in ("n_edits", "steps", "train_seconds")})
        for trial in measured(full[full.layer.isin([0, 15, 29]) & (full.module == "mlp")], facts, 100)
    ]
    costs = replace(costs_from_trials(steps, prepared), shares={"breadth_first": 0.95, "depth_first": 0.8})
    truth = full[["train_seconds", "evaluate_seconds", "capability_seconds"]].to_numpy().sum()
    expected = sum(trial_seconds(trial.config, facts, costs, None) for trial in measured(full, facts, 100))
    assert 1 / 1.5 < expected / truth < 1.5


def test_finished_trials_count_wherever_they_ran(workplace, study_file):
    prepared = prepare(load_study(str(study_file())))
    tracker = Tracker.open(resolve_uri(None), "tiny", prepared.id)
    tracker.open_run("tiny", study_yaml="", description="", environment={})
    for trial in prepared.plan.trials:
        tracker.log_trial(result(trial))
    whole = foresee(prepared, resolve_uri(None)).estimate
    assert (whole.trials, whole.seconds, whole.source) == (0, 0, "rough rates, not measured on this machine")


@pytest.mark.parametrize(
    ("module", "shapes"),
    [
        ("mlp_down", [(8, 24)]),
        ("mlp", [(24, 8), (24, 8), (8, 24)]),
        ("mlp_up", [(64, 24, 8)]),  # stacked experts
    ],
)
@pytest.mark.parametrize(("method", "copies"), [("full", 0), ("low_curvature", 3), ("natural_gradient", 6)])
def test_memory_counts_the_curvature_that_a_method_needs(module, shapes, method, copies):
    factors = sum(factor_bytes(torch.Size(shape)) for shape in shapes)
    facts = make_facts(10, factor_bytes={f"5.{module}": factors})
    (trial,) = make_plan(make_study({"layer": 5, "module": module, "method": method}), facts).trials
    assert curvature_bytes(trial, facts) == copies * factors
    plain = replace(trial, method="full")
    assert memory_bytes(trial, facts) - memory_bytes(plain, facts) == copies * factors


def test_the_size_of_the_curvature_is_told_from_the_models_shapes(study_file):
    facts = prepare(load_study(str(study_file()))).facts
    model = tiny_model()
    for module in ("mlp_down", "attn", "layer"):
        names = parameter_names(model, TuningPosition(1, module))
        assert facts.factor_bytes[f"1.{module}"] == sum(factor_bytes(model.get_parameter(name).shape) for name in names)
