"""The rows that training draws from: each edit in every format it is trained in, with and without prose before it, and guards.

Guards are prompts on which training holds the model's answers to those of the unedited model.
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

    def drift(self, logits: SupervisedLogits, count: int, draws: torch.Generator) -> torch.Tensor:
        """Mean KL(unedited || edited) over the supervised tokens of `count` drawn rows, in nats."""
        rows = [self.rows[index] for index in torch.randperm(len(self.rows), generator=draws)[:count].tolist()]
        before = torch.cat([self._before(row) for row in rows])  # (K, V), of K supervised tokens in a vocabulary of V
        return F.kl_div(logits(rows).log_softmax(-1), before, reduction="batchmean", log_target=True)

    @torch.no_grad()
    def _before(self, row: TokenRow) -> torch.Tensor:
        """The unedited model's log-probabilities, kept unless those of all rows would be too large."""
        if row in self._known:
            return self._known[row]
        found = self.unedited([row]).log_softmax(-1)
        if sum(len(other.target_ids) for other in self.rows) * found.shape[1] * found.itemsize <= KEPT_BYTES:
            self._known[row] = found
        return found


@dataclass(frozen=True)
class TrainingExamples:
    """The rows of one training."""

    raw: tuple[TokenRow, ...]
    """One per edit, with the prompt as it is: the loss at the end is computed on these."""
    plain: tuple[tuple[TokenRow, ...], ...]
    """For each edit, its prompt in each trained format."""
    prefixed: tuple[tuple[TokenRow, ...], ...] = ()
    """For each edit, the same prompts preceded by random prose, several for each format. Empty without prefixes."""
    prefix_share: float = 0.0
    guards: Guards | None = None

    def __len__(self) -> int:
        """Number of edits."""
        return len(self.raw)

    @classmethod
    def of_rows(cls, rows: Sequence[TokenRow]) -> "TrainingExamples":
        """One row per edit, always the same."""
        return cls(tuple(rows), tuple((row,) for row in rows))

    @property
    def rows(self) -> tuple[TokenRow, ...]:
        """Every row that training or the loss at its end may need, each once."""
        edits = (row for group in (*self.plain, *self.prefixed) for row in group)
        return tuple(dict.fromkeys((*self.raw, *edits, *(self.guards.rows if self.guards else ()))))

    def draw(self, edit: int, draws: torch.Generator) -> TokenRow:
        """The row of an edit for one step. If there is only one, no random number is drawn."""
        behind_prose = bool(self.prefixed) and float(torch.rand((), generator=draws)) < self.prefix_share
        choices = (self.prefixed if behind_prose else self.plain)[edit]
        return choices[int(torch.randint(len(choices), (), generator=draws))] if len(choices) > 1 else choices[0]
