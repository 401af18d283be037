"""Layers of a frozen model as one operation, against the layers' own code."""

from contextlib import nullcontext

import pytest
import torch

from locft.engine import tail_engine as engine_module
from locft.train.encoding import encode_edit
from locft.engine.tail_engine import TailEngine
from locft.train.objective import batch_loss
from locft.engine.packed_linear import FrozenLinear
from locft.engine.llama_kernel import fuse_layers, only_at
from locft.model.positions import decoder_layers
from locft.engine.tail import tail_view
from tests.locft.engine.test_tail_engine import TEXTS
from tests.tiny import ARCHITECTURES, tiny_loaded, tiny_model, tiny_tokenizer

FUSED = {"llama", "mistral", "qwen2"}
BETWEEN = "model.layers.1.mlp.gate_proj.weight"
"""Of the middle layer of three."""


def computing(loaded, dtype):
    """A new engine, the forward from the middle layer on, and the tree it computes with."""
    rows = [encode_edit(tiny_tokenizer(), prompt, target) for prompt, target in TEXTS]
    engine = TailEngine(loaded, rows, on_disk=False)
    return rows, engine.forward(1, dtype), engine._computing_in(dtype).model


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


def test_only_layers_that_are_computed_keep_their_weights_in_more_layouts():
    """Each layer is tried out when the engine is made: what that packs is two further copies of its weights, twice."""
    loaded = tiny_loaded("llama")
    rows, forward, tree = computing(loaded, torch.bfloat16)
    if not any(isinstance(module, FrozenLinear) for module in tree.modules()):
        pytest.skip("this PyTorch packs no weights")

    def layouts():
        held = []
        for layer in decoder_layers(tree):
            linears = [module.packed for module in layer.modules() if isinstance(module, FrozenLinear)]
            held.append(sum(len(p._layouts) for p in [*(product.packed for product in layer.fused_parts.products), *linears]))
        return held

    assert layouts() == [0, 0, 0]
    weight = loaded.model.get_parameter(BETWEEN).detach().clone().requires_grad_()
    forward({BETWEEN: weight})(rows).sum().backward()
    below, trained, above = layouts()
    assert below == 0 and trained > 0 and above > 0


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_logits_and_gradients_are_those_of_the_layers_own_code(architecture, dtype, tolerance, monkeypatch):
    loaded = tiny_loaded(architecture)
    assert all(type(layer).__name__.startswith("Fused") for layer in decoder_layers(computing(loaded, dtype)[2]))
    found = outcome(loaded, dtype)
    monkeypatch.setattr(engine_module, "fuse_layers", lambda model: None)
    expected = outcome(loaded, dtype)
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() <= tolerance * theirs.norm()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
@pytest.mark.parametrize("architecture", sorted(FUSED))
def test_a_last_layer_that_computes_few_tokens_computes_them_the_same(architecture, dtype, tolerance, monkeypatch):
    loaded, shapes = tiny_loaded(architecture), []
    monkeypatch.setattr(engine_module, "only_at", lambda layer, places: shapes.append(places.shape) or only_at(layer, places))
    found = outcome(loaded, dtype)
    assert shapes, "the rows ask for few of their tokens"
    monkeypatch.setattr(engine_module, "only_at", lambda layer, places: nullcontext())
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


def test_a_layer_that_computes_something_else_keeps_its_own_code():
    view = tail_view(tiny_model("llama"), 0)
    layers = decoder_layers(view)
    fuse_layers(view)
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == ["LlamaDecoderLayer"] * 3, "its norms are not frozen ones"


def test_a_part_of_another_kind_is_noticed_by_its_numbers():
    loaded = tiny_loaded("llama")
    decoder_layers(loaded.model)[2].mlp.act_fn = torch.nn.GELU()
    kinds = [type(layer).__name__ for layer in decoder_layers(computing(loaded, torch.float32)[2])]
    assert kinds == ["FusedLlamaDecoderLayer", "FusedLlamaDecoderLayer", "LlamaDecoderLayer"]
