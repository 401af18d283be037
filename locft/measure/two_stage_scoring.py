"""Coarse first: a decision with a wide margin needs no exact computation.

Scoring a capability suite is a long list of decisions (is the right choice the likeliest?), and matrix products are its
cost. Where the hardware multiplies bfloat16 natively, products in that precision take half the time or less. They shift
a margin by some hundredths of a nat, while most margins are several nats wide. So every decision is first made
coarsely; those whose margin is not far larger than the shifts that were seen are then made again, exactly. The final
decisions are those of the exact computation (`locft bench` counts the ones that differ).
"""

import math
from collections.abc import Callable

import numpy as np

SAFETY = 8.0
"""A coarse decision stands if its margin is more than this many times the root mean square of the shifts seen."""
FEWEST, SHARE = 16, 0.05
"""The closest decisions, at least so many and at least this share of all, are always made exactly: they show the
shifts."""


def retake(margins: np.ndarray, exactly: Callable[[list[int]], np.ndarray]) -> None:
    """Have the close decisions made again.

    margins: of the coarse decisions, how far each is from falling the other way, at least 0. exactly: makes the
    decisions with these indices again and returns by how much each margin had shifted.
    """
    order = np.argsort(margins, kind="stable")
    ordered = margins[order]
    done, upto = 0, min(len(order), max(FEWEST, math.ceil(SHARE * len(order))))
    squares = 0.0
    while done < upto:
        squares += float((np.nan_to_num(exactly(order[done:upto].tolist()), nan=math.inf) ** 2).sum())
        reach = SAFETY * math.sqrt(squares / upto)
        done, upto = upto, max(upto, int(np.searchsorted(ordered, reach, side="right")))
