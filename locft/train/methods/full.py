"""Plain localized fine-tuning (arXiv 2509.22072): the weights themselves are trained, without any constraint."""

from collections.abc import Mapping, Sequence

import torch

from locft.train.methods.method import Method, MethodSettings, Parameter, adam


class FullFineTuning(Method):
    needs_no_number = True

    def __init__(self, parameters: Mapping[str, Parameter], settings: MethodSettings):
        super().__init__(parameters)
        self.learning_rate = settings.learning_rate
        self.restart()

    def restart(self) -> None:
        self.optimiser = adam(self.weights.values(), self.learning_rate)

    def step(
        self, gradients: Sequence[torch.Tensor], loss: float | torch.Tensor, beside: float | torch.Tensor = 0.0
    ) -> None:
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient
        self.optimiser.step()
