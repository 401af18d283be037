"""A trial: what is measured on the way of a stream, and after further training."""

from dataclasses import replace

import pytest

from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.further import ENOUGH, further_trained
from locft.measure.capability import measure_perplexity, score_suite
from locft.model.delta import EditDelta, applied
from locft.train.reference import full_forward
from locft.workbench import Workbench
from sweeps.run.trial import STAGE_METRICS, run_trial, train
from sweeps.study.trial_types import TrialConfig, pack_result, unpack_result
from tests.tiny import tiny_loaded

STREAM = TrialConfig(
    model_fingerprint="m", data_fingerprint="d", layers=3, layer=1, module="mlp_down", pipeline="stream", batch_size=2,
    learning_rate=0.1, loss_average="edit", arrival=1, replay=2, epochs=3, skip_below=1e-2, stop_below=1e-2, seed=0,
    precision="float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def bench():
    return Workbench.prepare(tiny_loaded("llama"), load_edits("atlas", limit=12), load_suite("probes", limit=2), 64)


@pytest.fixture(scope="module")
def result(bench):
    return run_trial(bench, STREAM)


def test_a_stream_is_measured_after_every_tenth(result):
    arrived = [stage["arrived"] for stage in result.stages]
    assert arrived == [2, 3, 4, 5, 6, 8, 9, 10, 11, 12]  # of 12 edits, whenever another tenth of them is there
    wanted = {"arrived", "first_tenth", "last_tenth", *STAGE_METRICS}
    assert all(stage.keys() == wanted for stage in result.stages)


def test_the_last_stage_is_the_result(result):
    assert all(result.stages[-1][name] == result.metrics[name] for name in STAGE_METRICS)


def test_a_stage_is_what_the_edits_so_far_would_measure(bench, result):
    deltas: list[EditDelta] = []
    train(bench, STREAM, lambda arrived, change: deltas.append(change()))
    measured = bench.first(4).measure(deltas[3])
    (stage,) = (stage for stage in result.stages if stage["arrived"] == 4)
    assert {name: stage[name] for name in STAGE_METRICS} == {name: measured.metrics[name] for name in STAGE_METRICS}
    first = bench.requests[0].id
    (told,) = (o.correct for o in measured.outcomes if o.edit_id == first and o.kind == "reliability")
    assert stage["first_tenth"] == float(told)


def test_few_arrivals_are_each_a_stage_and_other_pipelines_have_none(bench):
    assert [s["arrived"] for s in run_trial(bench, replace(STREAM, arrival=5)).stages] == [5, 10, 12]
    assert run_trial(bench, replace(STREAM, pipeline="breadth_first")).stages == ()


def test_further_steps_are_measured_on_the_whole_model(bench):
    """Against the same weights put into the model by hand."""
    config = replace(STREAM, pipeline="breadth_first", further_steps=3)
    found = run_trial(bench, config).metrics
    at_once = run_trial(bench, replace(config, further_steps=0)).metrics
    assert found["train_loss"] == at_once["train_loss"] and found["drift_kl"] != at_once["drift_kl"]
    assert not set(bench.suite.spare) & set(bench.suite.prose) and len(bench.suite.spare) >= ENOUGH
    delta = further_trained(bench.loaded, train(bench, config).delta, bench.suite.spare, 3, "float32", 0)
    with applied(bench.loaded, delta):
        logits = full_forward(bench.loaded.model)
        assert score_suite(logits, bench.suite).capability == found["capability"]
        assert measure_perplexity(logits, bench.suite) == pytest.approx(found["perplexity"])


def test_stages_travel_with_the_result(result):
    assert unpack_result(pack_result(result)).stages == result.stages
