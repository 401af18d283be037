"""The sentences of the report: what was found, what it costs, and how sure that is."""

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.stats.bootstrap import MeasuredAgain
from analysis.stats.intervals import drift_text, interval, with_interval
from analysis.stats.pareto import ParetoFront, comparable
from analysis.stats.pick import Recommendation
from analysis.stats.table import FRACTIONS, setting_names
from analysis.stats.wording import change_with_interval, number, percent, plural, points, points_interval, seconds, share_interval, whole_percent

def headline(pick: Recommendation, baseline: Mapping[str, float]) -> dict[str, Any]:
    """The answer: `position`, and `figures`, a list of (name, value, note) to read next to it."""
    metrics = pick.metrics
    figures = [
        (name, percent(metrics[name]), share_interval(*interval(metrics, name))) for name in FRACTIONS if name in metrics
    ]
    if "capability_change" in metrics:
        change = metrics["capability_change"]
        note = points_interval(*interval(metrics, "capability_change"))
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
        said.append(("Locality", f"{with_interval(metrics, 'locality')} of unrelated prompts are answered as before."))
    if "drift_kl" in metrics:
        text = f"{drift_text(metrics)} on plain text"
        if "perplexity" in metrics and "perplexity" in baseline:
            text += f"; perplexity {number(baseline['perplexity'])} → {number(metrics['perplexity'])}"
        said.append(("Drift", text + "."))
    time = [f"{seconds(metrics['seconds_per_edit'])} of training per edit"] if "seconds_per_edit" in metrics else []
    time += [f"{seconds(metrics['seconds'])} for the whole trial"] if "seconds" in metrics else []
    if time:
        said.append(("Time", ", ".join(time) + "."))
    return said


def certainty(
    study: Mapping[str, Any], settings: pd.DataFrame, pick: Recommendation, front: ParetoFront, doubt: MeasuredAgain
) -> list[tuple[str, str]]:
    """(name, sentence) pairs on how far the pick can be trusted."""
    metrics = pick.metrics
    said = [("Rule", pick.rule)]
    n = metrics.get("n_edits", math.nan)
    low, high = interval(metrics, "reliability")
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
    settings: pd.DataFrame, pick: Recommendation, front: ParetoFront, doubt: MeasuredAgain
) -> list[tuple[str, str]]:
    """What the bootstrap says about pick and front."""
    said = []
    what = "edits and items" if doubt.by_edit else "every measurement"
    if doubt.picks:
        names = setting_names(settings)
        others = sorted((item for item in doubt.picks.items() if item[0] != pick.trial_id), key=lambda item: -item[1])
        text = f"With {what} drawn again, the rule picks this setting in {whole_percent(doubt.picks[pick.trial_id])} of cases"
        rest = [f"{names[trial]} in {whole_percent(chance)}" for trial, chance in others[:2] if chance >= 0.05]
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
