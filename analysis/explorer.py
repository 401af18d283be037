"""What the page needs to be explored: its trials by module and layer, and the order in which the rule takes settings.

The script (`explore.js`) knows no rule of its own. The settings come in the order of preference
(`analysis.pareto.by_preference`); the pick at a floor of reliability is the first one shown that reaches it, which is what
`recommend(results, floor)` gives.
"""

from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from analysis.gallery import script_json
from analysis.pareto import Recommendation, by_preference


@dataclass(frozen=True)
class Explorer:
    """The controls of the page and the data behind them."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    data: Markup
    """JSON: modules, layers, floor (of the rule), best (reliability); settings ([trial ids, layer, index of the module,
    reliability, run], the preferred first); others ([trial id, layer, index of the module]), trials that belong to none."""


def explorer(results: pd.DataFrame, settings: pd.DataFrame, pick: Recommendation | None) -> Explorer | None:
    """None where there is nothing to choose: no pick, or a single setting."""
    ordered = by_preference(settings)
    if pick is None or len(ordered) < 2:
        return None
    modules = tuple(dict.fromkeys(map(str, results["module"])))
    layers = tuple(sorted({int(layer) for layer in results["layer"]}))
    index = {name: place for place, name in enumerate(modules)}
    known = {trial for row in ordered for trial in row["trial_ids"]}
    others = [
        [trial, int(layer), index[str(module)]]
        for trial, layer, module in zip(results["trial_id"], results["layer"], results["module"], strict=True)
        if trial not in known
    ]
    best = max(row["reliability"] for row in ordered)
    data = {
        "modules": modules,
        "layers": layers,
        "floor": pick.floor,
        "best": best,
        "settings": [
            [row["trial_ids"], int(row["layer"]), index[str(row["module"])], row["reliability"], row["run_id"]]
            for row in ordered
        ],
        "others": others,
    }
    return Explorer(modules, layers, script_json(data))
