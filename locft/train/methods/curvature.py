"""How strongly a change of a parameter would disturb the model's predictions: the curvature of drift at the unedited model.

Legend: O rows and I columns of a matrix as it is stored.

Drift is mean KL(unedited || edited) per token of prose. Near the unedited model it is half the quadratic form of the
Fisher information. For a matrix, that is approximated by a Kronecker product (K-FAC, arXiv 1503.05671): the second moment
of the matrix's inputs on one side, that of the gradients at its outputs, with labels drawn from the model's own
predictions, on the other.
"""

from dataclasses import dataclass

import torch

LEAST = 1e-15
"""Floor on the mean eigenvalue, for what prose never reached at all."""
DAMPING = 0.01
"""Share of a factor's mean eigenvalue that is added to each of its eigenvalues."""


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
        """A copy with `share` of each factor's mean eigenvalue added to each of its eigenvalues.

        Prose of a few thousand tokens covers fewer directions than a wide matrix has; the others are not free of cost.
        For experts that the prose never reached, the mean over all experts is used instead.
        """
        if self.rows is None or self.columns is None:
            assert self.diagonal is not None
            return Curvature(diagonal=self.diagonal + share * self.diagonal.mean().clamp(min=LEAST))
        return Curvature(_damped(self.rows, share), _damped(self.columns, share))

    @property
    def parts(self) -> dict[str, torch.Tensor]:
        """The tensors that are present, by field name."""
        found = {"rows": self.rows, "columns": self.columns, "diagonal": self.diagonal}
        return {name: part for name, part in found.items() if part is not None}

    def to(self, device: torch.device) -> "Curvature":
        return Curvature(**{name: part.to(device) for name, part in self.parts.items()})

    def then(self, other: "Curvature") -> "Curvature":
        """The curvature whose `gradient` applies this one's first and then that of `other`."""
        if self.rows is None or other.rows is None or self.columns is None or other.columns is None:
            assert self.diagonal is not None and other.diagonal is not None
            return Curvature(diagonal=self.diagonal * other.diagonal)
        return Curvature(other.rows @ self.rows, self.columns @ other.columns)

    def in_dtype(self, dtype: torch.dtype) -> "Curvature":
        """A copy whose factors multiply in a dtype: the penalty is an approximation anyway, and bfloat16 is several times faster
        where the hardware supports it."""
        return Curvature(**{name: part if name == "diagonal" else part.to(dtype) for name, part in self.parts.items()})

    def inverse(self, share: float) -> "Curvature":
        """The inverse, with `share` of each factor's mean eigenvalue added to each of its eigenvalues first: its `gradient` turns
        a gradient of the loss into the change that lowers the loss by the same amount for the least predicted drift."""
        damped = self.damped(share)
        if damped.rows is None or damped.columns is None:
            assert damped.diagonal is not None
            return Curvature(diagonal=1 / damped.diagonal)
        return Curvature(*(torch.cholesky_inverse(torch.linalg.cholesky(one)) for one in (damped.rows, damped.columns)))


def _damped(factor: torch.Tensor, share: float) -> torch.Tensor:
    mean = factor.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = torch.where(mean > 0, mean, mean.mean()).clamp(min=LEAST)
    return factor + share * mean[..., None, None] * torch.eye(factor.shape[-1], device=factor.device)
