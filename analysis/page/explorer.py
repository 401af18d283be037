"""What the page needs to be explored: its trials by module and layer, and the order in which the rule takes settings.

The script (`explore.js`) knows no rule of its own. The settings come in the order of preference
(`analysis.stats.pareto.by_preference`); the pick at a floor of reliability is the first one shown that reaches it, which is what
`recommend(results, floor)` gives. Where the page does not show all settings, those that can be the pick are among them.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import pandas as pd
from markupsafe import Markup

from analysis.page.gallery import script_json
from analysis.stats.pareto import Recommendation, by_preference, pickable


@dataclass(frozen=True)
class Explorer:
    """The controls of the page and the data behind them."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    data: Markup
    """JSON: modules, layers, floor (of the rule), best (reliability), left_out (settings that the page does not show);
    settings ([trial ids, layer, index of the module, reliability, run, number of the list of its wrong answers or null],
    the preferred first); others ([trial id, layer, index of the module]), trials shown that belong to none."""


def explorer(
    results: pd.DataFrame,
    settings: pd.DataFrame,
    pick: Recommendation | None,
    shown: Collection[str],
    misses: Mapping[str, int],
) -> Explorer | None:
    """None where there is nothing to choose: no pick, or a single setting.

    shown: the trials that figures and tables show. misses: trial_id -> number of the list of its wrong answers.
    """
    preferred = by_preference(settings)
    if pick is None or len(preferred) < 2:
        return None
    wanted = {*shown, *pickable(settings)}
    ordered = [row for row in preferred if not wanted.isdisjoint(row["trial_ids"])]
    modules = tuple(dict.fromkeys(map(str, results["module"])))
    layers = tuple(sorted({int(layer) for layer in results["layer"]}))
    index = {name: place for place, name in enumerate(modules)}
    others = wanted.difference(*(row["trial_ids"] for row in ordered))
    data = {
        "modules": modules,
        "layers": layers,
        "floor": pick.floor,
        "best": max(row["reliability"] for row in ordered),
        "left_out": len(preferred) - len(ordered),
        "settings": [
            [
                row["trial_ids"], int(row["layer"]), index[str(row["module"])], row["reliability"], row["run_id"],
                misses.get(row["trial_id"]),
            ]
            for row in ordered
        ],
        "others": [
            [trial, int(layer), index[str(module)]]
            for trial, layer, module in zip(results["trial_id"], results["layer"], results["module"], strict=True)
            if trial in others
        ],
    }  # fmt: skip
    return Explorer(modules, layers, script_json(data))
