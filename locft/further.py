"""Ordinary fine-tuning of all weights after an edit: what happens to a deployed model next, and to its edits with it.

Legend: B windows of a step, T tokens of each.
"""

import copy
import random
from collections.abc import Sequence
from dataclasses import replace

import torch

from locft.errors import InputError
from locft.model.delta import EditDelta, applied
from locft.model.models import DTYPES, LoadedModel
from locft.train.token_rows import TokenRow, windows

WINDOWS, TOKENS = 8, 64
"""B and T of the legend."""
RATE, CLIP = 5e-5, 1.0
"""AdamW's learning rate, decaying linearly to 0, and the gradient norm's limit; like B, defaults of transformers' `Trainer`."""
ENOUGH = 64
"""Windows of prose that suffice; if there are fewer, background text is added."""


def further_trained(
    loaded: LoadedModel, delta: EditDelta, rows: Sequence[TokenRow], steps: int, precision: str, seed: int
) -> EditDelta:
    """Difference of all weights from the unedited model after the edit and `steps` steps of fine-tuning on text.

    rows: of running text, cut into windows of T tokens; each step draws its own. precision: that of the products; weights
    and optimiser are float32. The model is left unchanged. Raises InputError if no row is that long.
    """
    texts = [window.token_ids for window in windows(rows, TOKENS) if len(window.token_ids) == TOKENS]
    if not texts:
        raise InputError(
            f"further_steps: no text of {TOKENS} tokens to train on; set capability.prose to a longer text"
        )
    with applied(loaded, delta):
        model = copy.deepcopy(loaded.model).float().requires_grad_()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    falling = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=max(1, steps))
    drawn = random.Random(seed)
    for _ in range(steps):
        batch = drawn.sample(texts, min(WINDOWS, len(texts)))
        ids = torch.tensor(batch, device=loaded.model.device)  # (B, T)
        with torch.autocast(ids.device.type, DTYPES[precision], enabled=precision != "float32"):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimiser.step()
        optimiser.zero_grad()
        falling.step()
    base = dict(loaded.model.named_parameters())
    tensors = {name: (value.detach() - base[name].detach().float()).cpu() for name, value in model.named_parameters()}
    return replace(delta, position="0.layer", tensors=tensors)
