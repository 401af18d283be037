"""The formats in which edits are asked, and their names in metrics and text: "reliability.chat" is reliability in the
chat template."""

import math
from collections.abc import Mapping
from typing import Any

FORMATS = ("raw", "qa", "chat")
"""The standard formats, in order; the user's own wordings follow, and `unseen` comes last."""
ONE_EDIT = {"method": "natural_gradient", "train_formats": ",".join(FORMATS), "epochs": 100, "rest_below": 0.05}
"""How a single edit is trained by default, where that differs from the axes' defaults: chat models are served through their
template, three forms take more steps than one, and what is learnt rests meanwhile. Why: docs/methods.md, "Edits that hold"."""


def by_format(row: Mapping[str, Any], metric: str) -> dict[str, float]:
    """Format -> reliability or generalization in it; empty unless several were asked."""
    names = [name for name in row if name.startswith(f"{metric}.") and math.isfinite(row[name])]
    return {name.partition(".")[2]: float(row[name]) for name in names} if len(names) > 1 else {}


def format_title(name: str) -> str:
    """The display name of a format. A wording of the user's goes by its first words, as in metrics."""
    return {"qa": "Q/A", "unseen": "a wording never trained"}.get(name, name)
