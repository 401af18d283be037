"""Steps that are queued on a GPU without waiting for the ones before.

Whether a step is taken depends on its loss, and whether training goes on, on its gradients. To ask a GPU for a number means to
wait until it has done all that was queued, and then it waits for the next work. So both are decided there, and what was decided
is read once an epoch. On a CPU, where asking costs nothing, a step that is not to be taken is not computed to its end.
"""

import math
from collections.abc import Sequence

import torch

from locft.train.methods import Method
from locft.train.objective import BatchLoss, all_finite


class StepsAhead:
    """Decides about steps on a device, with the same outcome, so that the next ones can be queued before it is known.

    A step that is not to be taken is one that Adam is told to leave out, as it is told by a gradient scaler.
    """

    def __init__(self, device: torch.device, skip_below: float):
        self.skip_below = skip_below
        self.outcome = torch.zeros(2, dtype=torch.long, device=device)
        """Steps taken, and 1 once the training diverged: no step is taken from then on."""

    def step(
        self,
        method: Method,
        numbers: torch.Tensor,
        gradients: Sequence[torch.Tensor],
        beside: float | torch.Tensor = 0.0,
    ) -> None:
        """Take the step if a training that waits for the loss would. numbers: of the `BatchLoss`."""
        value, lost = numbers[0], self.outcome[1]
        asked, finite = self._asked(value), all_finite(gradients)
        taken = asked & finite & (lost == 0)
        lost.logical_or_(~value.isfinite() | (asked & ~finite))
        self.outcome[0].add_(taken)
        method.optimiser.found_inf = (~taken).float()
        method.step(gradients, value, beside)

    def where_asked(self, replayed: BatchLoss) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The gradients of what is replayed and its loss, zero where it is still known."""
        asked = self._asked(replayed.numbers[0])
        kept = [torch.where(asked, gradient, 0.0) for gradient in replayed.gradients or ()]
        return kept, torch.where(asked, replayed.numbers[0], 0.0)

    def _asked(self, value: torch.Tensor) -> torch.Tensor:
        return (value >= self.skip_below) & (value < math.inf)
