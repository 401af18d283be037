"""Layers of a frozen model as one operation, against the layers' own code."""

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from locft.engine import model_views
from locft.engine.llama_kernel import FrozenRMSNorm, fuse_layers
from locft.engine.tail import tail_view
from locft.engine.tail_engine import TailEngine
from locft.model.positions import decoder_layers
from locft.train.objective import batch_loss
from tests.locft.engine.test_tail_engine import edit_rows
from tests.tiny import ARCHITECTURES, tiny_loaded, tiny_model

FUSED = {"llama", "mistral", "qwen2"}
BETWEEN = "model.layers.1.mlp.gate_proj.weight"
"""Of the middle layer of three."""


def computing(loaded, dtype):
    """A new engine, the forward from the middle layer on, and the layers it computes with."""
    engine = TailEngine(loaded, edit_rows(), on_disk=False)
    return engine, engine.forward(1, dtype), decoder_layers(engine.views(dtype).model)


def outcome(loaded, dtype):
    (_, forward, _), rows = computing(loaded, dtype), edit_rows()
    weight = (loaded.model.get_parameter(BETWEEN).detach() + 0.01).requires_grad_()
    logits = forward({BETWEEN: weight})(rows)
    return logits.detach(), *torch.autograd.grad(batch_loss(logits, rows, "edit"), weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_layers_are_recognised(architecture):
    loaded = tiny_loaded(architecture)
    engine, _, layers = computing(loaded, torch.float32)
    if engine.limit > 0:  # it packs
        kinds = {type(layer).__name__ for layer in layers}
        assert all(kind.startswith("Fused") for kind in kinds) == (architecture in FUSED), kinds
    own = {type(layer).__name__ for layer in decoder_layers(loaded.model)}
    assert not any(kind.startswith("Fused") for kind in own), "the model itself is left alone"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_logits_and_gradients_are_those_of_the_layers_own_code(architecture, dtype, tolerance, monkeypatch):
    loaded = tiny_loaded(architecture)
    assert all(type(layer).__name__.startswith("Fused") for layer in computing(loaded, dtype)[2])
    found = outcome(loaded, dtype)
    monkeypatch.setattr(model_views, "fuse_layers", lambda model: None)
    expected = outcome(loaded, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


def test_a_layer_whose_norms_compute_something_else_keeps_its_own_code():
    model = tiny_model("llama")
    for layer in decoder_layers(model):
        layer.input_layernorm = nn.LayerNorm(len(layer.input_layernorm.weight), bias=False).requires_grad_(False)
    view = tail_view(model, 0)
    fuse_layers(view)
    assert [type(layer).__name__ for layer in decoder_layers(view)] == ["LlamaDecoderLayer"] * 3
    assert not any(isinstance(module, FrozenRMSNorm) for module in view.modules())


def test_a_part_of_another_kind_is_noticed_by_its_numbers():
    loaded = tiny_loaded("llama")
    decoder_layers(loaded.model)[2].mlp.act_fn = torch.nn.GELU()
    kinds = [type(layer).__name__ for layer in computing(loaded, torch.float32)[2]]
    assert kinds == ["FusedLlamaDecoderLayer", "FusedLlamaDecoderLayer", "LlamaDecoderLayer"]


DTYPES = pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])


def norm_of(dtype):
    norm = LlamaRMSNorm(48, eps=1e-5)
    with torch.no_grad():
        norm.weight.copy_(torch.rand(48) + 0.5)
    return norm.to(dtype).requires_grad_(False)


def close(found, expected, tolerance):
    return (found - expected).float().norm() <= tolerance * expected.float().norm()


@DTYPES
def test_a_norm_gives_the_same_numbers_and_gradients(dtype, tolerance):
    torch.manual_seed(0)
    norm = norm_of(dtype)
    inputs = (torch.randn(2, 7, 48) * torch.tensor([1e-3, 30.0])[:, None, None]).to(dtype).requires_grad_()
    expected, found = norm(inputs), FrozenRMSNorm(norm)(inputs)
    assert torch.equal(found, expected)
    weights = torch.randn(expected.shape).to(dtype)
    gradients = [torch.autograd.grad(out, inputs, weights)[0] for out in (found, expected)]
    for each in (0, 1):
        assert close(gradients[0][each], gradients[1][each], tolerance)


def test_a_norm_that_is_trained_has_a_gradient():
    norm = FrozenRMSNorm(norm_of(torch.float32))
    assert [name for name, _ in norm.named_parameters()] == ["weight"]
    weight = torch.rand(48).requires_grad_()
    out = torch.func.functional_call(norm, {"weight": weight}, (torch.randn(3, 48),))
    assert torch.autograd.grad(out.sum(), weight)[0].abs().sum() > 0
