"""The table of all trials: which columns, which trials where there are too many, and how each cell reads."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.stats.intervals import interval
from analysis.stats.table import FRACTIONS
from analysis.stats.wording import ABSENT, number, percent, points, points_interval, seconds, share_interval, whole_percent

MAX_ROWS = 500
"""Trials listed at most, which keeps the file under 6 MB; the page says what is left out."""
MIN_BROKEN = 100
"""Places of them that failed and diverged trials have whatever the others need."""


@dataclass(frozen=True)
class TableColumn:
    name: str
    """Of the results table."""
    title: str
    unit: str
    write: Callable[[Any], str]


_COLUMNS = (
    TableColumn("layer", "layer", "", number),
    TableColumn("module", "module", "", str),
    TableColumn("pipeline", "pipeline", "", lambda text: str(text).replace("_first", "-first")),
    TableColumn("batch_size", "batch", "", number),
    TableColumn("learning_rate", "rate", "", number),
    TableColumn("seed", "seed", "", number),
    TableColumn("on_front", "on front", "chance", whole_percent),
    TableColumn("reliability", "reliability", "", percent),
    TableColumn("generalization", "generali\u00adzation", "", percent),
    TableColumn("locality", "locality", "", percent),
    TableColumn("capability", "capability", "", percent),
    TableColumn("capability_change", "change", "points", points),
    TableColumn("drift_kl", "drift", "nats", number),
    TableColumn("seconds", "time", "", seconds),
)
_AXES = {"pipeline": "", "batch_size": "batch ", "learning_rate": "learning rate ", "seed": "seed "}
"""Axes that are columns only where they vary, with what to say before their one value."""


@dataclass(frozen=True)
class TrialTable:
    columns: tuple[TableColumn, ...]
    common: str
    """The axes that do not vary, in words."""
    left_out: str
    """Which trials are listed, in a sentence; empty when all are."""
    rows: tuple[dict[str, Any], ...]
    """trial_id, status, pick, cells: (key, text, interval) per column."""

    @property
    def trials(self) -> frozenset[str]:
        return frozenset(row["trial_id"] for row in self.rows)


def trial_table(results: pd.DataFrame, picked: Collection[str]) -> TrialTable:
    """The most reliable first, failed ones last. results: with `on_front`, the chance to be on the front."""
    columns = tuple(
        column
        for column in _COLUMNS
        if results[column.name].notna().any()
        and (column.name not in _AXES or results[column.name].nunique(dropna=False) > 1)
    )
    broken = (results["status"] == "failed") | (results["diverged"] == 1)
    n_broken = min(int(broken.sum()), max(MIN_BROKEN, MAX_ROWS - int((~broken).sum())))
    order = results.sort_values(["reliability", "capability"], ascending=False, na_position="last", kind="stable")
    lost = broken.loc[order.index]
    listed = order[(lost & (lost.cumsum() <= n_broken)) | (~lost & ((~lost).cumsum() <= MAX_ROWS - n_broken))]
    return TrialTable(
        columns=columns,
        common=_common(results),
        left_out=_left_out(len(results), len(listed), n_broken, int(broken.sum())),
        rows=tuple(_row(row, columns, picked) for row in listed.to_dict("records")),
    )


def _left_out(total: int, listed: int, broken: int, all_broken: int) -> str:
    if listed == total:
        return ""
    first = f"The first {listed - broken:,} of {total:,}"
    if all_broken:
        share = "all" if broken == all_broken else f"{broken:,} of the"
        first += f" and {share} {all_broken:,} that failed or diverged"
    return f"{first}; the results table of the study has all."


def _common(results: pd.DataFrame) -> str:
    values = {name: list(results[name].unique()) for name in _AXES}
    return ", ".join(
        before + number(values[name][0]).replace("_first", "-first")
        for name, before in _AXES.items()
        if len(values[name]) == 1 and not pd.isna(values[name][0])
    )


def _row(row: dict[str, Any], columns: tuple[TableColumn, ...], picked: Collection[str]) -> dict[str, Any]:
    cells = []
    for column in columns:
        value = row[column.name]
        absent = value is None or pd.isna(value)
        # what the page sorts by: the text, the number it reads from the text, or one it cannot read there
        key = (
            str(value)
            if isinstance(value, str)
            else float(f"{value:.4g}")
            if column.name == "seconds" and not absent
            else None
        )
        cells.append((key, ABSENT if absent else column.write(value), _interval(row, column.name)))
    status = "diverged" if row["diverged"] == 1 else row["status"]
    return {"trial_id": row["trial_id"], "status": status, "cells": cells, "pick": row["trial_id"] in picked}


def _interval(row: dict[str, Any], name: str) -> str:
    if name == "capability_change":
        return points_interval(*interval(row, name))
    return share_interval(*interval(row, name)) if name in FRACTIONS else ""
