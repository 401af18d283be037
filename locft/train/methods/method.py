"""What a method of training is: which weights stand in for the model's, and what a step does to them."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

MethodName = Literal["full", "low_curvature", "natural_gradient", "lora", "adalora", "norm_bounded"]
HELD_BACK: tuple[MethodName, ...] = ("low_curvature", "natural_gradient")
"""The methods that need the curvature of the trained parameters."""


@dataclass(frozen=True)
class MethodSettings:
    """The part of `locft.train.pipelines.TrainingSettings` that methods read."""

    learning_rate: float = 5e-4
    """Adam's; natural_gradient has none. Small models need a larger one (4e-3 at 135M parameters)."""
    method: MethodName = "full"
    """How the change of the weights is parametrised and held back: a file each in `locft.train.methods`."""
    curvature_strength: float = 10.0
    """low_curvature, natural_gradient: nats of edit loss that a nat of predicted drift counts."""
    rank: int = 8
    """lora: of the change of each matrix. adalora: on average over the matrices, at the end."""
    alpha: float = 16.0
    """lora, adalora: the change is scaled by alpha / rank (adalora: the rank it starts with)."""
    norm_bound: float = 5e-4
    """norm_bounded: largest change of a single weight; depth_first: by each batch."""
    precision: str = "float32"
    """What is computed in during training: float32 or bfloat16. The trained weights are always float32, and the full
    forward computes in the model's own dtype."""
    seed: int = 0
    """Decides the order of the edits, and everything else that is drawn."""


@dataclass(frozen=True)
class Parameter:
    """A parameter of the trained position."""

    base: torch.Tensor
    """Its value in the unedited model, float32. A matrix is (out, in), or (in, out) where `input_first`; experts stack
    theirs into (experts, ..., ...)."""
    input_first: bool = False
    """The product is `input @ matrix`, as GPT-2 stores it."""
    start: torch.Tensor | None = None
    """The change of an earlier edit, which training goes on with; None starts at the base."""


class Method(ABC):
    """One training of one position. The pipelines take gradients at `weights` and hand them to `step`.

    Gradients are those of the dense weights, whatever a method trains: it passes them on to its own parameters. So a
    batch that is computed in pieces, and every forward, serves all methods.
    """

    def __init__(self, parameters: Mapping[str, Parameter]):
        self.base = {name: parameter.base for name, parameter in parameters.items()}
        self.origin = {
            name: parameter.base if parameter.start is None else parameter.base + parameter.start
            for name, parameter in parameters.items()
        }
        """Where training starts: the base, or an earlier edit of it."""
        self.weights = {name: value.clone().requires_grad_() for name, value in self.origin.items()}
        """Parameter name -> float32 tensor that stands in for the model's own."""

    @abstractmethod
    def restart(self) -> None:
        """Forget all momentum: what was trained so far becomes where the next edit starts."""

    @abstractmethod
    def step(
        self, gradients: Sequence[torch.Tensor], loss: float | torch.Tensor, beside: float | torch.Tensor = 0.0
    ) -> None:
        """One optimiser step.

        gradients: of all that is to fall, in the order of `weights`; they may be overwritten. loss: of the batch's edits,
        in nats; a tensor () where nobody waits for its number, which only a method gets that `needs_no_number`. beside: the
        loss of edits that are replayed.
        """

    needs_no_number = False
    """Whether a step does nothing where Adam is told to leave everything as it is, and can do without the number of the
    loss (`locft.train.steps_ahead`)."""

    optimiser: torch.optim.Optimizer
    """Made anew by `restart`."""

    def stepped(self) -> dict[str, torch.Tensor]:
        """The tensors that steps change, by name, besides the optimiser's."""
        return {f"weights/{name}": weight for name, weight in self.weights.items()}

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that steps change, by name. A method made with the same arguments goes on from it (`restore`)."""
        of_adam = self.optimiser.state_dict()["state"].items()
        return self.stepped() | {f"adam/{place}/{key}": value for place, own in of_adam for key, value in own.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, torch.Tensor]) -> None:
        """Become what `state` was taken of. Raises KeyError for the state of another method."""
        for name, tensor in self.stepped().items():
            tensor.copy_(state[name])
        of_adam: dict[int, dict[str, torch.Tensor]] = {}
        for name in state:
            kind, _, rest = name.partition("/")
            if kind == "adam":
                place, _, key = rest.partition("/")
                of_adam.setdefault(int(place), {})[key] = state[name]
        self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": of_adam})

    def change(self) -> dict[str, torch.Tensor]:
        """Difference of the weights from the base, on the CPU."""
        return {name: (self.weights[name].detach() - self.base[name]).cpu() for name in self.base}


def adam(tensors: Iterable[torch.Tensor], learning_rate: float) -> torch.optim.Adam:
    """The optimiser of every method (the paper's): no weight decay."""
    return torch.optim.Adam(list(tensors), lr=learning_rate, weight_decay=0.0, fused=True)
