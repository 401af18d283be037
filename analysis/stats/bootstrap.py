"""How much of the front is chance: what would be on it, and what the rule would pick, if everything were measured again.

Every draw gives each setting another value of each objective:

- reliability, generalization and locality: where the answers to each edit are known for all settings, the edits are drawn
  again with replacement, the same ones for every setting (which keeps what the settings share); otherwise each setting
  varies by its own standard error, which takes shared edits for chance and so errs towards doubt;
- capability and its change: by the error behind the 95% interval of the paired change, setting by setting. The items are
  shared as well, so this too errs towards doubt;
- between seeds: by their spread over the root of their number, for what is a fraction of prompts;
- what has no interval (a single task's accuracy, an unknown number of edits) is taken as exact.
"""

import math
from dataclasses import dataclass

import moocore
import numpy as np
import pandas as pd

from analysis.stats.intervals import seed_error, standard_error
from analysis.stats.pareto import DEFAULT_OBJECTIVES, SAME, ParetoFront, by_preference, comparable
from analysis.stats.table import FRACTIONS

DRAWS = 1000


@dataclass(frozen=True)
class FrontDoubt:
    """The front over `DRAWS` measurements."""

    chances: dict[str, float]
    """trial_id of each setting -> how often it is on the front."""
    picks: dict[str, float]
    """trial_id -> how often the rule of `recommend` picks it; empty unless the objectives are those of the rule."""
    hypervolume: tuple[float, float]
    """95% interval. The best of many noisy settings reads high, so the draws lie above the measured hypervolume by about
    as much as that lies above the truth; the interval is mirrored to take this off (the basic bootstrap)."""
    by_edit: bool
    """Whether the edits were drawn again, rather than each setting by its error."""


def front_doubt(
    settings: pd.DataFrame, front: ParetoFront, outcomes: pd.DataFrame | None = None, *, seed: int = 0
) -> FrontDoubt:
    """settings: `by_setting(results)`. front: its front. outcomes: per prompt (trial_id, edit_id, kind, correct)."""
    rows = comparable(settings, front.objectives)
    if rows.empty:
        return FrontDoubt({}, {}, (0.0, 0.0), False)
    order = {row["trial_id"]: rank for rank, row in enumerate(by_preference(rows))}
    rows = rows.sort_values("trial_id", key=lambda ids: ids.map(order)).reset_index(drop=True)  # ties: the preferred one
    rng = np.random.default_rng(seed)
    values = rows[list(front.objectives)].to_numpy("float64")  # (settings, objectives)
    known = rows.to_dict("records")
    errors, between = (
        np.nan_to_num([[error(row, name) for name in front.objectives] for row in known])
        for error in (standard_error, seed_error)
    )
    least = [-1.0 if name == "capability_change" else 0.0 for name in front.objectives]
    answered = {name: _by_edit(rows, name, outcomes) for name in front.objectives if name in FRACTIONS}
    answered = {name: found for name, found in answered.items() if found is not None}
    ruled = front.objectives == DEFAULT_OBJECTIVES
    slack = float(np.nan_to_num(rows["reliability_se"].to_numpy("float64"))[values[:, 0].argmax()])
    on, picked, volumes = np.zeros(len(rows)), np.zeros(len(rows)), []
    for _ in range(DRAWS):
        noise = rng.standard_normal(values.shape)
        drawn = values + noise * errors
        for name, correct in answered.items():
            column = front.objectives.index(name)
            again = rng.integers(correct.shape[1], size=correct.shape[1])
            drawn[:, column] = np.nanmean(correct[:, again], axis=1) + noise[:, column] * between[:, column]
        drawn = drawn.clip(least, 1.0)
        best = moocore.is_nondominated(drawn, maximise=True, keep_weakly=True)
        on += best
        volumes.append(moocore.hypervolume(drawn[best], ref=front.reference, maximise=True))
        if ruled:
            reliable = drawn[:, 0] >= drawn[:, 0].max() - slack - SAME
            picked[np.where(reliable, drawn[:, 1], -math.inf).argmax()] += 1
    low, high = (max(0.0, 2 * front.hypervolume - float(np.quantile(volumes, q))) for q in (0.975, 0.025))
    ids = rows["trial_id"]
    return FrontDoubt(
        chances=dict(zip(ids, (on / DRAWS).tolist(), strict=True)),
        picks=dict(zip(ids, (picked / DRAWS).tolist(), strict=True)) if ruled else {},
        hypervolume=(low, high),
        by_edit=bool(answered),
    )


def _by_edit(rows: pd.DataFrame, kind: str, outcomes: pd.DataFrame | None) -> np.ndarray | None:
    """(settings, edits): the share of an edit's prompts of this kind that were answered right, mean over the seeds. None
    unless known for every setting on the same edits."""
    if outcomes is None or outcomes.empty:
        return None
    known = outcomes[outcomes["kind"] == kind]
    setting = {trial: row for row, ids in enumerate(rows["trial_ids"]) for trial in ids}
    known = known.assign(setting=known["trial_id"].map(setting)).dropna(subset=["setting"])
    if known["trial_id"].nunique() < len(setting):
        return None
    table = known.assign(correct=known["correct"].astype("float64")).pivot_table("correct", "setting", "edit_id")
    found = table.to_numpy("float64")
    return None if found.size == 0 or np.isnan(found).any() else found
