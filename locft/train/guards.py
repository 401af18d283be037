"""Guards: prompts on which training holds the model's answers to those of the unedited model.

Legend: K supervised tokens of the guards of a step, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

from locft.train.token_rows import SupervisedLogits, TokenRow

KEPT_BYTES = 2**29
"""Limit on keeping the unedited model's predictions on the guards of one kind; if they would take more, none are kept."""

Guard = Literal["none", "same_relation", "locality_like", "prose"]


@dataclass(frozen=True)
class Guards:
    """Rows on whose supervised tokens the edited model should predict what the unedited model predicts."""

    rows: tuple[TokenRow, ...]
    unedited: SupervisedLogits
    _known: dict[TokenRow, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def gradients(
        self,
        logits: SupervisedLogits,
        trained: Sequence[torch.Tensor],
        weight: float,
        count: int,
        draws: torch.Generator,
    ) -> Sequence[torch.Tensor]:
        """Gradients of `weight` times the mean KL(unedited || edited) over the supervised tokens of `count` drawn rows.

        trained: the tensors that `logits` is a function of.
        """
        drawn = torch.randperm(len(self.rows), generator=draws)[:count].tolist()
        rows = [self.rows[index] for index in drawn]
        before = torch.cat([self._before(row) for row in rows])  # (K, V)
        after = logits(rows).log_softmax(-1)
        loss = weight * F.kl_div(after, before, reduction="batchmean", log_target=True)
        return torch.autograd.grad(loss, trained)

    @torch.no_grad()
    def _before(self, row: TokenRow) -> torch.Tensor:
        """The unedited model's log-probabilities, kept unless those of all rows would be too large."""
        if row in self._known:
            return self._known[row]
        found = self.unedited([row]).log_softmax(-1)
        if sum(len(other.target_ids) for other in self.rows) * found.shape[1] * found.itemsize <= KEPT_BYTES:
            self._known[row] = found
        return found
