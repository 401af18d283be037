"""Steps that are queued on a GPU without waiting for the previous ones.

Whether a step is taken depends on its loss, and whether training continues depends on its gradients. Reading a number from a GPU
means waiting until all queued work is done, and the GPU then idles until more arrives. So both decisions are made on the GPU, and
their outcome is read once an epoch. On a CPU, where reading costs nothing, a step that is skipped is not computed to its end.
"""

import math
from collections.abc import Sequence

import torch

from locft.train.methods import Method
from locft.train.objective import BatchLoss, all_finite


class StepsAhead:
    """Decides on the device whether steps are taken, with the same outcome as when waiting, so that more can be queued.

    A step is skipped by setting the optimiser's `found_inf`, as a gradient scaler does.
    """

    def __init__(self, device: torch.device, skip_below: float):
        self.skip_below = skip_below
        self.outcome = torch.zeros(2, dtype=torch.long, device=device)
        """Number of steps taken, and a flag that is 1 once the training has diverged: no step is taken from then on."""

    def step(
        self,
        method: Method,
        numbers: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        beside: float | torch.Tensor = 0.0,
    ) -> None:
        """Take the step if a training that waits for the loss would take it. numbers: those of the `BatchLoss`."""
        value, lost = numbers[0], self.outcome[1]
        asked, finite = self._asked(value), all_finite(gradients)
        taken = asked & finite & (lost == 0)
        lost.logical_or_(~value.isfinite() | (asked & ~finite))
        self.outcome[0].add_(taken)
        method.optimiser.found_inf = (~taken).float()
        method.step(gradients, value, beside)

    def where_asked(self, replayed: BatchLoss) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The gradients and the loss of replayed edits, zero if they are still learnt."""
        asked = self._asked(replayed.numbers[0])
        kept = [torch.where(asked, gradient, 0.0) for gradient in replayed.gradients or ()]
        return kept, torch.where(asked, replayed.numbers[0], 0.0)

    def _asked(self, value: torch.Tensor) -> torch.Tensor:
        return (value >= self.skip_below) & (value < math.inf)
