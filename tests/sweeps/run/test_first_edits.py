"""A workbench of the first edits of another, questions about a sample, and what each edit holds in bits."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from locft.data.requests import drawn_places, load_edits
from locft.model.positions import TuningPosition, list_positions
from locft.train.encoding import encode_edit
from locft.train.pipelines import TrainingSettings
from locft.workbench import Workbench
from sweeps.run import trial
from sweeps.run.trial import run_trial
from sweeps.study.trial_types import TrialConfig, asked_places, every_asked_place
from tests.tiny import tiny_loaded

POSITION = TuningPosition(1, "mlp_down")
SETTINGS = TrainingSettings(batch_size=2, learning_rate=1e-2, epochs=4)
CONFIG = TrialConfig(
    model_fingerprint="f", data_fingerprint="d", layers=4, layer=1, batch_size=2, learning_rate=1e-2, epochs=4
)


@pytest.fixture(scope="module")
def bench():
    return Workbench.prepare(tiny_loaded("llama"), load_edits("fictitious", limit=8), None)


def comparable(measurement):
    return {key: value for key, value in measurement.metrics.items() if "seconds" not in key}, measurement.outcomes


def test_the_first_edits_are_trained_and_asked_as_if_there_were_no_others(bench):
    alone = Workbench.prepare(tiny_loaded("llama"), load_edits("fictitious", limit=3), None)
    first = bench.first(3)
    deltas = [one.train(POSITION, SETTINGS).delta for one in (first, alone)]
    assert all(torch.equal(deltas[0].tensors[name], deltas[1].tensors[name]) for name in deltas[1].tensors)
    assert comparable(first.measure(deltas[0])) == comparable(alone.measure(deltas[1]))
    np.testing.assert_allclose(first.bits, alone.bits, rtol=1e-5)
    assert bench.first(0) is bench and bench.first(8) is bench


def test_metrics_of_a_sample_are_those_of_its_edits(bench):
    delta = bench.train(POSITION, SETTINGS).delta
    everything, sampled = bench.measure(delta), bench.first(0, (1, 4, 6)).measure(delta)
    asked = {bench.requests[place].id for place in (1, 4, 6)}
    assert sampled.outcomes == tuple(one for one in everything.outcomes if one.edit_id in asked)
    assert sampled.metrics["n_edits"] == 3 and everything.metrics["n_edits"] == 8
    assert sampled.metrics["merged_loss"] == everything.metrics["merged_loss"]  # of all edits
    again = Workbench.prepare(tiny_loaded("llama"), load_edits("fictitious", limit=8), None, asked_places=(6, 1, 4))
    assert again.questions == bench.first(0, (1, 4, 6)).questions and len(again.rows) == 8


def test_bits_are_the_surprise_of_the_unedited_model_without_the_end(bench):
    model, tokenizer = bench.loaded.model, bench.loaded.tokenizer
    for request, bits in zip(bench.requests, bench.bits):
        row = encode_edit(tokenizer, request.prompt, request.target)
        with torch.no_grad():
            logits = model(torch.tensor([row.token_ids])).logits[0].double().log_softmax(-1)
        expected = -sum(logits[at - 1, row.token_ids[at]] for at in range(row.start, len(row.token_ids) - 1))
        assert bits == pytest.approx(float(expected) / math.log(2), rel=1e-5)


def test_a_trial_says_how_full_its_position_is(bench, monkeypatch):
    whole, first = run_trial(bench, CONFIG), run_trial(bench.first(4, (0, 2)), CONFIG)
    (size,) = (info.size for info in list_positions(bench.loaded.model) if info.position == POSITION)
    assert size == sum(tensor.numel() for tensor in bench.train(POSITION, SETTINGS).delta.tensors.values())
    assert whole.metrics["bits_per_parameter"] == pytest.approx(bench.bits.sum() / size)
    assert first.metrics["bits_per_parameter"] == pytest.approx(bench.bits[:4].sum() / size)
    assert first.metrics["n_edits"] == 2 and whole.metrics["n_edits"] == 8
    monkeypatch.setattr(trial, "train", lambda *_: replace(bench.first(4).train(POSITION, SETTINGS), diverged=True))
    wild = run_trial(bench.first(4, (0, 2)), CONFIG)
    assert wild.metrics["diverged"] == 1 and wild.metrics["n_edits"] == 2
    assert first.metrics["seconds_per_edit"] == pytest.approx(first.metrics["train_seconds"] / 4)


def test_places_to_ask_about_are_a_sample_only_of_more_edits_than_that():
    assert asked_places(10, None) is None and asked_places(10, 10) is None
    assert asked_places(10, 4) == tuple(drawn_places(10, 4)) and len(set(asked_places(1000, 100))) == 100
    assert every_asked_place((0,), 10, None) is None and every_asked_place((3, 0), 10, 10) is None
    assert every_asked_place((3,), 10, None) == (0, 1, 2)
    assert every_asked_place((3, 0), 10, 4) == tuple(sorted({0, 1, 2, *drawn_places(10, 4)}))
