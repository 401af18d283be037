"""Linear layers whose weights never change, kept in the layout that the CPU's matrix product wants.

oneDNN reorders a weight into blocks before it multiplies, in every call, forward and backward; with some fifty tokens
against a vocabulary of fifty thousand that is a third of the work. A frozen weight can be reordered once. PyTorch offers
this to its compiler only (torch.ops.mkldnn), so it is used where it is there and agrees with the plain product, and the
plain product elsewhere. The two layouts, forward and backward, cost two copies of a weight: only small models are packed.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

MOST_BYTES = 2**30
"""Models whose weights take more are not packed."""
_TOKENS = 64
"""Hint to oneDNN: rows of the usual product. Any number works."""
_PIECE = 6144
"""Rows of a weight that the backward product takes at once: over a whole vocabulary it would walk memory in strides too wide
for the processor to foresee, and take half as long again and more."""


def freeze_linears(model: nn.Module) -> None:
    """Replace the plain linear layers of a module tree by frozen ones with the same parameters, if the machine profits.

    The tree must be the caller's own (a view); the parameters stay shared. A weight that is substituted later
    (`torch.func.functional_call`) is multiplied the plain way.
    """
    parameters = list(model.parameters())
    if sum(p.numel() * p.element_size() for p in parameters) > MOST_BYTES or not _packing_works(parameters[0].dtype):
        return
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if type(child) is nn.Linear:
                setattr(parent, name, FrozenLinear(child))


class FrozenLinear(nn.Module):
    """y = x W^T + b with W packed at first use."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.packed = PackedWeight([linear.weight])

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:  # (..., in) -> (..., out)
        if self.weight is not self.packed.weights[0] or inputs.dtype != self.weight.dtype:
            return F.linear(inputs, self.weight, self.bias)
        product = _FrozenProduct.apply(inputs, self.packed)
        return product if self.bias is None else product + self.bias


class PackedWeight:
    """Weights (out, in) for the same input, one below the other, and the two packed layouts of that."""

    def __init__(self, weights: Sequence[torch.Tensor]):
        self.weights = tuple(weights)
        self._layouts: dict[bool, list[torch.Tensor]] = {}

    def product(self, inputs: torch.Tensor, backward: bool) -> torch.Tensor:
        """inputs (..., in) @ W^T, or for the backward pass inputs (..., out) @ W."""
        if backward not in self._layouts:
            weight = torch.cat([weight.detach() for weight in self.weights])
            parts = [part.t().contiguous() for part in weight.split(_PIECE)] if backward else [weight]
            self._layouts[backward] = [torch.ops.mkldnn._reorder_linear_weight(part, _TOKENS) for part in parts]
        layouts = self._layouts[backward]
        if len(layouts) == 1:
            return _times(inputs, layouts[0])
        pieces = zip(inputs.split(_PIECE, dim=-1), layouts, strict=True)
        return sum(_times(piece, layout).float() for piece, layout in pieces).to(inputs.dtype)

    def forget(self) -> None:
        """Give up the layouts; they are made again when they are asked for."""
        self._layouts.clear()


def _times(inputs: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(inputs, packed, None, "none", [], "")


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, inputs: torch.Tensor, packed: PackedWeight) -> torch.Tensor:
        ctx.packed = packed
        return packed.product(inputs.contiguous(), backward=False)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.packed.product(gradient.contiguous(), backward=True), None


def _packing_works(dtype: torch.dtype) -> bool:
    """Tried out, as the operators are not part of PyTorch's public interface."""
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((96, 64), (3, 5, 64)))
    try:
        packed = PackedWeight([weight])
        forward = packed.product(inputs, backward=False) - inputs @ weight.t()
        backward = packed.product(inputs @ weight.t(), backward=True) - (inputs @ weight.t()) @ weight
    except (AttributeError, RuntimeError):
        return False
    return bool(forward.abs().max() < 0.5 and backward.abs().max() < 16)
