"""Attention and norms in few operations, against the modules they stand for."""

import pytest
import torch
from torch import nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, eager_attention_forward

from locft.engine.fused_attention import FrozenRMSNorm, attention_for, fused_attention, is_rms_norm
from tests.tiny import tiny_model

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
    assert is_rms_norm(norm)
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


def test_only_what_computes_the_same_is_replaced():
    assert not is_rms_norm(nn.LayerNorm(48)) and not is_rms_norm(nn.RMSNorm(48, elementwise_affine=False))
    gemma = Gemma2RMSNorm(48)  # its weight counts from one
    with torch.no_grad():
        gemma.weight.copy_(torch.rand(48))
    assert not is_rms_norm(gemma)


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
    found = fused_attention(Module(), query, key, value, mask, scaling=0.3)[0]
    assert found.shape == (groups, tokens, heads, width) and close(found, expected, tolerance)
    weights = torch.randn(expected.shape).to(dtype)
    pairs = zip(*(torch.autograd.grad(out, (query, key, value), weights) for out in (found, expected)), strict=True)
    assert all(close(ours, theirs, tolerance) for ours, theirs in pairs)


def test_models_whose_attention_has_no_interface_keep_their_own():
    assert attention_for(tiny_model("llama")) == "locft_fused"
    assert attention_for(tiny_model("mamba")) == "eager"
