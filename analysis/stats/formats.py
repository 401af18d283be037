"""The formats in which edits are asked, as metrics and texts name them: "reliability.chat" is reliability in the chat
template."""

import math
from collections.abc import Mapping
from typing import Any

FORMATS = ("raw", "qa", "chat")
"""The usual ones in their order; wordings of the user's follow, and `unseen` is the last."""
ONE_EDIT = {"method": "natural_gradient", "train_formats": ",".join(FORMATS), "epochs": 100, "rest_below": 0.05}
"""How a single edit is trained unless told otherwise, where that differs from the axes' defaults: people serve chat models
through their template, three forms take more steps than one, and what is learnt rests meanwhile. Why: docs/methods.md, "Edits that hold"."""
TITLES = {"raw": "raw", "qa": "Q/A", "chat": "chat", "unseen": "a wording never trained"}
"""Others are wordings of the user, which metrics name by their first words."""


def by_format(row: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Format -> reliability or generalization in it, where several were asked; else nothing."""
    names = [name for name in row if name.startswith(f"{metric}.") and math.isfinite(row[name])]
    return {name.partition(".")[2]: float(row[name]) for name in names} if len(names) > 1 else {}


def format_title(name: str) -> str:
    """A format in words."""
    return TITLES.get(name, name)
