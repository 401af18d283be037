"""Fine-tuning that is held back where the model is sensitive: the loss of the edits plus a price on predicted drift.

The predicted drift of a change C of a matrix is 1/2 tr(R C K C'), with the factors of `locft.train.methods.curvature`. The price is
in nats of edit loss per nat of drift, so it means the same on every model. In the eigenbasis of the factors, where C has
the coordinates Z = U'CV, the drift is 1/2 sum of r_i k_j Z_ij^2: there Adam can scale directions instead of weights, and
directions can be frozen altogether (compare CrispEdit, arXiv 2602.15823, which projects them out).
"""

from collections.abc import Mapping, Sequence

import torch

from locft.model.models import DTYPES
from locft.train.methods.curvature import Curvature, Eigenbasis
from locft.train.methods.method import Method, MethodSettings, Parameter, adam


class LowCurvature(Method):
    def __init__(
        self, parameters: Mapping[str, Parameter], settings: MethodSettings, curvature: Mapping[str, Curvature]
    ):
        super().__init__(parameters)
        self.settings = settings
        at_home = {name: curvature[name].to(value.device) for name, value in self.base.items()}
        self.curvature = {name: one.in_dtype(DTYPES[settings.precision]) for name, one in at_home.items()}
        self.in_basis = settings.adam_basis == "curvature"
        self.bases: dict[str, Eigenbasis] = {}
        self.frozen: dict[str, torch.Tensor] = {}
        if self.in_basis or settings.curvature_share:
            self.bases = {name: one.eigenbasis() for name, one in at_home.items()}
            self.frozen = {name: basis.steepest(settings.curvature_share) for name, basis in self.bases.items()}
        self.trained = list(self.weights.values())
        if self.in_basis:
            self.trained = [torch.zeros_like(value).requires_grad_() for value in self.base.values()]
        self.restart()

    def restart(self) -> None:
        self.optimiser = adam(self.trained, self.settings.learning_rate)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor]) -> None:
        for name, trained, gradient in zip(self.base, self.trained, gradients, strict=True):
            trained.grad = self._in_basis(name, trained, gradient) if self.in_basis else self._plain(name, gradient)
        self.optimiser.step()
        if self.bases:
            for name, trained in zip(self.base, self.trained, strict=True):
                self._put(name, trained)

    def _plain(self, name: str, gradient: torch.Tensor) -> torch.Tensor:
        change = self.weights[name] - self.base[name]
        return gradient.add_(self.curvature[name].gradient(change), alpha=self.settings.curvature_strength)

    def _in_basis(self, name: str, coordinates: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        basis = self.bases[name]
        found = basis.coordinates(gradient)
        found.addcmul_(basis.curvature, coordinates, value=self.settings.curvature_strength)
        return found.masked_fill_(self.frozen[name], 0.0)

    def _put(self, name: str, trained: torch.Tensor) -> None:
        """Write the weights, with nothing of the frozen directions in them."""
        basis = self.bases[name]
        coordinates = trained if self.in_basis else basis.coordinates(trained - self.base[name])
        change = basis.change(coordinates.masked_fill(self.frozen[name], 0.0))
        self.weights[name].copy_(self.base[name] + change)
