"""The plain computation: a full forward pass through every layer over padded rows. The reference for every faster path.

Legend: B rows, T tokens, K supervised tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from locft.train.token_rows import SupervisedLogits, TokenRow


def full_forward(model: PreTrainedModel, weights: Mapping[str, torch.Tensor] | None = None) -> SupervisedLogits:
    """The model as a function from rows to the logits of their supervised tokens.

    `weights` replace the parameters of the same names, cast to each parameter's own dtype; gradients flow to them. The
    model itself is never modified. Rows are padded at the end to the longest, so positions start at 0 in every row
    and, attention being causal, padding changes no supervised logit.
    """
    substitutes = {name: value.to(model.get_parameter(name).dtype) for name, value in (weights or {}).items()}

    def supervised_logits(rows: Sequence[TokenRow]) -> torch.Tensor:
        input_ids, attention_mask = pad_rows(rows, model.device)  # (B, T)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        logits = functional_call(model, substitutes, kwargs=inputs).logits  # (B, T, V)
        row, column = supervised_positions(rows, model.device)  # (K,), (K,)
        return logits[row, column].float()  # (K, V)

    return supervised_logits


def pad_rows(rows: Sequence[TokenRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T) int64, padded at the end with token 0."""
    longest = max(len(row.token_ids) for row in rows)
    input_ids = torch.zeros(len(rows), longest, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for index, row in enumerate(rows):
        input_ids[index, : len(row.token_ids)] = torch.tensor(row.token_ids)
        attention_mask[index, : len(row.token_ids)] = 1
    return input_ids.to(device), attention_mask.to(device)


def supervised_positions(rows: Sequence[TokenRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column, each (K,), of the position that predicts each supervised token: one to the left of the token."""
    row = [index for index, r in enumerate(rows) for _ in r.target_ids]
    column = [position - 1 for r in rows for position in range(r.start, len(r.token_ids))]
    return torch.tensor(row, device=device), torch.tensor(column, device=device)
