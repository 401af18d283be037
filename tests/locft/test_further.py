"""Ordinary fine-tuning after an edit."""

import pytest
import torch

from locft.errors import InputError
from locft.further import RATE, further_trained
from locft.model.delta import EditDelta, applied
from locft.train.token_rows import TokenRow
from tests.tiny import tiny_loaded

NAME = "model.layers.1.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded()


@pytest.fixture(scope="module")
def delta(loaded) -> EditDelta:
    shape = loaded.model.get_parameter(NAME).shape
    return EditDelta("1.mlp_down", loaded.fingerprint, {NAME: 0.1 * torch.ones(shape)})


ROWS = [TokenRow(tuple((7 * at + place) % 400 for place in range(128)), 1) for at in range(4)]


def test_no_steps_leave_the_edit_alone(loaded, delta):
    found = further_trained(loaded, delta, ROWS, 0, "float32", 0)
    assert {name for name, value in found.tensors.items() if value.any()} == {NAME}
    assert torch.allclose(found.tensors[NAME], delta.tensors[NAME], atol=1e-6)


def test_steps_are_those_of_a_plain_loop(loaded, delta):
    """Two steps of AdamW written out by hand; with 8 windows at hand every step takes all of them."""
    windows = torch.tensor([row.token_ids[at : at + 64] for row in ROWS for at in (0, 64)])
    found = further_trained(loaded, delta, ROWS, 2, "float32", 0)
    before = {name: value.detach().clone() for name, value in loaded.model.named_parameters()}
    with applied(loaded, delta):
        weights = {name: value.detach().clone() for name, value in loaded.model.named_parameters()}
    first, second = ({name: torch.zeros_like(value) for name, value in weights.items()} for _ in range(2))
    for step in (1, 2):
        own = {name: value.clone().requires_grad_() for name, value in weights.items()}
        logits = torch.func.functional_call(loaded.model, own, kwargs={"input_ids": windows}).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), windows[:, 1:].flatten())
        gradients = dict(zip(own, torch.autograd.grad(loss, list(own.values())), strict=True))
        norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
        rate = RATE * (1 - (step - 1) / 2)
        for name, gradient in gradients.items():
            gradient = gradient * min(1.0, 1.0 / float(norm))
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            mean, square = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            weights[name] = weights[name] - rate * mean / (square.sqrt() + 1e-8)
    for name, value in weights.items():
        assert torch.allclose(before[name] + found.tensors[name], value, atol=5e-6), name
    after = dict(loaded.model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items()), "the model stays as it was"


def test_the_same_seed_draws_the_same_windows(loaded, delta):
    many = [TokenRow(tuple((3 * at + place) % 400 for place in range(64)), 1) for at in range(40)]
    one, same, other = (further_trained(loaded, delta, many, 2, "float32", seed).tensors[NAME] for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_text_that_is_too_short_is_refused(loaded, delta):
    with pytest.raises(InputError, match=r"further_steps: no text of 64 tokens"):
        further_trained(loaded, delta, [TokenRow((1, 2, 3), 1)], 1, "float32", 0)
