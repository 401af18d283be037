"""What the page needs to be explored: its trials by module and layer, and the order in which the rule takes settings.

The script (`explore.js`) knows no rule of its own. The settings come in the order of preference
(`analysis.pareto.by_preference`); the pick at a floor of reliability is the first one shown that reaches it, which is what
`recommend(results, floor)` gives.
"""

import math
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup

from analysis.gallery import script_json
from analysis.pareto import Recommendation, by_preference
from analysis.wording import change_with_interval, number, percent


@dataclass(frozen=True)
class Explorer:
    """The controls of the page and the data behind them."""

    modules: tuple[str, ...]
    layers: tuple[int, ...]
    floor: float
    """The reliability that the rule asked for."""
    highest: float
    """The best reliability: where the slider ends."""
    n_settings: int
    data: Markup
    """JSON: modules, layers, floor, best; settings ([trial id, reliability, position, text, run], the preferred first);
    trials (trial id -> [layer, index of the module, trial id of its setting or null])."""


def explorer(results: pd.DataFrame, settings: pd.DataFrame, pick: Recommendation | None) -> Explorer | None:
    """None where there is nothing to choose: no pick, or a single setting."""
    ordered = by_preference(settings)
    if pick is None or len(ordered) < 2:
        return None
    modules = tuple(dict.fromkeys(map(str, results["module"])))
    layers = tuple(sorted({int(layer) for layer in results["layer"]}))
    of_trial = {trial: row["trial_id"] for row in ordered for trial in row["trial_ids"]}
    place = {name: index for index, name in enumerate(modules)}
    trials = {
        trial: [int(layer), place[str(module)], of_trial.get(trial)]
        for trial, layer, module in zip(results["trial_id"], results["layer"], results["module"], strict=True)
    }
    best = max(row["reliability"] for row in ordered)
    data = {
        "modules": modules,
        "layers": layers,
        "floor": pick.floor,
        "best": best,
        "settings": [
            [row["trial_id"], row["reliability"], f"{row['layer']}.{row['module']}", _said(row), row["run_id"]]
            for row in ordered
        ],
        "trials": trials,
    }
    return Explorer(modules, layers, pick.floor, best, len(ordered), script_json(data))


def _said(row: dict[str, Any]) -> str:
    """Settings and figures of a setting in a line."""
    parts = [f"reliability {percent(row['reliability'])}"]
    if math.isfinite(row["generalization"]):
        parts.append(f"generalization {percent(row['generalization'])}")
    if math.isfinite(row["capability_change"]):
        ends = (row[f"capability_change{end}"] for end in ("", "_low", "_high"))
        parts.append(f"capability change {change_with_interval(*ends)}")
    elif math.isfinite(row["capability"]):
        parts.append(f"capability {percent(row['capability'])}")
    if math.isfinite(row["drift_kl"]):
        parts.append(f"drift {number(row['drift_kl'])} nats")
    pipeline = str(row["pipeline"]).replace("_first", "-first")
    return f"{', '.join(parts)} ({pipeline}, batch {number(row['batch_size'])}, rate {number(row['learning_rate'])})"
