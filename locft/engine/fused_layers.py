"""Which layers of a model are computed as one operation (`locft.engine.llama_kernel`).

A layer is recognised by its parts and by its numbers, not by a name. One that is not recognised, or that is being
trained, computes as it always does.

Legend: G sequences, N tokens of each, D width.
"""

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from locft.engine.llama_kernel import FrozenRMSNorm, FusedLayerFunction, LayerParts, MaskAndRotary
from locft.model.positions import decoder_layers


def fuse_layers(model: PreTrainedModel) -> None:
    """Give the recognised layers of a module tree their fused forward. Parameters stay shared and keep their names.

    The tree must be the caller's own (a view), on a CPU, and compute attention eagerly with masks of shape
    (G, 1, N, N). If any layer is recognised, the norms outside of the fused operation (in a layer that is being trained,
    and behind the last layer) get a hand-written gradient, too.
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
    """Goes before the class of a layer."""

    fused_parts: "LayerParts"

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:  # (G, N, D) -> (G, N, D)
        parts = self.fused_parts
        wider = hidden_states.dtype != parts.dtype  # only the forward pass can do that
        ours = not (wider and torch.is_grad_enabled()) and parts.unchanged(self)
        if attention_mask is not None and attention_mask.ndim == 4 and position_embeddings is not None and ours:
            rotary = MaskAndRotary.of(attention_mask, *position_embeddings, parts.dtype)
            return FusedLayerFunction.apply(hidden_states, rotary, parts)
        return super().forward(
            hidden_states, attention_mask=attention_mask, position_embeddings=position_embeddings, **kwargs
        )


def _agrees(layer: Any) -> bool:
    """Tried on numbers: output and gradient are those of the layer's own forward."""
    parts: LayerParts = layer.fused_parts
    kind: Any = type(layer).__mro__[2]
    weight = parts.first.weight
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(weight.dtype)

    tokens = 6
    inputs, probe = 1 + drawn(2, tokens, len(weight)), drawn(2, tokens, len(weight))  # a norm that centres differs
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
    tolerance = 1e-4 if weight.dtype == torch.float32 else 2e-2
    return all((ours - own).norm() <= tolerance * own.norm() for own, ours in zip(*found, strict=True))
