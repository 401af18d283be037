"""How much a change of a parameter would disturb what the model says: the curvature of drift at the unedited model.

Legend: O rows and I columns of a matrix as it is stored.

Drift is mean KL(unedited || edited) per token of prose. Near the unedited model it is half the quadratic form of the
Fisher information. For a matrix, that is approximated by a Kronecker product (K-FAC, arXiv 1503.05671): the second moment
of the matrix's inputs on one side, that of the gradients at its outputs, with labels drawn from the model's own
predictions, on the other.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Curvature:
    """Of one parameter: either two factors or the diagonal alone. Stacked experts have a leading dimension."""

    rows: torch.Tensor | None = None
    """(..., O, O): of a matrix stored (out, in), the second moment of the gradients at its outputs."""
    columns: torch.Tensor | None = None
    """(..., I, I): of a matrix stored (out, in), the second moment of its inputs."""
    diagonal: torch.Tensor | None = None
    """Of the parameter's shape, where it is no matrix or its inputs cannot be seen."""

    def gradient(self, change: torch.Tensor) -> torch.Tensor:
        """Of the predicted drift, in nats per token, at a change of the parameter."""
        if self.diagonal is not None:
            return self.diagonal * change
        return self.rows @ change @ self.columns

    def drift(self, change: torch.Tensor) -> float:
        """Predicted drift of a change, in nats per token: 1/2 tr(rows C columns C')."""
        return 0.5 * float((self.gradient(change) * change).sum())
