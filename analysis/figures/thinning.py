"""Which marks a figure draws where there are more than it can show, or than a page of bounded size can hold."""

import random
from collections.abc import Collection, Sequence


def thinned(ids: Sequence[str], keep: Collection[str], most: int) -> frozenset[str]:
    """At most so many of these ids: those to keep, however many they are, then a random sample of the rest. A random
    one, as every tenth setting of a grid would be the same learning rate; always the same one for the same ids."""
    kept = [one for one in ids if one in keep]
    rest = [one for one in ids if one not in keep]
    room = max(0, most - len(kept))
    return frozenset(kept + (rest if len(rest) <= room else random.Random(0).sample(rest, room)))
