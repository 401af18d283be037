"""Plain localized fine-tuning (arXiv 2509.22072): the weights themselves are trained, without any constraint."""

from collections.abc import Sequence

import torch

from locft.train.methods.method import Loss, Method


class FullFineTuning(Method):
    needs_no_number = True

    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        for weight, gradient in zip(self.weights.values(), gradients, strict=True):
            weight.grad = gradient
        self.optimiser.step()
