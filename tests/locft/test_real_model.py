"""The real built-in model, end to end on five edits. The model is fetched and converted once (see the README)."""

import math
from dataclasses import replace

import pytest
import torch

from locft.data.answers import normalise_answer
from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.errors import InputError
from locft.measure.generation import greedy_answers
from locft.model.delta import EditDelta
from locft.model.models import load_model, model_fingerprint, model_folder
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edit, encode_edits
from locft.train.pipelines import TrainingSettings
from locft.workbench import Workbench
from tests.locft.train.test_encoding import SHARED, assert_exact

NAME = "smollm2-135m"
FINGERPRINT = "f77de93b191be049"
"""Of the dequantised weights. Another one means another model: results stored under this one do not hold for it."""
SETTINGS = TrainingSettings(batch_size=5, learning_rate=4e-3, epochs=25)

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def loaded():
    try:
        model_folder(NAME)
    except InputError as error:
        pytest.skip(f"the built-in model cannot be had here: {error}")
    return load_model(NAME, device="cpu")


@pytest.fixture(scope="module")
def bench(loaded):
    edits = load_edits("atlas", limit=5)
    short = tuple(replace(r, rephrases=r.rephrases[:1], locality=r.locality[:1]) for r in edits.requests)
    return Workbench.prepare(loaded, replace(edits, requests=short), load_suite("probes", limit=2), prose_tokens=128)


@pytest.fixture(scope="module")
def training(bench):
    return bench.train(TuningPosition.parse("22.mlp_down"), SETTINGS)


@pytest.fixture(scope="module")
def measured(bench, training):
    return bench.measure(training.delta)


def test_it_is_the_model_it_should_be(loaded):
    assert loaded.fingerprint == FINGERPRINT
    config = loaded.model.config
    assert (config.model_type, config.num_hidden_layers, config.hidden_size) == ("llama", 30, 576)
    assert config.vocab_size == len(loaded.tokenizer) == 49152
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float32}
    assert loaded.tokenizer.eos_token_id is not None
    assert encode_edit(loaded.tokenizer, "The capital of France is", "Oslo").start == 5


def test_it_knows_plain_facts(loaded):
    facts = {
        "The capital of France is": "paris",
        "The capital of Japan is": "tokyo",
        "The capital of Italy is": "rome",
        "The largest planet in the Solar System is": "jupiter",
    }
    answers = greedy_answers(loaded, list(facts))
    right = [fact in normalise_answer(answer.text) for fact, answer in zip(facts.values(), answers, strict=True)]
    assert sum(right) >= 3, [answer.text for answer in answers]


def test_it_does_not_know_the_edits_beforehand(bench):
    assert bench.baseline.metrics["reliability"] == 0.0
    assert 5 < bench.baseline.metrics["perplexity"] < 100


def test_five_edits_take(bench, training, measured):
    assert not training.diverged
    assert len(training.losses) <= SETTINGS.epochs
    assert training.losses[-1] < 0.1 < training.losses[0]
    assert measured.metrics["reliability"] == 1.0
    assert measured.metrics["generalization"] > bench.baseline.metrics["generalization"]
    assert 0.0 < measured.metrics["drift_kl"] < 5.0
    assert all(math.isfinite(value) for value in measured.metrics.values())
    for outcome in measured.outcomes:
        if outcome.kind == "reliability":
            assert outcome.correct and normalise_answer(outcome.got) == normalise_answer(outcome.expected)


def test_a_reloaded_delta_gives_the_same_metrics(bench, training, measured, tmp_path):
    again = bench.measure(EditDelta.load(training.delta.save(tmp_path)))
    assert again.outcomes == measured.outcomes
    for name, value in measured.metrics.items():
        assert name.endswith("_seconds") or again.metrics[name] == value, name


def test_the_model_is_bitwise_as_it_was(loaded, measured):
    fresh = load_model(NAME, device="cpu")
    assert model_fingerprint(loaded.model) == model_fingerprint(fresh.model)


@pytest.mark.parametrize("file", ["zsre_3k.json", "counterfact_3k.json"])
def test_real_edits_are_encoded_exactly(loaded, file):
    path = SHARED / "data" / "editing" / file
    if not path.is_file():
        pytest.skip(f"the shared data sets are not here ({file})")
    requests = load_edits(str(path), limit=100).requests
    for request, row in zip(requests, encode_edits(loaded.tokenizer, requests), strict=True):
        assert_exact(loaded.tokenizer, request.prompt, request.target, row)
