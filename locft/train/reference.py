"""The plain computation: a full forward pass through every layer over padded rows. The reference for every faster path.

Legend: B rows, T tokens, K supervised tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
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
        before = [(index, at - 1) for index, row in enumerate(rows) for at in range(row.start, len(row.token_ids))]
        index, column = torch.tensor(
            before, device=model.device
        ).T  # (K,), (K,): each token is predicted one to its left
        return logits[index, column].float()  # (K, V)

    return supervised_logits


def pad_rows(rows: Sequence[TokenRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, both (B, T) int64, padded at the end with token 0."""
    ids = [torch.tensor(row.token_ids) for row in rows]
    input_ids, mask = (pad_sequence(of, batch_first=True) for of in (ids, [torch.ones_like(one) for one in ids]))
    return input_ids.to(device), mask.to(device)
