"""Layers of a frozen model as one operation, against the layers' own code."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import (
    LlamaRMSNorm,
    eager_attention_forward,
)

from locft.engine import model_views
from locft.engine.fused_layers import fuse_layers, only_at
from locft.engine.llama_kernel import FrozenRMSNorm, attention
from locft.engine.tail import tail_view
from locft.engine.tail_engine import TailEngine
from locft.model.positions import decoder_layers
from locft.train.encoding import encode_edit
from locft.train.objective import batch_loss
from tests.locft.engine.test_tail_engine import TEXTS
from tests.tiny import ARCHITECTURES, tiny_loaded, tiny_model, tiny_tokenizer

FUSED = {"llama", "mistral", "qwen2"}
BETWEEN = "model.layers.1.mlp.gate_proj.weight"
"""Of the middle layer of three."""


def computing(loaded, dtype):
    """A new engine, the forward from the middle layer on, and the tree it computes with."""
    rows = [encode_edit(tiny_tokenizer(), prompt, target) for prompt, target in TEXTS]
    engine = TailEngine(loaded, rows, on_disk=False)
    return rows, engine.forward(1, dtype), engine.views(dtype).model


def outcome(loaded, dtype):
    rows, forward, _ = computing(loaded, dtype)
    weight = (loaded.model.get_parameter(BETWEEN).detach() + 0.01).requires_grad_()
    logits = forward({BETWEEN: weight})(rows)
    return logits.detach(), *torch.autograd.grad(batch_loss(logits, rows, "edit"), weight)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_which_layers_are_recognised(architecture):
    if engine_packs(loaded := tiny_loaded(architecture)):
        kinds = {type(layer).__name__ for layer in decoder_layers(computing(loaded, torch.float32)[2])}
        assert all(kind.startswith("Fused") for kind in kinds) == (architecture in FUSED), kinds
    own = {type(layer).__name__ for layer in decoder_layers(loaded.model)}
    assert not any(kind.startswith("Fused") for kind in own), "the model itself is left alone"


def engine_packs(loaded):
    rows = [encode_edit(tiny_tokenizer(), prompt, target) for prompt, target in TEXTS]
    return TailEngine(loaded, rows, on_disk=False).limit > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_logits_and_gradients_are_those_of_the_layers_own_code(architecture, dtype, tolerance, monkeypatch):
    loaded = tiny_loaded(architecture)
    assert all(type(layer).__name__.startswith("Fused") for layer in decoder_layers(computing(loaded, dtype)[2]))
    found = outcome(loaded, dtype)
    monkeypatch.setattr(model_views, "fuse_layers", lambda model: None)
    expected = outcome(loaded, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_a_last_layer_that_computes_few_tokens_computes_them_the_same(architecture, dtype, tolerance, monkeypatch):
    loaded, shapes = tiny_loaded(architecture), []
    monkeypatch.setattr(
        model_views, "only_at", lambda layer, places: shapes.append(places.shape) or only_at(layer, places)
    )
    found = outcome(loaded, dtype)
    assert shapes, "the rows ask for few of their tokens"
    monkeypatch.setattr(model_views, "only_at", lambda layer, places: nullcontext())
    expected = outcome(loaded, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_a_fused_layer_gives_the_places_asked_for_and_their_gradient(architecture):
    layer = decoder_layers(computing(tiny_loaded(architecture), torch.float32)[2])[2]
    generator = torch.Generator().manual_seed(0)
    width, places = len(layer.fused_parts.first.weight), torch.tensor([[1, 4, 5], [0, 3, 0]])
    angles = torch.randn(2, 6, layer.fused_parts.width // 2, generator=generator).repeat(1, 1, 2)
    later = torch.ones(6, 6, dtype=torch.bool).triu(1).expand(2, 1, 6, 6)
    how = {
        "attention_mask": torch.zeros(2, 1, 6, 6).masked_fill_(later, torch.finfo(torch.float32).min),
        "position_embeddings": (angles.cos(), angles.sin()),
    }
    states = torch.randn(2, 6, width, generator=generator).requires_grad_()
    probe = torch.randn(2, 3, width, generator=generator)
    whole = layer(states, **how)[torch.arange(2)[:, None], places]
    with only_at(layer, places):
        few = layer(states, **how)
    assert few.shape == (2, 3, width) and layer(states, **how).shape == (2, 6, width)
    torch.testing.assert_close(few, whole)
    torch.testing.assert_close(*(torch.autograd.grad(found, states, probe)[0] for found in (few, whole)))


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
    kinds = [type(layer).__name__ for layer in decoder_layers(computing(loaded, torch.float32)[2])]
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


class Module:
    """What attention asks of the module it belongs to."""

    training = False
    num_key_value_groups = 3


@DTYPES
def test_attention_gives_the_same_numbers_and_gradients(dtype, tolerance):
    torch.manual_seed(1)
    groups, heads, shared, tokens, width = 2, 6, 2, 11, 8
    query, key, value = (
        torch.randn(groups, n, tokens, width).to(dtype).requires_grad_() for n in (heads, shared, shared)
    )
    visible = torch.rand(groups, 1, tokens, tokens) < 0.5
    visible |= torch.eye(tokens, dtype=torch.bool)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, torch.finfo(dtype).min)
    expected = eager_attention_forward(Module(), query, key, value, mask, scaling=0.3)[0]
    found = attention(Module(), query, key, value, mask, scaling=0.3)[0]
    assert found.shape == (groups, tokens, heads, width) and close(found, expected, tolerance)
    weights = torch.randn(expected.shape).to(dtype)
    pairs = zip(*(torch.autograd.grad(out, (query, key, value), weights) for out in (found, expected)), strict=True)
    assert all(close(ours, theirs, tolerance) for ours, theirs in pairs)
