"""The views give what the full forward gives, and leave the model alone. (`test_every_type.py` tries every architecture.)

The reference is the model's own full forward with substituted weights. Differences are expected to be exactly 0 on a
CPU: the same operations run on the same numbers in the same order.
"""

import copy
import inspect
from functools import lru_cache

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call
from transformers import PreTrainedModel

from locft.engine.tail import capture_boundary, head_view, supports_tail, tail_hidden, tail_view
from locft.errors import InputError
from locft.model.positions import TuningPosition, decoder_layers, n_layers, parameter_names
from tests.tiny import ARCHITECTURES, tiny_model

LENGTHS = (12, 9, 5, 12)
VOCABULARY = 400

# Settings that change what happens around the blocks, beyond the plain configuration of each architecture.
VARIANTS = {
    "falcon with alibi": ("falcon", dict(alibi=True)),
    "falcon, new decoder": ("falcon", dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon, sequential": ("falcon", dict(parallel_attn=False)),
    "gpt_neox, sequential": ("gpt_neox", dict(use_parallel_residual=False)),
    "gpt2, scaled by layer": ("gpt2", dict(scale_attn_by_inverse_layer_idx=True)),
    "opt, projected embeddings": ("opt", dict(word_embed_proj_dim=16, do_layer_norm_before=False)),
    "llama, dynamic positions": (
        "llama",
        dict(max_position_embeddings=8, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
    ),
    "llama, tied head": ("llama", dict(tie_word_embeddings=True)),
    "llama, eager attention": ("llama", dict(attn_implementation="eager")),
    "qwen2, sliding upper layers": (
        "qwen2",
        dict(use_sliding_window=True, sliding_window=4, layer_types=["full_attention"] + ["sliding_attention"] * 2),
    ),
    "mixtral, router logits": ("mixtral", dict(output_router_logits=True)),
}


@lru_cache(maxsize=2)
def model_of(case: str) -> PreTrainedModel:
    architecture, settings = VARIANTS.get(case, (case, {}))
    return tiny_model(architecture, **settings)


def padded_batch(side: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Token ids and mask (B, T), and the position ids that left padding calls for."""
    generator = torch.Generator().manual_seed(1)
    longest = max(LENGTHS)
    ids = torch.randint(1, VOCABULARY, (len(LENGTHS), longest), generator=generator)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(LENGTHS):
        mask[row, :length] = 1
    if side == "right":
        return ids * mask, mask, None
    mask = mask.flip(1)
    return ids * mask, mask, (mask.cumsum(1) - 1).clamp(min=0)


def full_logits(model, weights, ids, mask, positions):
    """(B, T, V), the reference."""
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    if positions is not None and "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = positions
    return functional_call(model, weights, kwargs=inputs).logits.float()


def edited_weights(model: PreTrainedModel, layer: int) -> dict[str, torch.Tensor]:
    """Every parameter of a layer, a little off."""
    generator = torch.Generator().manual_seed(2)
    return {
        name: (value + 0.05 * torch.randn(value.shape, generator=generator)).requires_grad_()
        for name in parameter_names(model, TuningPosition(layer, "layer"))
        for value in [model.get_parameter(name).detach().clone()]
    }


def compare(model: PreTrainedModel, layer: int, side: str) -> None:
    """Logits and gradients of all the layer's parameters: tail against full forward, at tokens that are no padding."""
    ids, mask, positions = padded_batch(side)
    weights = edited_weights(model, layer)
    real = mask.bool()
    targets = ids[real].roll(-1)  # (K,)

    expected = full_logits(model, weights, ids, mask, positions)[real]  # (K, V)
    expected_gradients = torch.autograd.grad(F.cross_entropy(expected, targets), list(weights.values()))

    boundary = capture_boundary(model, layer, ids, mask, positions)[layer]  # (B, T, D)
    before = boundary.clone()
    tail = tail_view(model, layer)
    hidden = tail_hidden(tail, boundary, mask, positions, weights)
    logits = head_view(model)(hidden[real])  # (K, V)
    gradients = torch.autograd.grad(F.cross_entropy(logits, targets), list(weights.values()))

    assert logits.dtype == torch.float32 and logits.requires_grad
    assert torch.equal(boundary, before), "the stored boundary was written to"
    unedited = full_logits(model, {}, ids, mask, positions)[real]
    assert (expected - unedited).abs().max() > 1e-3, "the edit has no effect, the comparison would mean nothing"
    assert sum(gradient.abs().max() > 0 for gradient in expected_gradients) >= len(gradients) / 2
    assert (logits - expected).abs().max() == 0
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert (gradient - wanted).abs().max() == 0


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize("case", [*ARCHITECTURES, *VARIANTS])
def test_tail_equals_full_forward(case, layer, side):
    model = model_of(case)
    assert supports_tail(model) is None
    compare(model, layer, side)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mamba"])
def test_tail_in_bfloat16(architecture):
    model = copy.deepcopy(model_of(architecture)).to(torch.bfloat16)
    ids, mask, positions = padded_batch("right")
    boundary = capture_boundary(model, 1, ids, mask)[1]
    # mamba carries its residual stream in float32 whatever the dtype of its weights, and the boundary keeps it so
    assert boundary.dtype == (torch.float32 if architecture == "mamba" else torch.bfloat16)
    hidden = tail_hidden(tail_view(model, 1), boundary, mask)
    logits = head_view(model)(hidden[mask.bool()])
    assert logits.dtype == torch.float32
    assert torch.equal(logits, full_logits(model, {}, ids, mask, positions)[mask.bool()])


def snapshot(model: PreTrainedModel) -> dict:
    """All that a view must not change: every object of the module tree, its state, and the configuration."""
    return {
        "modules": [(name, id(part)) for name, part in model.named_modules()],
        "tensors": [(name, id(t), t._version) for name, t in (*model.named_parameters(), *model.named_buffers())],
        "hooks": [len(part._forward_pre_hooks) + len(part._forward_hooks) for part in model.modules()],
        "attributes": [sorted(vars(part)) for part in model.modules()],
        "config": (id(model.config), model.config.to_dict()),
        "layers": (len(decoder_layers(model)), model.training),
    }


@pytest.mark.parametrize("case", ARCHITECTURES)
def test_the_model_stays_as_it_was(case):
    model = model_of(case)
    before, values = snapshot(model), [parameter.detach().clone() for parameter in model.parameters()]
    ids, mask, positions = padded_batch("right")
    boundaries = capture_boundary(model, [2, 0], ids, mask, positions)
    weights = edited_weights(model, 2)
    tail = tail_view(model, 2)
    hidden = tail_hidden(tail, boundaries[2], mask, positions, weights)
    torch.autograd.grad(head_view(model)(hidden[:, -1]).sum(), list(weights.values()))
    tail.get_submodule(parameter_path(tail)).register_forward_hook(lambda *_: None)
    assert snapshot(model) == before
    assert all(torch.equal(a, b) for a, b in zip(values, model.parameters(), strict=True))


def parameter_path(tail: PreTrainedModel) -> str:
    return next(name for name, _ in tail.named_parameters() if ".2." in name).rpartition(".")[0]


@pytest.mark.parametrize("case", ["llama", "gpt2", "opt", "qwen2_moe", "rwkv"])
def test_a_tail_shares_every_parameter(case):
    model = model_of(case)
    parameters = dict(model.named_parameters())
    tail = tail_view(model, 1)
    own = dict(tail.named_parameters())
    assert n_layers(tail) == n_layers(model) and not any(".0." in name for name in own)
    for name in parameter_names(model, TuningPosition(2, "layer")):
        assert own[name] is parameters[name]
    assert all(any(value is parameter for parameter in parameters.values()) for value in own.values())


def test_substituted_weights_never_reach_the_model():
    """While a tail runs with other weights, the model's own modules keep theirs: the views share no module object."""
    model = model_of("llama")
    ids, mask, _ = padded_batch("right")
    tail = tail_view(model, 1)
    seen = []
    weight = model.model.layers[1].mlp.down_proj.weight
    own = tail.model.layers[1].mlp.down_proj
    own.register_forward_hook(lambda *_: seen.append(model.model.layers[1].mlp.down_proj.weight is weight))
    name = "model.layers.1.mlp.down_proj.weight"
    tail_hidden(tail, capture_boundary(model, 1, ids, mask)[1], mask, weights={name: weight.detach() + 1})
    assert seen == [True]


def test_boundaries_of_several_layers_from_one_forward():
    model = model_of("qwen3")
    ids, mask, _ = padded_batch("right")
    together = capture_boundary(model, range(3), ids, mask)
    assert list(together) == [0, 1, 2]
    for layer in range(3):
        assert torch.equal(together[layer], capture_boundary(model, layer, ids, mask)[layer])
        assert not together[layer].requires_grad
    assert torch.equal(together[0], model.get_input_embeddings()(ids))


def test_head_on_a_few_positions():
    """Soft-capping and logit scales are part of the head; how many rows it is given changes nothing but rounding."""
    for case in ("gemma2", "cohere", "granite", "gptj"):
        model = model_of(case)
        ids, mask, _ = padded_batch("right")
        expected = full_logits(model, {}, ids, mask, None)
        hidden = tail_hidden(tail_view(model, 2), capture_boundary(model, 2, ids, mask)[2], mask)
        logits = head_view(model)(hidden[[0, 3], [11, 4]])
        assert logits.shape == (2, VOCABULARY)
        torch.testing.assert_close(logits, expected[[0, 3], [11, 4]], rtol=1e-5, atol=1e-6)


def test_layer_out_of_range():
    model = model_of("llama")
    ids, mask, _ = padded_batch("right")
    for layer, call in ((4, lambda: tail_view(model, 4)), (3, lambda: capture_boundary(model, [0, 3], ids, mask))):
        with pytest.raises(InputError, match=f"layer {layer} is out of range.*0 to 2"):
            call()


def test_the_view_behind_the_last_layer_is_norm_and_head():
    model = model_of("llama")
    hidden = torch.randn(1, 2, model.config.hidden_size)
    tail = tail_view(model, 3)
    assert [name for name, _ in tail.named_parameters() if "layers" in name] == []
    with torch.no_grad():
        assert torch.equal(tail_hidden(tail, hidden, torch.ones(1, 2, dtype=torch.long)), model.model.norm(hidden))


def test_models_without_a_tail_say_why():
    assert "rescale_every is 2" in supports_tail(tiny_model("rwkv", rescale_every=2))
    dispatched = tiny_model("llama")
    dispatched.model.layers[1].forward = dispatched.model.layers[1].forward
    assert "model.layers.1" in supports_tail(dispatched)


def test_tail_of_a_tail():
    """A view is a model like any other: lower it again and the result is the same."""
    model = model_of("gemma3_text")
    ids, mask, _ = padded_batch("right")
    boundary = capture_boundary(model, 2, ids, mask)[2]
    twice = tail_view(tail_view(model, 1), 2)
    assert torch.equal(tail_hidden(twice, boundary, mask), tail_hidden(tail_view(model, 2), boundary, mask))
