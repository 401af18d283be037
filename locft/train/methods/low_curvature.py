"""Fine-tuning that is held back where the model is sensitive: the loss of the edits plus a penalty on predicted drift.

The predicted drift of a change C of a matrix is 1/2 tr(R C K C'), with the factors of `locft.train.methods.curvature`. The
price is in nats of edit loss per nat of drift, so it means the same on every model. It is lowered in proportion for a batch
whose loss is above `LEARNT`: where edits cannot be learnt with little drift (the last layers), they are learnt first and drift
is reduced afterwards, while a fixed price would leave them unlearnt.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from locft.model.models import DTYPES
from locft.train.methods.curvature import Curvature
from locft.train.methods.full import FullFineTuning
from locft.train.methods.method import Loss, MethodSettings, Parameter

LEARNT = 0.1
"""Batch loss, in nats, below which drift costs its full price: all but a few of the answers are then right."""


class LowCurvature(FullFineTuning):
    def __init__(
        self, parameters: Mapping[str, Parameter], settings: MethodSettings, curvature: Mapping[str, Curvature]
    ):
        super().__init__(parameters, settings)
        dtype = DTYPES[settings.precision]
        self.curvature = {name: curvature[name].to(value.device, dtype) for name, value in self.base.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        price, ahead = self.price(loss), isinstance(loss, torch.Tensor)
        for name, gradient in zip(self.base, gradients, strict=True):
            dear = self.drift_gradient(name)
            gradient.add_(price * dear) if ahead else gradient.add_(dear, alpha=price)
        super().step(gradients, loss)

    def price(self, loss: Loss) -> Any:
        """Price of a nat of drift in a step on a batch with this loss."""
        known = loss.clamp(min=LEARNT) if isinstance(loss, torch.Tensor) else max(loss, LEARNT)
        return self.settings.curvature_strength * (LEARNT / known)

    def drift_gradient(self, name: str) -> torch.Tensor:
        """Gradient of the predicted drift at the current value of a parameter."""
        return self.curvature[name].gradient(self.weights[name] - self.base[name])
