"""Attention and norms of a frozen model in few operations, with hand-written gradients.

For layers that `locft.engine.llama_kernel` does not know whole.

With some hundred tokens a layer's small operations (casts, masks, repeated heads, the parts of a norm) cost more than its
matrix products, and autograd doubles them. Here they are done in place where nobody looks, and the gradient of a norm's
or a softmax's many steps is one formula. The arithmetic is that of Hugging Face's eager code, rounding included; a module
that is not recognised, or that a trial trains, computes as it always does.
"""

import sys

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

ATTENTION = "locft_fused"
"""Name of the attention among those of transformers."""
_UNUSUAL = ("softcap", "s_aux", "position_bias", "head_mask")
"""Arguments that change what attention computes: with one of them the model's own code runs."""


def fuse(model: PreTrainedModel) -> None:
    """Replace the norms of a module tree, which must be the caller's own (a view); parameters stay shared.

    The rows must come with masks of ours: (G, 1, N, N), added to the scores.
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if is_rms_norm(child):
                setattr(parent, name, FrozenRMSNorm(child))


def attention_for(model: PreTrainedModel) -> str:
    """The attention that rows with masks of ours are computed with."""
    return ATTENTION if getattr(model, "_supports_attention_backend", False) else "eager"


def is_rms_norm(module: nn.Module) -> bool:
    """Whether this computes weight * x / rms(x) as Llama's norm does: tried out on numbers, names prove nothing."""
    names = [name for name, _ in module.named_parameters()]
    if names != ["weight"] or not type(module).__name__.endswith("RMSNorm") or _epsilon(module) is None:
        return False
    weight = module.weight
    if weight.ndim != 1 or not weight.is_floating_point() or weight.device.type != "cpu":
        return False
    inputs = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    try:
        with torch.no_grad():
            return torch.equal(module(inputs), _Norm.apply(inputs, weight, _epsilon(module)))
    except (TypeError, RuntimeError):
        return False


class FrozenRMSNorm(nn.Module):
    """weight * x / rms(x), computed in float32 and rounded as the module it stands for does."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight = norm.weight
        self._frozen, self.epsilon, self._plain = (norm.weight,), _epsilon(norm), (norm,)  # in tuples: no submodules

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # (..., D) -> (..., D)
        if self.weight is self._frozen[0]:
            return _Norm.apply(inputs, self.weight, self.epsilon)
        return torch.func.functional_call(self._plain[0], {"weight": self.weight}, (inputs,))


def fused_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query (G, H, N, D), key and value (G, K, N, D), mask (G, 1, N, N), added.

    Values may be narrower than keys. Returns (G, N, H, D of the values).
    """
    if attention_mask is None or any(kwargs.get(name) is not None for name in _UNUSUAL):
        plain = sys.modules[type(module).__module__].eager_attention_forward
        return plain(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Attention.apply(query, key, value, attention_mask[..., : key.shape[2]], scale), None


AttentionInterface.register(ATTENTION, fused_attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = inputs.float()
        inverse = wide.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        normal = wide * inverse
        ctx.kept = weight, inverse, normal
        return weight * normal.to(inputs.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        weight, inverse, normal = ctx.kept
        wide = (gradient * weight).float()
        along = (wide * normal).mean(-1, keepdim=True)
        return torch.addcmul(wide, normal, along, value=-1).mul_(inverse).to(gradient.dtype), None, None


class _Attention(torch.autograd.Function):
    """Heads that share a key are computed as one longer query, so that no key is repeated."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale: float) -> torch.Tensor:
        groups, heads, tokens, width = query.shape
        shared = key.shape[1]
        long = query.reshape(groups, shared, -1, width)  # (G, K, H/K * N, D)
        scores = torch.matmul(long, key.transpose(2, 3)).mul_(scale)
        scores.view(groups, shared, -1, tokens, scores.shape[-1]).add_(mask[:, :, None])
        weights = scores.float().softmax(-1).to(query.dtype)  # the softmax of bfloat16 numbers is several times slower
        ctx.kept, ctx.scale, ctx.shape = (long, key, value, weights), scale, query.shape
        mixed = torch.matmul(weights, value).view(groups, heads, tokens, -1)  # values may be narrower than keys
        return mixed.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        long, key, value, weights = ctx.kept
        back = gradient.transpose(1, 2).reshape(*long.shape[:-1], value.shape[-1])
        scores = torch._softmax_backward_data(torch.matmul(back, value.transpose(2, 3)), weights, -1, weights.dtype)
        scores = scores.mul_(ctx.scale)
        by_query = torch.matmul(scores, key).view(ctx.shape)
        by_key = torch.matmul(scores.transpose(2, 3), long)
        return by_query, by_key, torch.matmul(weights.transpose(2, 3), back), None, None


def _epsilon(norm: nn.Module) -> float | None:
    return getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
