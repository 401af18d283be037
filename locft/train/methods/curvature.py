"""How strongly a change of a parameter would disturb the model's predictions: the curvature of drift at the unedited model.

Legend: O rows and I columns of a matrix as it is stored.

Drift is mean KL(unedited || edited) per token of prose. Near the unedited model it is half the quadratic form of the
Fisher information. For a matrix, that is approximated by a Kronecker product (K-FAC, arXiv 1503.05671): the second moment
of the matrix's inputs on one side, that of the gradients at its outputs, with labels drawn from the model's own
predictions, on the other.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

LEAST = 1e-15
"""Floor on what damping is a share of, for what prose never reached at all."""
DAMPING = 0.02
"""Share of the median of a factor's diagonal that is added to each of its eigenvalues."""


@dataclass(frozen=True)
class Curvature:
    """The curvature of one parameter: either two factors or the diagonal alone. Stacked experts have a leading dimension."""

    rows: torch.Tensor | None = None
    """(..., O, O): of a matrix stored (out, in), the second moment of the gradients at its outputs."""
    columns: torch.Tensor | None = None
    """(..., I, I): of a matrix stored (out, in), the second moment of its inputs."""
    diagonal: torch.Tensor | None = None
    """Of the parameter's shape, if the parameter is not a matrix or is not used in a product."""

    def gradient(self, change: torch.Tensor) -> torch.Tensor:
        """Gradient of the predicted drift, in nats per token, at a change of the parameter."""
        if self.rows is None or self.columns is None:
            return self.diagonal * change
        return (self.rows @ change.to(self.rows.dtype) @ self.columns).to(change.dtype)

    def drift(self, change: torch.Tensor) -> float:
        """Predicted drift of a change, in nats per token: 1/2 tr(rows C columns C')."""
        return 0.5 * float((self.gradient(change) * change).sum())

    def damped(self, share: float = DAMPING) -> "Curvature":
        """A copy with `share` of the median of each factor's diagonal added to each of its eigenvalues.

        Prose of a few thousand tokens covers fewer directions than a wide matrix has; the others are not free of cost.
        The median, since a few channels may be thousands of times larger than the rest and would decide the mean alone.
        """
        return self._changed(lambda one: _damped(one, share), lambda one: one + share * _usual(one.flatten()))

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        found = {"rows": self.rows, "columns": self.columns, "diagonal": self.diagonal}
        return {name: part for name, part in found.items() if part is not None}

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> "Curvature":
        """A copy on a device whose factors multiply in a dtype: the penalty is an approximation anyway, and bfloat16 is several times
        faster where the hardware supports it."""
        return self._changed(lambda one: one.to(device=device, dtype=dtype), lambda one: one.to(device=device))

    def then(self, other: "Curvature") -> "Curvature":
        """The curvature whose `gradient` applies this one's first and then that of `other`."""
        first, second = self.parts, other.parts
        if "diagonal" in first:
            return Curvature(diagonal=first["diagonal"] * second["diagonal"])
        return Curvature(second["rows"] @ first["rows"], first["columns"] @ second["columns"])

    def inverse(self, share: float) -> "Curvature":
        """The inverse of the damped curvature: its `gradient` turns a gradient of the loss into the change that lowers the loss
        by the same amount for the least predicted drift."""
        damped = self.damped(share)
        return damped._changed(lambda one: torch.cholesky_inverse(torch.linalg.cholesky(one)), lambda one: 1 / one)

    def _changed(self, factor: Callable, diagonal: Callable) -> "Curvature":
        """A copy in which a function is applied to each factor, another to the diagonal."""
        return Curvature(
            **{name: (diagonal if name == "diagonal" else factor)(part) for name, part in self.parts.items()}
        )


def _damped(factor: torch.Tensor, share: float) -> torch.Tensor:
    usual = _usual(factor.diagonal(dim1=-2, dim2=-1))
    return factor + share * usual[..., None, None] * torch.eye(factor.shape[-1], device=factor.device)


def _usual(diagonals: torch.Tensor) -> torch.Tensor:
    """(..., N) -> (...), the median of the entries above 0; where there are none, as for experts that the prose never reached,
    that of all matrices."""
    reached = torch.where(diagonals > 0, diagonals, torch.nan)
    usual = reached.nanmedian(-1).values
    return torch.where(usual.isnan(), reached.flatten().nanmedian(), usual).nan_to_num(LEAST).clamp(min=LEAST)
