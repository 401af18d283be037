"""A layer of a frozen Llama-like model as one operation with a hand-written gradient.

With a few hundred tokens, most of a step is spent not on matrix products but on what lies between them: casts, transposing
and repeating heads, and autograd's record of each. Here a layer is some thirty operations forward and as many backward, and
products that take the same input (queries, keys and values; gate and up) share one buffer for their outputs. The arithmetic is
that of Hugging Face's eager code, rounding included. On a GPU the number of kernels is the same; how fast they are there has not
been measured. A layer is recognised by its parts and by what it computes, not by its name; one that is not recognised, or that
is being trained, runs its own code.

Without a gradient, a layer in bfloat16 also takes hidden states in float32 and adds to them in float32: most of what bfloat16
loses comes from rounding the sum over all layers again and again.

Legend: G sequences, N tokens of each, D width, H query heads, K key and value heads, W width of a head, F inner width.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from locft.model.positions import decoder_layers


def fuse_layers(model: PreTrainedModel) -> None:
    """Give the recognised layers of a module tree their fused forward. Parameters stay shared and keep their names.

    The tree must be the caller's own (a view) and take masks of shape (G, 1, N, N) that are added to the scores. If any layer
    is recognised, the norms outside of the fused operation (in a layer that is being trained, and after the last layer) get a
    hand-written gradient too.
    """
    norms = set()
    layer: Any
    for layer in decoder_layers(model):
        kind, parts = type(layer), LayerParts.of(layer)
        if parts is None:
            continue
        layer.fused_parts = parts
        layer.__class__ = type(f"Fused{kind.__name__}", (FusedLayer, kind), {})
        if _agrees(layer):
            norms.add(type(layer.input_layernorm))
        else:
            del layer.fused_parts
            layer.__class__ = kind
    for parent in list(model.modules()) if norms else ():
        for name, child in parent.named_children():
            if type(child) in norms:
                setattr(parent, name, FrozenRMSNorm(child))


class FusedLayer(nn.Module):
    """Mixin that is placed before the class of a layer in its bases."""

    fused_parts: "LayerParts"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # (G, N, D) -> (G, N, D)
        parts = self.fused_parts
        wider = hidden_states.dtype != parts.dtype  # supported only without a gradient
        ours = not (wider and torch.is_grad_enabled()) and parts.unchanged(self)
        if attention_mask is not None and attention_mask.ndim == 4 and position_embeddings is not None and ours:
            rotary = MaskAndRotary.of(attention_mask, *position_embeddings, parts.dtype)
            return FusedLayerFunction.apply(hidden_states, rotary, parts)
        return super().forward(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )


def _agrees(layer: Any) -> bool:
    """True if, on random inputs, output and gradient agree with those of the layer's own forward."""
    parts: LayerParts = layer.fused_parts
    kind: Any = type(layer).__mro__[2]
    weight = parts.first.weight
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    tokens = 6
    inputs, probe = 1 + drawn(2, tokens, len(weight)), drawn(2, tokens, len(weight))  # a norm that centres differs
    angles = 3 * torch.randn(2, tokens, parts.width // 2, generator=generator).repeat(1, 1, 2)
    hidden_later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).expand(2, 1, tokens, tokens)
    mask = torch.zeros(2, 1, tokens, tokens).masked_fill_(hidden_later, torch.finfo(weight.dtype).min).to(weight)
    place = angles.cos().to(weight), angles.sin().to(weight)
    found = []
    try:
        with torch.enable_grad():
            for forward in (kind.forward, type(layer).forward):
                entering = inputs.clone().requires_grad_()
                output = forward(layer, entering, attention_mask=mask, position_embeddings=place)
                found.append((output.detach(), *torch.autograd.grad(output, entering, probe)))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return all((ours - own).norm() <= tolerance * own.norm() for own, ours in zip(*found, strict=True))


class LayerParts:
    """The parts of a layer that the fused operation needs."""

    def __init__(self, layer: Any):  # its parts are those of a Llama layer
        attention, mlp = layer.self_attn, layer.mlp
        self.first, self.second = FrozenNorm(layer.input_layernorm), FrozenNorm(layer.post_attention_layernorm)
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

    @classmethod
    def of(cls, layer: Any) -> "LayerParts | None":
        """None for a layer that lacks a part or has additional parameters."""
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
    """weight * x / rms(x) as a module, rounded exactly like the norm that it replaces."""

    def __init__(self, norm: Any):
        super().__init__()
        self.weight: torch.Tensor = norm.weight
        self.epsilon = _epsilon(norm)
        self._frozen, self._plain = (norm.weight,), (norm,)  # in tuples, so not registered as parameters or modules

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
    """Mask and rotary angles as the operation needs them. All layers of a pass share them, so the last ones are kept."""

    _last: "MaskAndRotary | None" = None

    def __init__(self, given: tuple[torch.Tensor, ...], dtype: torch.dtype):
        mask, cos, sin = self.given = given
        self.dtype = dtype
        self.mask = mask.float()[:, :, None]  # (G, 1, 1, N, N)
        half = sin.shape[-1] // 2
        self.cos = cos.to(dtype)[:, :, None]  # (G, N, 1, W)
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), -1).to(dtype)[:, :, None]  # signs as in `rotate_half`
        self.back = -self.sin

    @classmethod
    def of(cls, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> "MaskAndRotary":
        last, given = cls._last, (mask, cos, sin)
        if last is None or last.dtype != dtype or any(a is not b for a, b in zip(last.given, given, strict=True)):
            last = cls._last = cls(given, dtype)
        return last


class FusedLayerFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: torch.Tensor, rotary: MaskAndRotary, parts: LayerParts) -> torch.Tensor:
        groups, tokens, _ = hidden.shape
        heads, shared, width = parts.heads, parts.shared, parts.width
        stream = hidden.reshape(groups * tokens, -1)
        first, entering = parts.first.forward(stream)
        qkv = parts.qkv.forward(entering).view(groups, tokens, -1, width)
        _rotate(qkv[:, :, : heads + shared], rotary.cos, rotary.sin)
        query = _by_head(qkv[:, :, :heads], shared)  # (G * K, H/K * N, W)
        key = _by_head(qkv[:, :, heads : heads + shared], shared)  # (G * K, N, W)
        value = _by_head(qkv[:, :, heads + shared :], shared)
        scores = torch.bmm(query, key.transpose(1, 2)).view(groups, shared, -1, tokens, tokens)
        wide = torch.add(rotary.mask, scores, alpha=parts.scale)
        weights = wide.softmax(-1).to(parts.dtype).view(query.shape[0], -1, tokens)
        mixed = _by_token(torch.bmm(weights, value), groups, tokens)
        middle = _plus(parts.out.forward(mixed.view(groups * tokens, -1)), stream)
        second, entering = parts.second.forward(middle)
        gate_up = parts.gate_up.forward(entering)
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.parts, ctx.rotary, ctx.shape = parts, rotary, hidden.shape
        ctx.kept = first, query, key, value, weights, second, gate_up, active
        return _plus(parts.down.forward(active * up), middle).view(groups, tokens, -1)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        first, query, key, value, weights, second, gate_up, active = ctx.kept
        parts, (groups, tokens, _) = ctx.parts, ctx.shape
        heads, shared, width = parts.heads, parts.shared, parts.width
        above = gradient.reshape(groups * tokens, -1)
        gate, up = gate_up.chunk(2, dim=-1)
        inner, by_gate_up = parts.down.backward(above), torch.empty_like(gate_up)
        by_gate, by_up = by_gate_up.chunk(2, dim=-1)
        torch.mul(inner, active, out=by_up)
        torch.ops.aten.silu_backward.grad_input(inner.mul_(up), gate, grad_input=by_gate)
        middle = parts.second.backward(parts.gate_up.backward(by_gate_up), second).add_(above)
        back = _by_head(parts.out.backward(middle).view(groups, tokens, heads, width), shared)
        by_scores = torch._softmax_backward_data(
            torch.bmm(back, value.transpose(1, 2)), weights, -1, weights.dtype
        ).mul_(parts.scale)
        qkv = back.new_empty(groups, tokens, heads + 2 * shared, width)
        _put(qkv[:, :, :heads], torch.bmm(by_scores, key))
        _put(qkv[:, :, heads : heads + shared], torch.bmm(by_scores.transpose(1, 2), query))
        _put(qkv[:, :, heads + shared :], torch.bmm(weights.transpose(1, 2), back))
        _rotate(qkv[:, :, : heads + shared], ctx.rotary.cos, ctx.rotary.back)
        entering = parts.qkv.backward(qkv.view(groups * tokens, -1))
        return parts.first.backward(entering, first).add_(middle).view(ctx.shape), None, None


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


def _epsilon(norm: Any) -> float:
    """The epsilon of a norm. Raises AttributeError for a module that has none."""
    return norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps


def _plus(product: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """The sum, in place if the product has the dtype of the stream."""
    return product.add_(stream) if product.dtype == stream.dtype else stream + product


def _rotate(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Rotate heads (G, N, H, W) by their tokens' angles, in place; with -sin by the opposite angles."""
    halves_swapped = torch.roll(heads, heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(halves_swapped, sin)


def _by_head(heads: torch.Tensor, shared: int) -> torch.Tensor:
    """(G, N, H, W) -> (G * K, H/K * N, W), with the heads that share a key one after the other."""
    groups, _, count, width = heads.shape
    apart = heads.unflatten(2, (shared, count // shared)).permute(0, 2, 3, 1, 4)
    return apart.reshape(groups * shared, -1, width)


def _by_token(rows: torch.Tensor, groups: int, tokens: int) -> torch.Tensor:
    """The reverse of `_by_head`, (G * K, H/K * N, W) -> (G, N, K, H/K, W)."""
    apart = rows.view(groups, rows.shape[0] // groups, -1, tokens, rows.shape[-1])
    return apart.permute(0, 3, 1, 2, 4).contiguous()


def _put(heads: torch.Tensor, rows: torch.Tensor) -> None:
    """Write (G * K, H/K * N, W) into (G, N, H, W)."""
    groups, tokens, _, width = heads.shape
    apart = rows.view(groups, rows.shape[0] // groups, -1, tokens, width)
    heads.unflatten(2, apart.shape[1:3]).copy_(apart.permute(0, 3, 1, 2, 4))
