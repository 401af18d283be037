"""The tables of the report (their rows and columns, and how each cell reads), and the settings that its controls choose from."""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd

from analysis.stats.axes import AXIS, SWEPT, named_axes
from analysis.stats.comparison import Comparison
from analysis.stats.formats import by_format, format_title
from analysis.stats.pareto import SAME
from analysis.stats.pick import DRIFT_MARGIN, Recommendation, evidence_of, preference, ranked
from analysis.stats.table import TITLES, axis_text, interval_text, position_of, value_text
from analysis.stats.wording import ABSENT, MINUS, change_with_interval, number, percent, points, seconds, whole_percent

MAX_ROWS = 500
"""Maximum number of trials listed, which keeps the file under 6 MB; the page says what is left out."""
MAX_SHARED = 300
"""Maximum number of shared positions of two studies listed."""


@dataclass(frozen=True)
class TableColumn:
    name: str
    """Column of the results table."""
    title: str
    unit: str
    write: Callable[[Any], str]
    words: bool = False
    """The column holds text, aligned to the left."""


_COLUMNS = (
    TableColumn("study", "study", "", str, True),
    *(TableColumn(axis.name, axis.head, "", partial(value_text, axis.name), axis.type is str) for axis in SWEPT),
    TableColumn("on_front", "on front", "chance", whole_percent),
    TableColumn("reliability", "reliability", "", percent),
    TableColumn("generalization", "generali\u00adzation", "", percent),
    TableColumn("locality", "locality", "", percent),
    TableColumn("capability", "capability", "", percent),
    TableColumn("capability_change", "change", "points", points),
    TableColumn("drift_kl", "drift", "nats", number),
    TableColumn("seconds", "time", "", seconds),
)


@dataclass(frozen=True)
class TrialTable:
    columns: tuple[TableColumn, ...]
    common: str
    """The axes that do not vary, with their values, as text."""
    left_out: str
    """A sentence on which trials are listed; empty when all are."""
    rows: tuple[dict[str, Any], ...]
    """trial_id, status, pick, cells: (key, text, interval) per column."""

    @property
    def heads(self) -> list[str | tuple[str, str]]:
        """Title of each column, with its unit where it holds numbers."""
        heads = (column.title if column.words else (column.title, column.unit) for column in self.columns)
        return [*heads, "status", "trial"]

    @property
    def trials(self) -> frozenset[str]:
        return frozenset(row["trial_id"] for row in self.rows)


def trial_table(results: pd.DataFrame, picked: Collection[str]) -> TrialTable:
    """Trials or settings, the most reliable first, failed ones last.

    results: with `on_front`, the chance of being on the front, and for several studies `study`.
    """
    alike = {axis.name for axis in SWEPT if results[axis.name].nunique(dropna=False) == 1}
    columns = tuple(
        column
        for column in _COLUMNS
        if column.name in results
        and results[column.name].notna().any()
        and (column.name not in alike or column.name in ("layer", "module"))
    )
    order = results.sort_values(["reliability", "capability"], ascending=False, na_position="last", kind="stable")
    rows = results.to_dict("records")
    common = {name: rows[0][name] for name in named_axes(rows) if name in alike and any(map(AXIS[name].counts, rows))}
    left_out = f"The first {MAX_ROWS} of {len(results):,}; the results table of the study has all."
    return TrialTable(
        columns=columns,
        common=", ".join(axis_text(name, value) for name, value in common.items() if not pd.isna(value)),
        left_out=left_out if len(results) > MAX_ROWS else "",
        rows=tuple(_trial_row(row, columns, picked) for row in order.head(MAX_ROWS).to_dict("records")),
    )


def _trial_row(row: dict[str, Any], columns: tuple[TableColumn, ...], picked: Collection[str]) -> dict[str, Any]:
    cells = []
    for column in columns:
        value, axis = row[column.name], AXIS.get(column.name)
        absent = pd.isna(value) or (axis is not None and not axis.counts(row))
        # the page's sort key: the text, None to read a number from the cell, or a number that cannot be read there
        key: str | float | None = value if isinstance(value, str) else None
        if column.name in ("seconds", "on_front") and not absent:
            key = float(f"{value:.4g}")
        cells.append((key, ABSENT if absent else column.write(value), interval_text(row, column.name)))
    status = "diverged" if row["diverged"] == 1 else row["status"]
    return {"trial_id": row["trial_id"], "status": status, "cells": cells, "pick": row["trial_id"] in picked}


def format_rows(pick: Recommendation) -> list[tuple[str, list[tuple[str, str]]]]:
    """(format title, [(share, interval) of reliability and generalization]); empty unless edits were asked in several formats."""

    def cell(metric: str) -> tuple[str, str]:
        return percent(pick.metrics.get(metric, math.nan)), interval_text(pick.metrics, metric)

    return [
        (format_title(form), [cell(f"{name}.{form}") for name in ("reliability", "generalization")])
        for form in by_format(pick.metrics, "reliability")
    ]


def agreement_rows(found: Comparison) -> list[tuple[str, str, str]]:
    """(metric, rank correlation, mean difference) over the shared positions of two studies."""
    rows = []
    for item in found.agreements:
        rho, low, high = item.rank
        rank = _signed(rho) if math.isfinite(rho) else "not defined"
        rank += f" [{_signed(low)}, {_signed(high)}]" if math.isfinite(low) else ""
        text = change_with_interval(*item.difference)
        if item.metric == "drift_kl":
            gap, low, high = item.difference
            text = f"{_signed(gap, 3)} nats"
            text += f" [{_signed(low, 3)}, {_signed(high, 3)}]" if math.isfinite(low) else ""
        rows.append((TITLES[item.metric], rank, text))
    return rows


def shared_rows(found: Comparison) -> list[dict[str, Any]]:
    """The shared positions of two studies, the picks first: position, trial_id (here), picks (whether it is the pick
    here, and there) and cells (here, there) per metric."""
    rows, written = [], {column.name: column.write for column in _COLUMNS}
    for pair in found.shared:
        places = [position_of(row) for row in pair]
        rows.append(
            {
                "position": places[0] + (f" / {places[1]}" if found.by_depth else ""),
                "trial_id": pair[0]["trial_id"],
                "cells": [[written[item.metric](row[item.metric]) for row in pair] for item in found.agreements],
                "picks": [at == (pick and pick.position) for at, pick in zip(places, found.picks, strict=True)],
            }
        )
    return sorted(rows, key=lambda row: -sum(row["picks"]))[:MAX_SHARED]


def _signed(value: float, digits: int = 2) -> str:
    text = f"{abs(value):.{digits}f}"
    return (MINUS if value < 0 and float(text) else "") + text


FIELDS = (
    "ids", "layer", "module", "run", "misses", "reliable", "reliability", "generalization", "change", "high", "drift",
)  # fmt: skip
"""The fields of a setting in `explorer`."""


def explorer(
    results: pd.DataFrame, settings: pd.DataFrame, misses: Mapping[str, int], shown: Collection[str]
) -> dict[str, Any] | None:
    """What the controls above the figures need; None if fewer than two settings can be picked.

    The script (`explore.js`) applies the last steps of the rule to the settings that the controls leave: enough reliability, no
    loss of capability, drift within the margin, then the first in the order of generalization. With a floor of reliability this
    gives `analysis.stats.pick.recommend` of these settings; without one, a setting is reliable if it is so in the whole study.

    misses: trial_id -> number of the list of its wrong answers. shown: the trials that figures and tables show.

    Returns modules and layers; floor (the least reliability among the reliable settings), best (reliability), margin (of
    drift) and same (what counts as a tie); fields, and settings, each a list of these fields (the trial ids, the module as an
    index, the number of the list of its wrong answers or None), in the order of the rule's last step; others: what else
    is shown (failed and diverged trials, those of another study), each as id, layer and index of the module.
    """
    rows = ranked(settings)
    if len(rows) < 2:
        return None
    modules = tuple(dict.fromkeys(results["module"]))
    evidence = evidence_of(rows)
    measured = (evidence.reliability, evidence.generalization, evidence.change, evidence.change_high, evidence.drift)
    columns = (rows[name] for name in ("trial_ids", "layer", "module", "run_id", "reliable"))
    listed = list(zip(*columns, *measured, strict=True))
    others = results[results["trial_id"].isin(set(shown).difference(*rows["trial_ids"]))]
    return {
        "modules": modules,
        "layers": sorted(map(int, set(results["layer"]))),
        "floor": float(rows.loc[rows["reliable"], "reliability"].min()),
        "best": float(evidence.reliability.max()),
        "margin": DRIFT_MARGIN,
        "same": SAME,
        "fields": FIELDS,
        "settings": [
            [ids, int(layer), modules.index(module), run, misses.get(ids[0]), int(reliable), *map(_rounded, numbers)]
            for ids, layer, module, run, reliable, *numbers in (listed[place] for place in preference(evidence))
        ],
        "others": [
            [trial, int(layer), modules.index(module)]
            for trial, layer, module in zip(others["trial_id"], others["layer"], others["module"], strict=True)
        ],
    }


def _rounded(value: float) -> float | None:
    return round(float(value), 9) if math.isfinite(value) else None
