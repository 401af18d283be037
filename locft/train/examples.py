"""The rows that training draws from: each edit in every format it is trained in, with and without prose before it."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from locft.train.guards import Guards
from locft.train.token_rows import TokenRow


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
