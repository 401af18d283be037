"""The sentences of the report: what was found, how sure it is, and which edits fail."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from analysis.bootstrap import FrontDoubt
from analysis.pareto import ParetoFront, Recommendation, comparable
from analysis.table import wilson_interval
from analysis.wording import change_with_interval, number, percent, plural, points, seconds, whole_percent

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
    return {"position": pick.position, "figures": figures, "settings": ", ".join(settings)}


def cost(pick: Recommendation, baseline: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, sentence) pairs of what the edit at the pick costs the model, and the machine."""
    metrics, said = pick.metrics, []
    before = f" The unedited model scores {percent(baseline['capability'])}." if "capability" in baseline else ""
    if "capability_change" in metrics:
        ends = (metrics.get(f"capability_change{end}", math.nan) for end in ("", "_low", "_high"))
        said.append(("Capability", f"{change_with_interval(*ends)} (95% interval).{before}"))
    elif "capability" in metrics:
        said.append(("Capability", f"{percent(metrics['capability'])} after the edit.{before}"))
    tasks = [name for name in metrics if name.startswith("capability.") and name in baseline]
    if len(tasks) > 1:
        by_task = ((name.removeprefix("capability."), baseline[name], metrics[name]) for name in tasks)
        said.append(("By task", ", ".join(f"{task} {percent(a)} → {percent(b)}" for task, a, b in by_task) + "."))
    if "locality" in metrics:
        said.append(("Locality", f"{percent(metrics['locality'])} of unrelated prompts are answered as before."))
    if "drift_kl" in metrics:
        text = f"{number(metrics['drift_kl'])} nats per token on plain text"
        if "perplexity" in metrics and "perplexity" in baseline:
            text += f"; perplexity {number(baseline['perplexity'])} → {number(metrics['perplexity'])}"
        said.append(("Drift", text + "."))
    time = [f"{seconds(metrics['seconds_per_edit'])} of training per edit"] if "seconds_per_edit" in metrics else []
    time += [f"{seconds(metrics['seconds'])} for the whole trial"] if "seconds" in metrics else []
    if time:
        said.append(("Time", ", ".join(time) + "."))
    return said


def _plus_minus(error: float) -> str:
    return f"± {points(error).lstrip('+')}" if math.isfinite(error) else ""


def certainty(
    study: Mapping[str, Any], settings: pd.DataFrame, pick: Recommendation, front: ParetoFront, doubt: FrontDoubt
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
    if n_settings > 1:
        said += _measured_again(settings, pick, front, doubt)
    if n_settings >= 10:
        said.append(
            (
                "Selection",
                f"The best of {plural(n_settings, 'setting')} owes some of its lead to chance: expect a little less on"
                " new edits.",
            )
        )
    return said


def _measured_again(
    settings: pd.DataFrame, pick: Recommendation, front: ParetoFront, doubt: FrontDoubt
) -> list[tuple[str, str]]:
    """What the bootstrap says about pick and front."""
    said = []
    what = "edits and items" if doubt.by_edit else "every measurement"
    if doubt.picks:
        places = settings.set_index("trial_id")
        others = sorted((item for item in doubt.picks.items() if item[0] != pick.trial_id), key=lambda item: -item[1])
        text = f"With {what} drawn again, the rule picks this setting in {whole_percent(doubt.picks[pick.trial_id])} of cases"
        rest = [
            f"{places.loc[trial, 'layer']}.{places.loc[trial, 'module']} in {whole_percent(chance)}"
            for trial, chance in others[:2]
            if chance >= 0.05
        ]
        said.append(("Measured again", text + (f", {' and '.join(rest)}" if rest else "") + "."))
    if doubt.chances:
        low, high = doubt.hypervolume
        said.append(
            (
                "Front",
                (
                    f"The pick is on the front with a chance of {whole_percent(doubt.chances[pick.trial_id])}. "
                    if pick.trial_id in doubt.chances
                    else ""
                )
                + f"Hypervolume {front.hypervolume:.3f}, 95% interval [{low:.3f}, {high:.3f}].",
            )
        )
    return said


@dataclass(frozen=True)
class EditMisses:
    """The prompts of one kind that a trial does not answer as expected."""

    kind: str
    prompts: str
    """Which prompts these are."""
    fault: str
    """What is wrong with the wrong ones."""
    wrong: int
    total: int
    shown: tuple[tuple[str, str, str], ...]
    """(prompt, expected, got), at most `TOP_MISSES`."""


_KINDS = {
    "reliability": ("edit prompts", "not answered with the new target"),
    "generalization": ("rephrased prompts", "not answered with the new target"),
    "locality": ("unrelated prompts", "answered otherwise than before"),
}


@dataclass(frozen=True)
class Misses:
    """What one trial gets wrong."""

    trial_id: str
    position: str
    groups: tuple[EditMisses, ...]


def edit_misses(
    outcomes: pd.DataFrame | None, settings: pd.DataFrame, trial_ids: Sequence[str]
) -> list[Misses]:
    """What these trials (rows of `settings`) get wrong, by kind; without those whose outcomes were not given."""
    if outcomes is None or outcomes.empty:
        return []
    places = settings.set_index("trial_id")
    found = []
    for trial in dict.fromkeys(trial_ids):
        groups = _misses(outcomes[outcomes["trial_id"] == trial])
        if groups:
            row = places.loc[trial]
            found.append(Misses(trial, f"{row['layer']}.{row['module']}", groups))
    return found


def _misses(rows: pd.DataFrame) -> tuple[EditMisses, ...]:
    found = []
    for kind, (prompts, fault) in _KINDS.items():
        of_kind = rows[rows["kind"] == kind]
        wrong = of_kind[~of_kind["correct"].astype(bool)]
        if len(of_kind):
            cells = wrong[["prompt", "expected", "got"]].head(TOP_MISSES).itertuples(index=False)
            shown = tuple(
                tuple("" if value is None or value != value else str(value) for value in row) for row in cells
            )
            found.append(EditMisses(kind, prompts, fault, len(wrong), len(of_kind), shown))
    return tuple(found)
