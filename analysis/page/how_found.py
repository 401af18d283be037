"""How a selection found its answer: what `sweeps.select.answer` hands to the report beside the results, and how it reads.

A selection's report is that of any study, with one more section: what the probe expected against what was measured, and
the rungs of runs.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.stats.wording import number, percent


@dataclass(frozen=True)
class RungRun:
    """A run as its rung asked for it; what came of it is in the results table, if it finished."""

    trial_id: str
    position: str
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class RungOfRuns:
    """Runs that were started together."""

    name: str
    why: str
    """What it runs and why, in a sentence for people."""
    runs: tuple[RungRun, ...]


@dataclass(frozen=True)
class HowFound:
    how: str
    """In sentences."""
    command: str
    """That makes the edit, from the position file."""
    facts: tuple[tuple[str, str], ...]
    """(name, value) of what was asked and what it cost, such as ("Budget", "40 minutes"); they follow those of the study."""
    probe: tuple[tuple[int, str, float], ...]
    """(layer, module, disturbance) of every position; a low disturbance is good."""
    rungs: tuple[RungOfRuns, ...]
    unmeasured: str | None = None
    """Where no run finished in time: what the probe alone recommends, in sentences."""


def rung_rows(rung: RungOfRuns, results: pd.DataFrame, picked: Collection[str]) -> list[dict[str, Any]]:
    """What the page says of each run: its values as text, `kept` for those of the pick, and `fate`."""
    known = {row["trial_id"]: row for row in results.to_dict("records")}
    rows = []
    for run in rung.runs:
        row = known.get(run.trial_id, {})
        kept = run.trial_id in picked
        fate = "the pick" if kept else ""
        if row.get("status") != "done":
            fate = f"failed: {row['error']}" if row else "did not finish"
        elif row["diverged"] == 1:
            fate = "diverged"
        shares = {name: percent(row.get(name, math.nan)) for name in ("reliability", "generalization")}
        texts = {**shares, "drift": number(row.get("drift_kl", math.nan)), "rate": number(run.learning_rate)}
        rows.append({"position": run.position, "seed": run.seed, "fate": fate, "kept": kept, **texts})
    return rows
