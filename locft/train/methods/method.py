"""The interface of a training method: which weights stand in for the model's, and what a step does to them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch

MethodName = Literal["full", "low_curvature", "natural_gradient", "lora", "adalora", "norm_bounded"]
HELD_BACK: tuple[MethodName, ...] = ("low_curvature", "natural_gradient")
"""The methods that need the curvature of the trained parameters."""
Loss: TypeAlias = float | torch.Tensor
"""A loss in nats; a tensor () if steps do not wait for its value."""


@dataclass(frozen=True)
class MethodSettings:
    """The part of `locft.train.pipelines.TrainingSettings` that methods read."""

    learning_rate: float = 5e-4
    """Adam's; natural_gradient has none. Small models need a larger one (4e-3 at 135M parameters)."""
    method: MethodName = "full"
    """How the change of the weights is parametrised and held back: one file per method in `locft.train.methods`."""
    curvature_strength: float = 10.0
    """low_curvature, natural_gradient: nats of edit loss that a nat of predicted drift costs."""
    rank: int = 8
    """lora: rank of the change of each matrix. adalora: mean rank over the matrices at the end."""
    alpha: float = 16.0
    """lora, adalora: the change is scaled by alpha / rank (adalora: the rank it starts with)."""
    norm_bound: float = 5e-4
    """norm_bounded: largest change of a single weight; depth_first: by each batch; stream with fresh momentum: by each arrival."""
    batch_size: int = 32
    """Edits per optimiser step."""
    precision: str = "float32"
    """The dtype that training computes in: float32 or bfloat16. The trained weights are always float32, and the full
    forward computes in the model's own dtype."""
    seed: int = 0
    """Determines the order of the edits and everything else that is drawn."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the trained position."""

    base: torch.Tensor
    """Its value in the unedited model, float32. A matrix is (out, in), or (in, out) if `input_first`; those of experts
    are stacked into (experts, ..., ...)."""
    input_first: bool = False
    """The product is `input @ matrix`, as GPT-2 stores it."""
    start: torch.Tensor | None = None
    """The change made by earlier edits, from which training continues; None starts at the base."""


class Method(ABC):
    """One training of one position. The pipelines take gradients at `weights` and hand them to `step`.

    Gradients are those of the dense weights, whatever a method trains: it passes them on to its own parameters. So every
    forward, and batches that are computed in pieces, work with all methods.
    """

    def __init__(self, parameters: Mapping[str, Parameter], settings: MethodSettings):
        """A method that trains other tensors than the weights makes them first."""
        self.settings = settings
        self.base = {name: parameter.base for name, parameter in parameters.items()}
        self.origin = {
            name: parameter.base if parameter.start is None else parameter.base + parameter.start
            for name, parameter in parameters.items()
        }
        """Where training starts: the base, with the change of earlier edits if there is one."""
        self.weights = {name: value.clone().requires_grad_() for name, value in self.origin.items()}
        """Parameter name -> float32 tensor that stands in for the model's own."""
        self.restart()

    def trained(self) -> list[torch.Tensor]:
        """The tensors that the optimiser steps."""
        return list(self.weights.values())

    def restart(self) -> None:
        """Discard all momentum: the next edit starts from what has been trained so far."""
        rate = self.settings.learning_rate
        self.optimiser: torch.optim.Optimizer = torch.optim.Adam(self.trained(), lr=rate, weight_decay=0.0, fused=True)

    @abstractmethod
    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        """One optimiser step.

        gradients: those of everything to be minimised, in the order of `weights`; they may be overwritten. loss: that of the
        batch's edits; a tensor requires `needs_no_number`. beside: the loss of replayed edits.
        """

    needs_no_number = False
    """Whether a step changes nothing if the optimiser's `found_inf` is set, and works without the loss as a Python number
    (`PositionTrainer.ahead`)."""

    def stepped(self) -> dict[str, torch.Tensor]:
        """The tensors that steps change, by name, other than the optimiser's."""
        return {f"weights/{name}": weight for name, weight in self.weights.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that steps change, by name. A method made with the same arguments can continue from it (`restore`)."""
        of_adam = self.optimiser.state_dict()["state"].items()
        return self.stepped() | {f"adam/{place}/{key}": value for place, own in of_adam for key, value in own.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Return to the point at which `state` was taken. Raises KeyError for the state of another method."""
        for name, tensor in self.stepped().items():
            tensor.copy_(state[name])
        of_adam: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in state.items():
            if name.startswith("adam/"):
                _, place, key = name.split("/")
                of_adam.setdefault(int(place), {})[key] = tensor
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": of_adam})

    def change(self) -> dict[str, torch.Tensor]:
        """Difference of the weights from the base, on the CPU."""
        return {name: (self.weights[name].detach() - self.base[name]).cpu() for name in self.base}
