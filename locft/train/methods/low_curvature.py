"""Fine-tuning that is held back where the model is sensitive: the loss of the edits plus a price on predicted drift.

The predicted drift of a change C of a matrix is 1/2 tr(R C K C'), with the factors of `locft.train.methods.curvature`. The
price is in nats of edit loss per nat of drift, so it means the same on every model. It is lower, in proportion, for a batch
whose loss is above `LEARNT`: where edits cannot be had for little drift (the last layers) they are learnt first and then
drift is saved, while a fixed price would leave them unlearnt.

In the eigenbasis of the factors, where C has the coordinates Z = U'CV, the drift is 1/2 sum of r_i k_j Z_ij^2: there Adam
can scale directions instead of weights, and directions can be frozen altogether (compare CrispEdit, arXiv 2602.15823, which
projects them out).
"""

from collections.abc import Mapping, Sequence

import torch

from locft.model.models import DTYPES
from locft.train.methods.curvature import Curvature, Eigenbasis
from locft.train.methods.method import Method, MethodSettings, Parameter, adam

LEARNT = 0.1
"""Nats of a batch's loss below which drift costs its whole price: its answers are then right but for a few."""


class LowCurvature(Method):
    def __init__(
        self, parameters: Mapping[str, Parameter], settings: MethodSettings, curvature: Mapping[str, Curvature]
    ):
        super().__init__(parameters)
        self.settings = settings
        at_home = {name: curvature[name].to(value.device) for name, value in self.base.items()}
        self.in_basis = settings.adam_basis == "curvature"
        self.bases: dict[str, Eigenbasis] = {}
        self.frozen: dict[str, torch.Tensor] = {}
        if self.in_basis or settings.curvature_share:
            self.bases = {name: one.eigenbasis() for name, one in at_home.items()}
            self.frozen = {name: basis.steepest(settings.curvature_share) for name, basis in self.bases.items()}
        self.needs_no_number = not self.bases  # there the weights are written anew, to the last bit not the same
        self.trained = list(self.weights.values())
        if self.in_basis:
            changes = {name: self.origin[name] - base for name, base in self.base.items()}
            self.trained = [self.bases[name].coordinates(change).requires_grad_() for name, change in changes.items()]
        else:
            self.curvature = {name: one.in_dtype(DTYPES[settings.precision]) for name, one in at_home.items()}
        self.restart()

    def restart(self) -> None:
        self.optimiser = adam(self.trained, self.settings.learning_rate)

    def stepped(self) -> dict[str, torch.Tensor]:
        in_basis = dict(zip(self.base, self.trained, strict=True)) if self.in_basis else {}
        return super().stepped() | {f"coordinates/{name}": trained for name, trained in in_basis.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], loss: float | torch.Tensor) -> None:
        known = loss.clamp(min=LEARNT) if isinstance(loss, torch.Tensor) else max(loss, LEARNT)
        price = self.settings.curvature_strength * (LEARNT / known)
        for name, trained, gradient in zip(self.base, self.trained, gradients, strict=True):
            if self.in_basis:
                trained.grad = self._in_basis(name, trained, gradient, price)
            else:
                change = self.weights[name] - self.base[name]
                priced = self.curvature[name].gradient(change)
                ahead = isinstance(price, torch.Tensor)
                trained.grad = gradient.add_(price * priced) if ahead else gradient.add_(priced, alpha=price)
        self.optimiser.step()
        if self.bases:
            for name, trained in zip(self.base, self.trained, strict=True):
                self._put(name, trained)

    def _in_basis(self, name: str, coordinates: torch.Tensor, gradient: torch.Tensor, price: float) -> torch.Tensor:
        basis = self.bases[name]
        found = basis.coordinates(gradient)
        found.addcmul_(basis.curvature, coordinates, value=price)
        return found.masked_fill_(self.frozen[name], 0.0)

    def _put(self, name: str, trained: torch.Tensor) -> None:
        """Write the weights, with nothing of the frozen directions in them."""
        basis = self.bases[name]
        coordinates = trained if self.in_basis else basis.coordinates(trained - self.base[name])
        change = basis.change(coordinates.masked_fill(self.frozen[name], 0.0))
        self.weights[name].copy_(self.base[name] + change)
