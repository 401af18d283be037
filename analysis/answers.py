"""The sentences of the report: what was found, how sure it is, and which edits fail."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.pareto import Recommendation, comparable
from analysis.table import wilson_interval
from analysis.wording import change_with_interval, number, percent, plural, points, seconds

TOP_MISSES = 12
"""Edits that fail listed at most; the count is given."""


def headline(pick: Recommendation, baseline: Mapping[str, float]) -> dict[str, Any]:
    """The answer: `position`, and `figures`, a list of (name, value, note) to read next to it."""
    metrics = pick.metrics
    figures = [("reliability", percent(metrics["reliability"]), _plus_minus(metrics.get("reliability_se", math.nan)))]
    if "generalization" in metrics:
        figures.append(("generalization", percent(metrics["generalization"]), ""))
    if "locality" in metrics:
        figures.append(("locality", percent(metrics["locality"]), ""))
    if "capability_change" in metrics:
        change = metrics["capability_change"]
        low, high = (metrics.get(f"capability_change_{end}", math.nan) for end in ("low", "high"))
        note = f"[{points(low)}, {points(high)}]" if math.isfinite(low) and math.isfinite(high) else ""
        figures.append(("capability change", f"{points(change)} points", note))
    elif "capability" in metrics:
        before = f"against {percent(baseline['capability'])} unedited" if "capability" in baseline else ""
        figures.append(("capability", percent(metrics["capability"]), before))
    cost = []
    if "drift_kl" in metrics:
        cost.append(f"drift {number(metrics['drift_kl'])} nats per token")
    if "seconds_per_edit" in metrics:
        cost.append(f"{seconds(metrics['seconds_per_edit'])} of training per edit")
    elif "seconds" in metrics:
        cost.append(f"{seconds(metrics['seconds'])} for the whole trial")
    shown = {
        "pipeline": "",
        "batch_size": "batch ",
        "learning_rate": "learning rate ",
        "loss_average": "loss by ",
        "epochs": "",
    }
    settings = [
        before
        + number(pick.settings[name]).replace("_first", "-first")
        + (" epochs at most" if name == "epochs" else "")
        for name, before in shown.items()
        if name in pick.settings
    ]
    return {"position": pick.position, "figures": figures, "cost": ", ".join(cost), "settings": ", ".join(settings)}


def _plus_minus(error: float) -> str:
    return f"± {points(error).lstrip('+')}" if math.isfinite(error) else ""


def certainty(
    study: Mapping[str, Any], results: pd.DataFrame, settings: pd.DataFrame, pick: Recommendation
) -> list[tuple[str, str]]:
    """(name, sentence) pairs on how far the pick can be trusted."""
    metrics = pick.metrics
    said = [("Rule", pick.rule)]
    n = metrics.get("n_edits", math.nan)
    low, high = wilson_interval(metrics["reliability"], n)
    if math.isfinite(low):
        said.append(
            (
                "Edits",
                f"Reliability is a fraction of {plural(round(n), 'edit')}: for further edits of this kind expect"
                f" between {percent(low)} and {percent(high)} (95% interval).",
            )
        )
    items = study.get("n_items")
    if "capability_change_low" in metrics and "capability_change_high" in metrics:
        inside = metrics["capability_change_low"] <= 0 <= metrics["capability_change_high"]
        change = change_with_interval(*(metrics[f"capability_change{end}"] for end in ("", "_low", "_high")))
        said.append(
            (
                "Capability",
                f"{change} (95% interval, same items before and after"
                + (f", {plural(int(items), 'item')}" if items else "")
                + "): "
                + (
                    "zero is inside, so no change is shown, and none is ruled out within it."
                    if inside
                    else "zero is outside."
                ),
            )
        )
    said.append(("Choice", " ".join(pick.reasons[: 1 if len(comparable(settings, ("reliability",))) == 1 else 2])))
    if pick.runner_up is not None:
        other = settings[settings["trial_id"] == pick.runner_up].iloc[0]
        text = f"{other['layer']}.{other['module']}"
        same = f" (batch {number(other['batch_size'])}, learning rate {number(other['learning_rate'])})"
        text += (
            f"{same}: reliability {percent(other['reliability'])}, generalization {percent(other['generalization'])}"
        )
        if math.isfinite(other["capability_change"]):
            text += f", capability change {points(other['capability_change'])} points"
        said.append(("Runner-up", text + "."))
    seeds = next(reason for reason in pick.reasons if "seed" in reason)
    said.append(("Seeds", seeds))
    n_settings = len(comparable(settings, ("reliability",)))
    if n_settings >= 10:
        said.append(
            (
                "Selection",
                f"The best of {plural(n_settings, 'setting')} owes some of its lead to chance: expect a little less on"
                " new edits.",
            )
        )
    return said


@dataclass(frozen=True)
class EditMisses:
    """The prompts of one kind that the picked trial does not answer as expected."""

    kind: str
    title: str
    wrong: int
    total: int
    shown: tuple[tuple[str, str, str], ...]
    """(prompt, expected, got), at most `TOP_MISSES`."""


_KINDS = {
    "reliability": "edit prompts not answered with the new target",
    "generalization": "rephrased prompts not answered with the new target",
    "locality": "unrelated prompts answered otherwise than before",
}


def edit_misses(outcomes: pd.DataFrame | None, pick: Recommendation) -> list[EditMisses] | None:
    """What the picked trial gets wrong, by kind. None when its outcomes were not given."""
    if outcomes is None or outcomes.empty:
        return None
    rows = outcomes[outcomes["trial_id"] == pick.trial_id]
    found = []
    for kind, title in _KINDS.items():
        of_kind = rows[rows["kind"] == kind]
        wrong = of_kind[~of_kind["correct"].astype(bool)]
        if len(of_kind):
            cells = wrong[["prompt", "expected", "got"]].head(TOP_MISSES).itertuples(index=False)
            shown = tuple(
                tuple("" if value is None or value != value else str(value) for value in row) for row in cells
            )
            found.append(EditMisses(kind, title, len(wrong), len(of_kind), shown))
    return found or None
