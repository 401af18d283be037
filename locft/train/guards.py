"""Guards: prompts whose answers training holds to the unedited model's.

Legend: K supervised tokens of the guards of a step, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from locft.train.encoding import SupervisedLogits, TokenRow
from locft.train.methods import MethodSettings

Guard = Literal["none", "same_relation", "locality_like", "prose"]


@dataclass(frozen=True)
class Guards:
    """Rows on which the edited model is to predict what the unedited one does."""

    rows: tuple[TokenRow, ...]
    unedited: SupervisedLogits

    def gradients(
        self,
        logits: SupervisedLogits,
        trained: Sequence[torch.Tensor],
        settings: MethodSettings,
        draws: torch.Generator,
    ) -> Sequence[torch.Tensor]:
        """Of `guard_weight` times mean KL(unedited || edited) over the supervised tokens of `guards_per_step` drawn rows."""
        raise NotImplementedError
