"""LoRA at a position (arXiv 2106.09685): the change of each matrix is a product of two thin ones.

Legend: O rows and I columns of a matrix as it is stored, R rank. Stacked experts have a leading dimension, and each has
factors of its own.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from locft.train.methods.method import Loss, Method, MethodSettings, Parameter


class LoRA(Method):
    """weights = origin + alpha / rank * B A, with A (R, in) and B (out, R) trained by Adam; A starts Kaiming-uniform and B at
    zero, as in peft. Vectors, hence biases and norms, stay as they are.

    A new edit (depth_first) continues with the factors of the previous ones and a new Adam, as EasyEdit's sequential editing
    does. With fresh factors for each edit, the change would no longer have that rank.
    """

    needs_no_number = True

    def __init__(self, parameters: Mapping[str, Parameter], settings: MethodSettings):
        self.scale = settings.alpha / settings.rank
        draws = torch.Generator().manual_seed(settings.seed)
        self.factors = {
            name: _start(parameter, settings.rank, draws)
            for name, parameter in parameters.items()
            if is_matrix(name, parameter.base)
        }
        """Parameter name -> left (..., O, R) and right (..., R, I): B and A, or A' and B' if the input comes first."""
        super().__init__(parameters, settings)

    def trained(self) -> list[torch.Tensor]:
        return [factor for pair in self.factors.values() for factor in pair]

    def stepped(self) -> dict[str, torch.Tensor]:
        pairs = {f"factors/{name}/{side}": self.factors[name][side] for name in self.factors for side in (0, 1)}
        return super().stepped() | pairs

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        for name, gradient in zip(self.weights, gradients, strict=True):
            if name in self.factors:
                left, right = self.factors[name]
                left.grad = gradient @ (self.scale * right).mT
                right.grad = (self.scale * left).mT @ gradient
        self.optimiser.step()
        for name, (left, right) in self.factors.items():
            torch.add(self.origin[name], left @ right, alpha=self.scale, out=self.weights[name])


def is_matrix(name: str, value: torch.Tensor) -> bool:
    """Whether a parameter is a matrix, or a stack of them with a leading dimension.

    Not every tensor with two dimensions or more is one: the biases of stacked experts, the kernels of depthwise
    convolutions, Mamba's decay rates and RWKV's mixing weights are not.
    """
    return (value.dim() == 3 or (value.dim() == 2 and name.endswith("weight"))) and min(value.shape[-2:]) > 1


def _start(parameter: Parameter, rank: int, draws: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    *experts, rows, columns = parameter.base.shape
    width = rows if parameter.input_first else columns
    drawn = torch.rand(*experts, rank, width, generator=draws).to(parameter.base.device)
    a = (2 * drawn - 1) / math.sqrt(width)  # the same as kaiming_uniform_(a=sqrt(5)) for a matrix (R, width)
    if parameter.input_first:
        return a.mT.contiguous(), a.new_zeros(*experts, rank, columns)
    return a.new_zeros(*experts, rows, rank), a
