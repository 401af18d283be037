"""Steps that lower the loss for the least drift: natural gradient descent in the metric of predicted drift.

The objective is that of `low_curvature`: the loss f of the edits plus a penalty on predicted drift. With its gradient g + p H,
where H is the gradient of the drift, a step is -a P(g + p H). P(g) = (R + r)^-1 g (K + k)^-1 transforms a gradient by the factors
of `locft.train.methods.curvature`: of all changes for which the linear forecast of the loss falls by the same amount, this
one has the least predicted drift (natural gradient with K-FAC, arXiv 1503.05671). The length a makes the forecast of f fall to 0
(Polyak's step size), so there is no learning rate to tune, for any model or position.
"""

from collections.abc import Mapping, Sequence

import torch

from locft.model.models import DTYPES
from locft.train.methods.curvature import Curvature
from locft.train.methods.low_curvature import LowCurvature
from locft.train.methods.method import Loss, MethodSettings, Parameter

DAMPING = 0.5
"""Share of the median of a factor's diagonal that is added to each of its eigenvalues: it sets how far directions that prose
hardly uses are trusted to be free."""
MOST_DRIFT = 1e-4
"""Maximum predicted drift of a single step, in nats per edit of a batch: where the loss hardly depends on the weights, the
forecast says nothing. The drift that a step needs grows with the edits that it teaches."""
LEAST_SLOPE = 1e-30
"""Floor on the slope, for a loss that depends on no weight."""


class NaturalGradient(LowCurvature):
    def __init__(
        self, parameters: Mapping[str, Parameter], settings: MethodSettings, curvature: Mapping[str, Curvature]
    ):
        super().__init__(parameters, settings, curvature)
        dtype = DTYPES[settings.precision]
        measured = {name: curvature[name].to(value.device) for name, value in self.base.items()}
        inverse = {name: one.inverse(DAMPING) for name, one in measured.items()}
        self.inverse = {name: one.to(dtype=dtype) for name, one in inverse.items()}
        # P(H) as one product from each side instead of two: saves a third of what a step costs apart from its gradient
        self.curvature = {name: one.then(inverse[name]).to(dtype=dtype) for name, one in measured.items()}

    def restart(self) -> None:
        """Nothing is carried from step to step."""
        self.optimiser = torch.optim.SGD(list(self.weights.values()), lr=1.0, fused=True)

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        turned = [self.inverse[name].gradient(own) for name, own in zip(self.base, gradients, strict=True)]
        slopes = [(own * one).sum().double() for own, one in zip(gradients, turned, strict=True)]
        slope = torch.stack(slopes).sum().clamp(min=LEAST_SLOPE)
        most = MOST_DRIFT * self.settings.batch_size
        length = torch.minimum((loss + beside) / slope, (2 * most / slope).sqrt())
        price = self.price(loss)
        for (name, weight), one in zip(self.weights.items(), turned, strict=True):
            weight.grad = one.add_(price * self.drift_gradient(name)).mul_(length)
        self.optimiser.step()
