"""Coarse first: what is decided by a wide margin needs no exact computation.

Scoring a capability suite is a long list of decisions (is the right choice the likeliest?), and matrix products are its
cost. Where the hardware multiplies bfloat16 natively, products in that precision take half the time or less and shift a
margin by some hundredths of a nat, while most margins are of several nats. So every decision is first taken coarsely; those whose margin is not far larger
than any shift that was seen are then taken again, exactly. The decisions that come out are those of the exact
computation; `locft bench` counts the differing ones.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from locft.model.precision import training_precision

SAFETY = 8.0
"""A decision stands when its margin is so many times the root mean square of the shifts seen."""
FEWEST, SHARE = 16, 0.05
"""At least so many decisions, and this share of them, are always taken exactly: the closest ones. They show the shifts."""


def coarse_pays(model: PreTrainedModel) -> bool:
    """Whether coarse products of this model's numbers would be faster here than exact ones."""
    return model.dtype == torch.float32 and training_precision(model.device.type) == "bfloat16"


def retake(margins: np.ndarray, exactly: Callable[[list[int]], np.ndarray]) -> None:
    """Have the close decisions taken again.

    margins: of the coarse decisions, at least 0, how far each is from falling the other way. exactly: takes the decisions
    of these indices again and returns by how much each margin had shifted.
    """
    order = np.argsort(margins, kind="stable")
    ordered = margins[order]
    done, upto = 0, min(len(order), max(FEWEST, math.ceil(SHARE * len(order))))
    squares = 0.0
    while done < upto:
        squares += float((np.nan_to_num(exactly(order[done:upto].tolist()), nan=math.inf) ** 2).sum())
        reach = SAFETY * math.sqrt(squares / upto)
        done, upto = upto, max(upto, int(np.searchsorted(ordered, reach, side="right")))


@contextmanager
def coarse_products() -> Iterator[None]:
    """In here, products of float32 matrices round their factors to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
