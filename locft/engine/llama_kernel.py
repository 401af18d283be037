"""A layer of a frozen Llama-like model as one operation with a hand-written gradient.

With some hundred tokens, most of a step is not matrix products but what lies between them: casts, transposed and
repeated heads, and autograd's record of each. Here a layer is some thirty operations forward and as many backward, and
the products that take the same input (queries, keys and values; gate and up) are one. The arithmetic is that of Hugging
Face's eager code, rounding included. `locft.engine.fused_layers` says which layers are computed so.

Without a gradient, a layer in bfloat16 also takes hidden states in float32 and adds to them in float32: rounding the
sum of all layers again and again is most of what bfloat16 loses.

In the last layer only the tokens that predict something matter. There (`LayerParts.places`) keys and values are
computed for all tokens, everything else for those alone.

Legend: G sequences, N tokens of each, D width, H heads, K of them with keys of their own, W width of a head, F inner
width, Q tokens of each sequence that are computed, usually all N.
"""

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask


class LayerParts:
    """What the fused operation needs of a layer."""

    def __init__(self, layer: Any):  # its parts are those of a Llama layer
        attention, mlp = layer.self_attn, layer.mlp
        self.first, self.second = FrozenNorm(layer.input_layernorm), FrozenNorm(layer.post_attention_layernorm)
        self.query = JoinedLinears([attention.q_proj])
        self.key_value = JoinedLinears([attention.k_proj, attention.v_proj])
        self.qkv = JoinedLinears([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = JoinedLinears([attention.o_proj])
        self.gate_up = JoinedLinears([mlp.gate_proj, mlp.up_proj])
        self.down = JoinedLinears([mlp.down_proj])
        self.width: int = attention.head_dim
        self.heads: int = attention.q_proj.weight.shape[0] // self.width
        self.shared: int = attention.k_proj.weight.shape[0] // self.width
        self.scale: float = attention.scaling
        self.dtype: torch.dtype = attention.q_proj.weight.dtype
        self.parameters = tuple(layer.parameters())
        self.places: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: Any) -> "LayerParts | None":
        """None for a layer that lacks a part, or has one more."""
        try:
            parts = cls(layer)
        except AttributeError:
            return None
        products = (parts.qkv, parts.out, parts.gate_up, parts.down)
        known = [*(w for p in products for w in p.parameters), parts.first.weight, parts.second.weight]
        return parts if {id(p) for p in known} == {id(p) for p in parts.parameters} else None

    def unchanged(self, layer: Any) -> bool:
        """True if no parameter of the layer is substituted."""
        return all(now is then for now, then in zip(layer.parameters(), self.parameters, strict=True))


class FrozenNorm:
    """weight * x / rms(x) as part of the fused operation, computed in float32."""

    def __init__(self, norm: Any):
        self.weight, self.epsilon = norm.weight, _epsilon(norm)  # (D,)

    def forward(self, inputs: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
        """What the gradient needs, and the output."""
        wide = inputs.float()
        length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = length.square_().div_(inputs.shape[-1]).add_(self.epsilon).rsqrt_()
        normal = wide * inverse
        return (normal, inverse), normal.to(self.weight.dtype) * self.weight

    def backward(self, gradient: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        normal, inverse = kept
        wide = gradient * self.weight.float()
        along = (wide * normal).mean(-1, keepdim=True)
        return wide.addcmul_(normal, along, value=-1).mul_(inverse).to(gradient.dtype)


class FrozenRMSNorm(nn.Module):
    """weight * x / rms(x) as a module, rounded exactly as the one it stands for."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight: torch.Tensor = norm.weight
        self.epsilon = _epsilon(norm)
        self._frozen, self._plain = (norm.weight,), (norm,)  # in tuples: no parameters or modules of this one

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # (..., D) -> (..., D)
        if self.weight is self._frozen[0]:
            return _RMSNormFunction.apply(inputs, self.weight, self.epsilon)
        return torch.func.functional_call(self._plain[0], {"weight": self.weight}, (inputs,))


class JoinedLinears:
    """Linear layers that take the same input, side by side: (T, in) -> (T, out of all)."""

    def __init__(self, linears: Sequence[Any]):
        self.weights: list[torch.Tensor] = [linear.weight for linear in linears]
        self.biases: list[torch.Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        self.parameters = [*self.weights, *self.biases]
        ends = list(itertools.accumulate(weight.shape[0] for weight in self.weights))
        self.columns = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        if len(self.biases) not in (0, len(linears)):
            raise AttributeError("only some of the linear layers have a bias")

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product = inputs.new_empty(len(inputs), self.columns[-1].stop)
        for weight, columns in zip(self.weights, self.columns, strict=True):
            torch.mm(inputs, weight.t(), out=product[:, columns])
        return product.add_(torch.cat(self.biases)) if self.biases else product

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        product = gradient[:, self.columns[0]] @ self.weights[0]
        for weight, columns in zip(self.weights[1:], self.columns[1:], strict=True):
            product.addmm_(gradient[:, columns], weight)
        return product


class MaskAndRotary:
    """Mask and rotary angles as the operation needs them. All layers of a pass share them: the last ones are kept."""

    _last: "MaskAndRotary | None" = None

    def __init__(self, given: tuple[torch.Tensor, ...], dtype: torch.dtype):
        mask, cos, sin = self.given = given
        self.dtype = dtype
        self.mask = mask.float()[:, :, None]  # (G, 1, 1, N, N)
        half = sin.shape[-1] // 2
        self.cos = cos.to(dtype)[:, :, None]  # (G, N, 1, W)
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), -1).to(dtype)[:, :, None]  # as `rotate_half` turns
        self.back = -self.sin

    @classmethod
    def of(cls, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> "MaskAndRotary":
        last, given = cls._last, (mask, cos, sin)
        if last is None or last.dtype != dtype or any(a is not b for a, b in zip(last.given, given, strict=True)):
            last = cls._last = cls(given, dtype)
        return last

    def at(self, places: torch.Tensor) -> "MaskAndRotary":
        """Those of the tokens at the places (G, Q); their mask is (G, 1, 1, Q, N)."""
        chosen, group = copy.copy(self), torch.arange(len(places), device=places.device)[:, None]
        chosen.mask = self.mask[group, 0, 0, places][:, None, None]
        chosen.cos, chosen.sin, chosen.back = (angles[group, places] for angles in (self.cos, self.sin, self.back))
        return chosen


class FusedLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, rotary: MaskAndRotary, parts: LayerParts, places: torch.Tensor | None) -> torch.Tensor:
        groups, tokens, _ = hidden.shape
        heads, shared, width = parts.heads, parts.shared, parts.width
        stream = hidden.reshape(groups * tokens, -1)
        first, entering = parts.first.forward(stream)
        asked = None
        if places is None:
            asking, qkv = rotary, parts.qkv.forward(entering).view(groups, tokens, -1, width)
            _rotate(qkv[:, :, : heads + shared], rotary.cos, rotary.sin)
            query, key_value = qkv[:, :, :heads], qkv[:, :, heads:]
        else:
            asked = (torch.arange(groups, device=places.device)[:, None] * tokens + places).flatten()
            asking, stream = rotary.at(places), stream[asked]
            query = parts.query.forward(entering[asked]).view(groups, -1, heads, width)
            key_value = parts.key_value.forward(entering).view(groups, tokens, -1, width)
            _rotate(query, asking.cos, asking.sin)
            _rotate(key_value[:, :, :shared], rotary.cos, rotary.sin)
        count = query.shape[1]
        query = _by_head(query, shared)  # (G * K, H/K * Q, W)
        key = _by_head(key_value[:, :, :shared], shared)  # (G * K, N, W)
        value = _by_head(key_value[:, :, shared:], shared)
        scores = torch.bmm(query, key.transpose(1, 2)).view(groups, shared, -1, count, tokens)
        wide = torch.add(asking.mask, scores, alpha=parts.scale)
        weights = wide.softmax(-1).to(parts.dtype).view(query.shape[0], -1, tokens)
        mixed = _by_token(torch.bmm(weights, value), groups, count)
        middle = _plus(parts.out.forward(mixed.view(groups * count, -1)), stream)
        second, entering = parts.second.forward(middle)
        gate_up = parts.gate_up.forward(entering)
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.parts, ctx.rotary, ctx.asking, ctx.asked, ctx.shape = parts, rotary, asking, asked, hidden.shape
        ctx.kept = first, query, key, value, weights, second, gate_up, active
        return _plus(parts.down.forward(active * up), middle).view(groups, count, -1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, query, key, value, weights, second, gate_up, active = ctx.kept
        parts, (groups, tokens, _), count = ctx.parts, ctx.shape, gradient.shape[1]
        heads, shared, width = parts.heads, parts.shared, parts.width
        above = gradient.reshape(groups * count, -1)
        gate, up = gate_up.chunk(2, dim=-1)
        inner, by_gate_up = parts.down.backward(above), torch.empty_like(gate_up)
        by_gate, by_up = by_gate_up.chunk(2, dim=-1)
        torch.mul(inner, active, out=by_up)
        torch.ops.aten.silu_backward.grad_input(inner.mul_(up), gate, grad_input=by_gate)
        middle = parts.second.backward(parts.gate_up.backward(by_gate_up), second).add_(above)
        back = _by_head(parts.out.backward(middle).view(groups, count, heads, width), shared)
        by_scores = torch._softmax_backward_data(
            torch.bmm(back, value.transpose(1, 2)), weights, -1, weights.dtype
        ).mul_(parts.scale)
        if ctx.asked is None:
            qkv = back.new_empty(groups, tokens, heads + 2 * shared, width)
            by_query, by_key_value = qkv[:, :, :heads], qkv[:, :, heads:]
        else:
            by_query = back.new_empty(groups, count, heads, width)
            by_key_value = back.new_empty(groups, tokens, 2 * shared, width)
        _put(by_query, torch.bmm(by_scores, key))
        _put(by_key_value[:, :, :shared], torch.bmm(by_scores.transpose(1, 2), query))
        _put(by_key_value[:, :, shared:], torch.bmm(weights.transpose(1, 2), back))
        if ctx.asked is None:
            _rotate(qkv[:, :, : heads + shared], ctx.rotary.cos, ctx.rotary.back)
            entering = parts.qkv.backward(qkv.view(groups * tokens, -1))
            below = parts.first.backward(entering, first).add_(middle)
        else:
            _rotate(by_query, ctx.asking.cos, ctx.asking.back)
            _rotate(by_key_value[:, :, :shared], ctx.rotary.cos, ctx.rotary.back)
            entering = parts.key_value.backward(by_key_value.view(groups * tokens, -1))
            entering.index_add_(0, ctx.asked, parts.query.backward(by_query.view(groups * count, -1)))
            below = parts.first.backward(entering, first).index_add_(0, ctx.asked, middle)
        return below.view(ctx.shape), None, None, None


class _RMSNormFunction(torch.autograd.Function):
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


class _AttentionFunction(torch.autograd.Function):
    """Heads that share a key are computed as one longer query, so that no key is repeated."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale: float) -> torch.Tensor:
        groups, _, tokens, width = query.shape
        shared = key.shape[1]
        long = query.reshape(groups, shared, -1, width)  # (G, K, H/K * N, W)
        scores = torch.matmul(long, key.transpose(2, 3)).mul_(scale)
        scores.view(groups, shared, -1, tokens, scores.shape[-1]).add_(mask[:, :, None])
        weights = scores.float().softmax(-1).to(query.dtype)  # the softmax of bfloat16 numbers is several times slower
        ctx.kept, ctx.scale, ctx.shape = (long, key, value, weights), scale, query.shape
        return torch.matmul(weights, value).view(query.shape).transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        long, key, value, weights = ctx.kept
        back = gradient.transpose(1, 2).reshape(long.shape)
        scores = torch._softmax_backward_data(torch.matmul(back, value.transpose(2, 3)), weights, -1, weights.dtype)
        scores = scores.mul_(ctx.scale)
        by_query = torch.matmul(scores, key).view(ctx.shape)
        by_key = torch.matmul(scores.transpose(2, 3), long)
        return by_query, by_key, torch.matmul(weights.transpose(2, 3), back), None, None


ATTENTION = "locft_fused"
"""Name of the attention below among those of transformers."""


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    scaling: float,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as transformers calls it: query (G, H, N, W), key and value (G, K, N, W), mask (G, 1, N, N), added to
    the scores. Returns (G, N, H, W)."""
    return _AttentionFunction.apply(query, key, value, attention_mask, scaling), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def _epsilon(norm: Any) -> float:
    """AttributeError for a module that has none."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _plus(product: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """In place where the product is of the stream's type."""
    return product.add_(stream) if product.dtype == stream.dtype else stream + product


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads (G, N, H, W) by their tokens' angles, in place; with -sin by the opposite angles."""
    halves_swapped = torch.roll(heads, heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(halves_swapped, sin)


def _by_head(heads: torch.Tensor, shared: int) -> torch.Tensor:
    """(G, N, H, W) -> (G * K, H/K * N, W), heads that share a key one behind the other."""
    groups, _, count, width = heads.shape
    apart = heads.unflatten(2, (shared, count // shared)).permute(0, 2, 3, 1, 4)
    return apart.reshape(groups * shared, -1, width)


def _by_token(rows: torch.Tensor, groups: int, tokens: int) -> torch.Tensor:
    """The reverse, (G * K, H/K * N, W) -> (G, N, K, H/K, W)."""
    apart = rows.view(groups, rows.shape[0] // groups, -1, tokens, rows.shape[-1])
    return apart.permute(0, 3, 1, 2, 4).contiguous()


def _put(heads: torch.Tensor, rows: torch.Tensor) -> None:
    """Write (G * K, H/K * N, W) into (G, N, H, W)."""
    groups, tokens, _, width = heads.shape
    apart = rows.view(groups, rows.shape[0] // groups, -1, tokens, width)
    heads.unflatten(2, apart.shape[1:3]).copy_(apart.permute(0, 3, 1, 2, 4))
