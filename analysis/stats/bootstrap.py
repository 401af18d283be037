"""How much of the front and the pick is chance: what would be on the front, and what the rule would pick, if everything
were measured again.

Each draw gives every setting new values:

- reliability: the edits are drawn again with replacement, the same ones for every setting, which preserves what settings have
  in common; a setting whose answers by edit are not known varies by its own standard error instead;
- generalization, locality, drift and the change of capability: by their standard errors, setting by setting. The settings
  were measured on the same prompts and items, so this attributes too much to chance: it errs towards doubt;
- between seeds: by their standard deviation over the square root of their number, for fractions of prompts;
- what has no interval (a single task's accuracy, an unknown number of edits) is taken as exact.
"""

from dataclasses import dataclass, replace

import moocore
import numpy as np
import pandas as pd

from analysis.stats.pareto import ParetoFront, pareto_front
from analysis.stats.pick import evidence_of, judge, ranked
from analysis.stats.table import seed_error, standard_error

DRAWS, FEWEST = 1000, 200
"""Number of draws for up to a thousand settings, and the fewest for more settings: fewer draws keep the time from growing."""

BOUNDS = {"capability_change": (-1.0, 1.0), "drift_kl": (0.0, None)}
"""Lowest and highest value of metrics that are no fractions."""


@dataclass(frozen=True)
class MeasuredAgain:
    """Front and pick over many simulated measurements."""

    chances: dict[str, float]
    """trial_id of each setting that has both objectives -> how often it is on the front."""
    picks: dict[str, float]
    """trial_id of each setting that can be picked -> how often the rule picks it."""
    by_edit: bool
    """True if the edits were drawn again for all settings."""
    draws: int = 0


def measured_again(settings: pd.DataFrame, front: ParetoFront | None = None, *, seed: int = 0) -> MeasuredAgain:
    """settings: `by_setting(results)`. front: its front, by default that of reliability and capability."""
    rows = ranked(settings)
    if rows.empty:
        return MeasuredAgain({}, {}, False)
    front = pareto_front(rows) if front is None else front
    evidence, rng = evidence_of(rows), np.random.default_rng(seed)
    n_edits = len(evidence.counts)
    by_edit = np.full(len(rows), n_edits > 0) & ~np.isnan(evidence.right).any(axis=1)
    names = list(dict.fromkeys([*front.objectives, "reliability", "generalization", "capability_change", "drift_kl"]))
    values = dict(zip(names, rows[names].to_numpy("float64").T, strict=True))  # name -> (S,)
    known = rows.to_dict("records")
    errors = {name: np.nan_to_num([standard_error(row, name) for row in known]) for name in names}
    between = np.array([seed_error(row, "reliability") for row in known])
    on_front = np.isfinite([values[name] for name in front.objectives]).all(axis=0)
    on, picked = np.zeros(len(rows)), np.zeros(len(rows))
    draws = min(DRAWS, max(FEWEST, 1000 * DRAWS // len(rows)))
    for _ in range(draws):
        noise = {name: rng.standard_normal(len(rows)) for name in names}
        if "capability" in noise:  # the two have the same error
            noise["capability"] = noise["capability_change"]
        drawn = {name: values[name] + noise[name] * errors[name] for name in names}
        counts = evidence.counts
        if n_edits:
            counts = np.bincount(rng.integers(n_edits, size=n_edits), minlength=n_edits)
            again = evidence.right @ counts / n_edits + noise["reliability"] * between
            drawn["reliability"] = np.where(by_edit, again, drawn["reliability"])
        drawn = {name: value.clip(*BOUNDS.get(name, (0.0, 1.0))) for name, value in drawn.items()}
        verdict = judge(
            replace(
                evidence,
                reliability=drawn["reliability"],
                generalization=drawn["generalization"],
                change=drawn["capability_change"],
                change_high=evidence.change_high + drawn["capability_change"] - evidence.change,
                drift=drawn["drift_kl"],
                counts=counts,
            )
        )
        picked[verdict.order[0]] += 1
        if on_front.any():
            points = np.stack([drawn[name][on_front] for name in front.objectives], axis=1)
            best = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
            on[np.flatnonzero(on_front)[best]] += 1
    ids = rows["trial_id"]
    return MeasuredAgain(
        chances=dict(zip(ids[on_front], (on[on_front] / draws).tolist(), strict=True)),
        picks=dict(zip(ids, (picked / draws).tolist(), strict=True)),
        by_edit=bool(by_edit.all()),
        draws=draws,
    )
