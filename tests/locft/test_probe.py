"""The probe against gradients worked out the plain way."""

import math

import pytest
import torch
import torch.nn.functional as F

from locft import probe
from locft.data.requests import load_edits
from locft.model.positions import TuningPosition, parameter_names
from locft.probe import Signs, probe_positions
from locft.train.encoding import encode_edits
from locft.train.examples import TrainingExamples
from locft.train.objective import batch_loss
from locft.train.pipelines import TrainingSettings, finetune
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from tests.tiny import tiny_loaded

POSITIONS = [TuningPosition(layer, module) for layer in range(3) for module in ("mlp_down", "mlp", "attn", "layer")]


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded()


@pytest.fixture(scope="module")
def rows(loaded):
    return encode_edits(loaded.tokenizer, load_edits("atlas", limit=12).requests)


@pytest.fixture(scope="module")
def prose(rows):
    return [TokenRow(tuple(token for row in rows for token in row.token_ids), 1)]


@pytest.fixture(scope="module")
def found(loaded, rows, prose):
    return {scores.position: scores for scores in probe_positions(loaded, rows, prose, POSITIONS)}


def gradient(loaded, rows, position):
    """Of the mean edit loss, flat."""
    names = parameter_names(loaded.model, position)
    weights = {name: loaded.model.get_parameter(name).detach().clone().requires_grad_() for name in names}
    loss = batch_loss(full_forward(loaded.model, weights)(rows), rows, "edit")
    return torch.cat([part.reshape(-1) for part in torch.autograd.grad(loss, list(weights.values()))]), weights


def test_the_gain_is_the_norm_of_the_gradient_of_the_edits(loaded, rows, found):
    for position in POSITIONS:
        expected, _ = gradient(loaded, rows, position)
        assert found[position].gain == pytest.approx(expected.abs().sum().item(), rel=1e-4)


def test_the_gain_is_what_a_small_sign_step_learns(loaded, rows, found):
    """First order: the loss falls by rate times gain."""
    position, rate = TuningPosition(1, "mlp_down"), 1e-5
    slope, weights = gradient(loaded, rows, position)
    (name,) = weights
    before = batch_loss(full_forward(loaded.model, {})(rows), rows, "edit").item()
    moved = {name: weights[name].detach() - rate * slope.reshape(weights[name].shape).sign()}
    after = batch_loss(full_forward(loaded.model, moved)(rows), rows, "edit").item()
    assert before - after == pytest.approx(rate * found[position].gain, rel=0.05)


def test_disturbance_predicts_what_a_sign_step_does_to_the_predictions_on_prose(loaded, rows, prose, found):
    """Second order: KL = rate^2 * gain^2 * disturbance, up to the sampling of labels; compared in double precision."""
    pieces = [prose[0].token_ids[at : at + 32] for at in range(0, len(prose[0].token_ids), 32)]
    ratios = []
    for position in POSITIONS:
        slope, weights = gradient(loaded, rows, position)
        rate, at, moved = 1e-3, 0, {}
        for name, value in weights.items():
            step = slope[at : at + value.numel()].reshape(value.shape).sign()
            moved[name], at = value.detach() - rate * step, at + value.numel()
        divergence, tokens = 0.0, 0
        for piece in (piece for piece in pieces if len(piece) > 1):
            row = [TokenRow(piece, 1)]
            before, after = (full_forward(loaded.model, w)(row).double().log_softmax(-1) for w in ({}, moved))
            divergence += F.kl_div(after, before, log_target=True, reduction="sum").item()
            tokens += len(piece) - 1
        expected = rate**2 * found[position].gain ** 2 * found[position].disturbance
        ratios.append(expected / (divergence / tokens))
    assert 0.4 < math.exp(sum(map(math.log, ratios)) / len(ratios)) < 2.5, ratios


def test_the_model_is_left_as_it_was_and_the_scores_are_reproducible(loaded, rows, prose, found):
    before = {name: value.clone() for name, value in loaded.model.state_dict().items()}
    again = {scores.position: scores for scores in probe_positions(loaded, rows, prose, POSITIONS)}
    assert again == found
    assert all(torch.equal(value, before[name]) for name, value in loaded.model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in loaded.model.parameters())


def test_the_rate_that_the_gain_gives_learns_wherever_the_position_is(loaded, rows, found):
    """A hundred steps at one nat a step learn; at a thirtieth of that rate they hardly begin."""

    def left(position, rate):
        settings = TrainingSettings(learning_rate=rate, batch_size=3, epochs=25, precision="float32")
        trained = finetune(loaded, TrainingExamples.of_rows(rows), position, settings)
        assert not trained.diverged
        return trained.losses[-1] / trained.losses[0]

    for position in (TuningPosition(0, "mlp"), TuningPosition(2, "mlp_down"), TuningPosition(1, "layer")):
        rate = 1.0 / found[position].gain
        assert left(position, rate) < 0.4 < 0.6 < left(position, rate / 30), position


@pytest.mark.parametrize("entries", [1, 8, 30, 64])
def test_every_entry_of_a_gradient_counts_and_one_of_zero_has_no_sign(monkeypatch, entries):
    monkeypatch.setattr(probe, "AT_ONCE", 3)
    generator = torch.Generator().manual_seed(entries)
    first, second = torch.randn(2, entries, generator=generator)
    first[torch.rand(entries, generator=generator) < 0.3] = 0
    signs = Signs(first)
    assert signs.dot(second) == pytest.approx(float(first.sign() @ second), abs=1e-5)
    assert signs.dot(first) == pytest.approx(signs.absolute) == float(first.abs().sum())


def test_prose_is_needed(loaded, rows):
    with pytest.raises(ValueError, match="prose"):
        probe_positions(loaded, rows, [], POSITIONS)
