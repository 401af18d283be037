"""Fine-tuning within a bound on every weight (arXiv 2012.00363, "Modifying Memories in Transformer Models")."""

from collections.abc import Sequence

import torch

from locft.train.methods.full import FullFineTuning
from locft.train.methods.method import Loss


class NormBounded(FullFineTuning):
    """After each step of Adam, every weight is clamped to within `norm_bound` of where it started.

    A new edit (depth_first) starts where the last one ended, as in the fine-tuning of ROME and EasyEdit, which bound the
    change of each edit: the change of all edits together may be larger. Under breadth_first the bound holds for the whole change.
    With `loss_average: last_token` this is FT-L, which EasyEdit also runs without a bound.
    """

    def restart(self) -> None:
        super().restart()
        self.start = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def stepped(self) -> dict[str, torch.Tensor]:
        return super().stepped() | {f"start/{name}": start for name, start in self.start.items()}

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        super().step(gradients, loss)
        bound = self.settings.norm_bound
        for name, weight in self.weights.items():
            weight.clamp_(self.start[name] - bound, self.start[name] + bound)
