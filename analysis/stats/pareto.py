"""The trade-off front and its hypervolume.

Everything is maximised. A trial takes part when it is done, did not diverge and has a finite value of each objective.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import moocore
import numpy as np
import pandas as pd

DEFAULT_OBJECTIVES = ("reliability", "capability")
SAME = 1e-9
"""Values closer than this are ties: means over seeds differ in their last bits by rounding alone."""


@dataclass(frozen=True)
class ParetoFront:
    """The trials that no other trial beats in one objective without losing in another (equal trials are all included)."""

    trial_ids: tuple[str, ...]
    """From the highest first objective to the lowest."""
    objectives: tuple[str, ...]
    points: tuple[tuple[float, ...], ...]
    """One value per objective, for each trial."""
    hypervolume: float
    """Volume between the front and `reference`; 0.0 for an empty front."""
    reference: tuple[float, ...]
    """The worst values possible (0, or -1 for capability_change), so that hypervolumes of several studies are comparable."""


def pareto_front(results: pd.DataFrame, objectives: Sequence[str] = DEFAULT_OBJECTIVES) -> ParetoFront:
    """The front of a results table, trial by trial. Give it `by_setting(results)` for the front of seed averages.

    objectives: two or more metrics that are better when higher, or parts of such metrics (capability.TASK, reliability.FORMAT).
    """
    names = tuple(objectives)
    reference = tuple(-1.0 if name == "capability_change" else 0.0 for name in names)
    rows = comparable(results, names)
    if rows.empty:
        return ParetoFront((), names, (), 0.0, reference)
    points = rows[list(names)].to_numpy("float64")  # (trials, objectives)
    best = moocore.is_nondominated(points, maximise=True, keep_weakly=True)
    front = sorted(
        zip(map(tuple, points[best].tolist()), map(str, rows["trial_id"][best]), strict=True),
        key=lambda pair: (tuple(-x for x in pair[0]), pair[1]),
    )
    return ParetoFront(
        trial_ids=tuple(trial for _, trial in front),
        objectives=names,
        points=tuple(point for point, _ in front),
        hypervolume=float(moocore.hypervolume(points[best], ref=reference, maximise=True)),
        reference=reference,
    )


def comparable(results: pd.DataFrame, objectives: Sequence[str]) -> pd.DataFrame:
    """The trials that can be compared: done, not diverged, each objective finite."""
    finite = np.isfinite(results[list(objectives)].astype("float64")).all(axis=1)
    keep = (results["status"] == "done") & (results["diverged"].fillna(0) != 1) & finite
    return results[keep].reset_index(drop=True)
