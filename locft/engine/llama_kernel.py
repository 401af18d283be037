"""A layer of a frozen Llama-like model as one operation with a hand-written gradient.

Of a step on some hundred tokens most is not matrix products but what lies between them: casts, turned and repeated heads,
and autograd's record of each. Here a layer is some thirty operations forward and as many backward, and the products that
take the same input (queries, keys and values; gate and up) are one. The arithmetic is that of Hugging Face's eager code. A
layer is recognised by its parts and by its numbers, not by a name; one that is not recognised, or that a trial trains,
computes as it always does.

Without a gradient, a layer in bfloat16 also takes states in float32 and adds to them in float32: rounding the sum of all
layers, again and again, is most of what bfloat16 loses.

Behind the last layer only the tokens are looked at that predict something. There (`only_at`) keys and values are computed
for all tokens, everything else for those alone.

Legend: G sequences, N tokens of each, D width, H heads, K of them with keys of their own, W width of a head, F inner width,
Q tokens of each sequence that are computed, usually all N.
"""

import copy
import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from locft.engine.packed_linear import FrozenLinear, PackedWeight
from locft.engine.fused_attention import FrozenRMSNorm
from locft.model.positions import decoder_layers


def fuse_layers(model: PreTrainedModel) -> None:
    """Give the layers of a module tree that are recognised their fused forward.

    The tree must be the caller's own (a view), its norms, linear layers and attention replaced already
    (`locft.engine.fused_attention`, `locft.engine.packed_linear`); parameters stay shared, and keep their names.
    """
    for layer in decoder_layers(model):
        kind = type(layer)
        parts = _Parts.of(layer)
        if parts is None:
            continue
        layer.fused_parts = parts
        layer.__class__ = type(f"Fused{kind.__name__}", (_FusedLayer, kind), {})
        if not _agrees(layer):
            del layer.fused_parts
            layer.__class__ = kind


def is_fused(layer: nn.Module) -> bool:
    """Whether a layer has its fused forward."""
    return isinstance(layer, _FusedLayer)


def forget_layouts(tree: nn.Module) -> None:
    """Give up what trying a module tree out has packed: many a layer is never computed again."""
    for module in tree.modules():
        if isinstance(module, FrozenLinear):
            module.packed.forget()
        elif is_fused(module):
            for product in module.fused_parts.products:
                if product.packed:
                    product.packed.forget()


@contextmanager
def only_at(layer: nn.Module, places: torch.Tensor) -> Iterator[None]:
    """While the block runs, a fused layer returns (G, Q, D), the states of these places (G, Q) of the sequences only.

    A layer that is not fused, or that a trial trains, returns those of all tokens. Gradients flow back to all tokens.
    """
    if not is_fused(layer):
        yield
        return
    layer.fused_parts.places = places
    try:
        yield
    finally:
        layer.fused_parts.places = None


class _FusedLayer:
    """Goes before the class of a layer."""

    fused_parts: "_Parts"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # (G, N, D) -> (G, N, D)
        parts = self.fused_parts
        ours = attention_mask is not None and attention_mask.ndim == 4 and position_embeddings is not None
        wider = hidden_states.dtype != parts.dtype  # only the forward pass can do that
        ours = ours and not (wider and torch.is_grad_enabled())
        if ours and kwargs.get("past_key_values") is None and parts.unchanged(self):
            setting = _Setting.of(attention_mask, *position_embeddings, parts.dtype)
            return _Layer.apply(hidden_states, setting, parts, parts.places)
        return super().forward(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )


class _Parts:
    """What the operation needs of a layer."""

    def __init__(self, layer: nn.Module):
        attention, mlp = layer.self_attn, layer.mlp
        self.first, self.second = layer.input_layernorm, layer.post_attention_layernorm
        self.query = _Product([attention.q_proj])
        self.key_value = _Product([attention.k_proj, attention.v_proj])
        self.qkv = _Product([attention.q_proj, attention.k_proj, attention.v_proj])
        self.out = _Product([attention.o_proj])
        self.gate_up = _Product([mlp.gate_proj, mlp.up_proj])
        self.down = _Product([mlp.down_proj])
        self.products = (self.query, self.key_value, self.qkv, self.out, self.gate_up, self.down)
        self.width = attention.head_dim
        self.heads, self.shared = (p.weight.shape[0] // self.width for p in (attention.q_proj, attention.k_proj))
        self.scale = attention.scaling
        self.dtype = attention.q_proj.weight.dtype
        self.parameters = tuple(layer.parameters())
        self.places: torch.Tensor | None = None

    @classmethod
    def of(cls, layer: nn.Module) -> "_Parts | None":
        """None for a layer that lacks a part, or has one more."""
        try:
            parts = cls(layer)
        except AttributeError:
            return None
        if not (isinstance(parts.first, FrozenRMSNorm) and isinstance(parts.second, FrozenRMSNorm)):
            return None
        products = (parts.qkv, parts.out, parts.gate_up, parts.down)
        known = [*(w for p in products for w in p.parameters), parts.first.weight, parts.second.weight]
        return parts if {id(p) for p in known} == {id(p) for p in parts.parameters} else None

    def unchanged(self, layer: nn.Module) -> bool:
        """Whether no parameter of the layer is substituted."""
        return all(now is then for now, then in zip(layer.parameters(), self.parameters, strict=True))


class _Product:
    """Linear layers that take the same input, side by side: (T, in) -> (T, out of all)."""

    def __init__(self, linears: Sequence[nn.Module]):
        self.weights = [linear.weight for linear in linears]
        self.biases = [linear.bias for linear in linears if linear.bias is not None]
        self.parameters = [*self.weights, *self.biases]
        ends = list(itertools.accumulate(weight.shape[0] for weight in self.weights))
        self.columns = [slice(start, end) for start, end in itertools.pairwise([0, *ends])]
        if len(self.biases) not in (0, len(linears)):
            raise AttributeError("only some of the linear layers have a bias")
        self.packed = PackedWeight(self.weights) if isinstance(linears[0], FrozenLinear) else None

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.packed:
            product = self.packed.product(inputs, backward=False)
        else:
            product = inputs.new_empty(len(inputs), self.columns[-1].stop)
            for weight, columns in zip(self.weights, self.columns, strict=True):
                torch.mm(inputs, weight.t(), out=product[:, columns])
        return product.add_(torch.cat(self.biases)) if self.biases else product

    def backward(self, gradient: torch.Tensor) -> torch.Tensor:
        if self.packed:
            return self.packed.product(gradient, backward=True)
        product = gradient[:, self.columns[0]] @ self.weights[0]
        for weight, columns in zip(self.weights[1:], self.columns[1:], strict=True):
            product.addmm_(gradient[:, columns], weight)
        return product


class _Setting:
    """Mask and angles as the operation wants them: the same for all layers of a pass, so the last ones are kept."""

    _last: "_Setting | None" = None

    def __init__(self, given: tuple[torch.Tensor, ...], dtype: torch.dtype):
        mask, cos, sin = self.given = given
        self.dtype = dtype
        self.mask = mask.float()[:, :, None]  # (G, 1, 1, N, N)
        half = sin.shape[-1] // 2
        self.cos = cos.to(dtype)[:, :, None]  # (G, N, 1, W)
        self.sin = torch.cat((-sin[..., :half], sin[..., half:]), -1).to(dtype)[:, :, None]  # as `rotate_half` turns
        self.back = -self.sin

    @classmethod
    def of(cls, mask: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype) -> "_Setting":
        last, given = cls._last, (mask, cos, sin)
        if last is None or last.dtype != dtype or any(a is not b for a, b in zip(last.given, given, strict=True)):
            last = cls._last = cls(given, dtype)
        return last

    def at(self, places: torch.Tensor) -> "_Setting":
        """That of the tokens at the places (G, Q): their mask is (G, 1, 1, Q, N)."""
        chosen, group = copy.copy(self), torch.arange(len(places), device=places.device)[:, None]
        chosen.mask = self.mask[group, 0, 0, places][:, None, None]
        chosen.cos, chosen.sin, chosen.back = (angles[group, places] for angles in (self.cos, self.sin, self.back))
        return chosen


class _Layer(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, setting: _Setting, parts: _Parts, places: torch.Tensor | None) -> torch.Tensor:
        groups, tokens, _ = hidden.shape
        heads, shared, width = parts.heads, parts.shared, parts.width
        stream = hidden.reshape(groups * tokens, -1)
        first, entering = _normalised(stream, parts.first)
        asked = None
        if places is None:
            asking, qkv = setting, parts.qkv.forward(entering).view(groups, tokens, -1, width)
            _turn(qkv[:, :, : heads + shared], setting.cos, setting.sin)
            query, key_value = qkv[:, :, :heads], qkv[:, :, heads:]
        else:
            asked = (torch.arange(groups, device=places.device)[:, None] * tokens + places).flatten()
            asking, stream = setting.at(places), stream[asked]
            query = parts.query.forward(entering[asked]).view(groups, -1, heads, width)
            key_value = parts.key_value.forward(entering).view(groups, tokens, -1, width)
            _turn(query, asking.cos, asking.sin)
            _turn(key_value[:, :, :shared], setting.cos, setting.sin)
        count = query.shape[1]
        query = _by_head(query, shared)  # (G * K, H/K * Q, W)
        key = _by_head(key_value[:, :, :shared], shared)  # (G * K, N, W)
        value = _by_head(key_value[:, :, shared:], shared)
        scores = torch.bmm(query, key.transpose(1, 2)).view(groups, shared, -1, count, tokens)
        wide = torch.add(asking.mask, scores, alpha=parts.scale)
        weights = wide.softmax(-1).to(parts.dtype).view(query.shape[0], -1, tokens)
        mixed = _by_token(torch.bmm(weights, value), groups, count)
        middle = _plus(parts.out.forward(mixed.view(groups * count, -1)), stream)
        second, entering = _normalised(middle, parts.second)
        gate_up = parts.gate_up.forward(entering)
        gate, up = gate_up.chunk(2, dim=-1)
        active = F.silu(gate)
        ctx.parts, ctx.setting, ctx.asking, ctx.asked, ctx.shape = parts, setting, asking, asked, hidden.shape
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
        middle = _unnormalised(parts.gate_up.backward(by_gate_up), second, parts.second).add_(above)
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
            _turn(qkv[:, :, : heads + shared], ctx.setting.cos, ctx.setting.back)
            entering = parts.qkv.backward(qkv.view(groups * tokens, -1))
            below = _unnormalised(entering, first, parts.first).add_(middle)
        else:
            _turn(by_query, ctx.asking.cos, ctx.asking.back)
            _turn(by_key_value[:, :, :shared], ctx.setting.cos, ctx.setting.back)
            entering = parts.key_value.backward(by_key_value.view(groups * tokens, -1))
            entering.index_add_(0, ctx.asked, parts.query.backward(by_query.view(groups * count, -1)))
            below = _unnormalised(entering, first, parts.first).index_add_(0, ctx.asked, middle)
        return below.view(ctx.shape), None, None, None


def _normalised(inputs: torch.Tensor, norm: FrozenRMSNorm) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """What the norm's gradient needs, and its output."""
    wide = inputs.float()
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    inverse = length.square_().div_(inputs.shape[-1]).add_(norm.epsilon).rsqrt_()
    normal = wide * inverse
    return (normal, inverse), normal.to(norm.weight.dtype) * norm.weight


def _plus(product: torch.Tensor, stream: torch.Tensor) -> torch.Tensor:
    """In place where the product is of the stream's type."""
    return product.add_(stream) if product.dtype == stream.dtype else stream + product


def _unnormalised(gradient: torch.Tensor, kept: tuple[torch.Tensor, torch.Tensor], norm: FrozenRMSNorm) -> torch.Tensor:
    normal, inverse = kept
    wide = gradient * norm.weight.float()
    along = (wide * normal).mean(-1, keepdim=True)
    return wide.addcmul_(normal, along, value=-1).mul_(inverse).to(gradient.dtype)


def _turn(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Turn heads (G, N, H, W) by their tokens' angles, in place; by the opposite ones with -sin."""
    halves_swapped = torch.roll(heads, heads.shape[-1] // 2, -1)
    heads.mul_(cos).addcmul_(halves_swapped, sin)


def _by_head(heads: torch.Tensor, shared: int) -> torch.Tensor:
    """(G, N, H, W) -> (G * K, H/K * N, W), heads that share a key one behind the other."""
    groups, tokens, count, width = heads.shape
    apart = heads.unflatten(2, (shared, count // shared)).permute(0, 2, 3, 1, 4)
    return apart.reshape(groups * shared, -1, width)


def _by_token(rows: torch.Tensor, groups: int, tokens: int) -> torch.Tensor:
    """The way back, (G * K, H/K * N, W) -> (G, N, K, H/K, W)."""
    apart = rows.view(groups, rows.shape[0] // groups, -1, tokens, rows.shape[-1])
    return apart.permute(0, 3, 1, 2, 4).contiguous()


def _put(heads: torch.Tensor, rows: torch.Tensor) -> None:
    """Write (G * K, H/K * N, W) into (G, N, H, W)."""
    groups, tokens, _, width = heads.shape
    apart = rows.view(groups, rows.shape[0] // groups, -1, tokens, width)
    heads.unflatten(2, apart.shape[1:3]).copy_(apart.permute(0, 3, 1, 2, 4))


def _agrees(layer: nn.Module) -> bool:
    """Tried out on numbers: output and gradient are those of the layer's own forward."""
    parts, kind = layer.fused_parts, type(layer).__mro__[2]
    weight = parts.first.weight
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight.dtype)

    tokens = 6
    inputs, probe = drawn(2, tokens, len(weight)), drawn(2, tokens, len(weight))
    angles = 3 * torch.randn(2, tokens, parts.width // 2, generator=generator).repeat(1, 1, 2)
    hidden_later = torch.ones(tokens, tokens, dtype=torch.bool).triu(1).expand(2, 1, tokens, tokens)
    mask = torch.zeros(2, 1, tokens, tokens, dtype=weight.dtype).masked_fill_(
        hidden_later, torch.finfo(weight.dtype).min
    )
    place = angles.cos().to(weight.dtype), angles.sin().to(weight.dtype)
    found = []
    try:
        with torch.enable_grad():
            for forward in (kind.forward, type(layer).forward):
                entering = inputs.clone().requires_grad_()
                output = forward(layer, entering, attention_mask=mask, position_embeddings=place)
                found.append((output.detach(), *torch.autograd.grad(output, entering, probe)))
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    finally:
        forget_layouts(layer)
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return all((ours - own).norm() <= tolerance * own.norm() for own, ours in zip(*found, strict=True))
