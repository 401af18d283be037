"""What the page needs to be explored: its trials by module and layer, and what the last steps of the rule look at.

The script (`explore.js`) applies these steps to the settings that its controls leave: enough reliability, no loss of
capability, drift within the margin, then the first in the order of generalization. With a floor of reliability that gives
`analysis.stats.pick.recommend` of these settings; without one, reliable is what is so in the whole study.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import pandas as pd

from analysis.stats.pareto import SAME
from analysis.stats.pick import DRIFT_MARGIN, evidence_of, preference, ranked

FIELDS = (
    "ids", "layer", "module", "run", "misses", "reliable", "reliability", "generalization", "change", "high", "drift",
)  # fmt: skip


def explorer(
    results: pd.DataFrame, settings: pd.DataFrame, misses: Mapping[str, int], shown: Collection[str]
) -> dict[str, Any] | None:
    """What the controls and their script need; None where there is nothing to choose: fewer than two settings that can be
    picked.

    misses: trial_id -> number of the list of its wrong answers. shown: the trials that figures and tables show.

    Returns modules and layers; floor (the least reliability among the reliable settings), best (reliability), margin (of
    drift) and same (what counts as a tie); fields, and settings with a list of these each: the trial ids, the module by
    its index, the number of the list of its wrong answers or None, in the order of the rule's last step; others: what else
    is shown (failed and diverged trials, those of another study), each as id, layer and index of the module.
    """
    rows = ranked(settings)
    if len(rows) < 2:
        return None
    modules = tuple(dict.fromkeys(map(str, results["module"])))
    layers = tuple(sorted({int(layer) for layer in results["layer"]}))
    index = {name: place for place, name in enumerate(modules)}
    evidence = evidence_of(rows)
    measured = (evidence.reliability, evidence.generalization, evidence.change, evidence.change_high, evidence.drift)
    columns = (rows[name] for name in ("trial_ids", "layer", "module", "run_id", "reliable"))
    listed = list(zip(*columns, *measured, strict=True))
    ordered = [listed[place] for place in preference(evidence)]
    others = set(shown).difference(*rows["trial_ids"])
    return {
        "modules": modules,
        "layers": layers,
        "floor": float(rows.loc[rows["reliable"], "reliability"].min()),
        "best": float(evidence.reliability.max()),
        "margin": DRIFT_MARGIN,
        "same": SAME,
        "fields": FIELDS,
        "settings": [
            [ids, int(layer), index[str(module)], run, misses.get(ids[0]), int(reliable), *map(_number, numbers)]
            for ids, layer, module, run, reliable, *numbers in ordered
        ],
        "others": [
            [trial, int(layer), index[str(module)]]
            for trial, layer, module in zip(results["trial_id"], results["layer"], results["module"], strict=True)
            if trial in others
        ],
    }


def _number(value: float) -> float | None:
    return round(float(value), 9) if math.isfinite(value) else None
