"""The sentences of the report: what was asked, what was found, what it costs, and how sure that is."""

import math
from typing import Any

import pandas as pd

from analysis.stats.bootstrap import MeasuredAgain
from analysis.stats.comparison import Comparison, Measured
from analysis.stats.pick import Recommendation, capability_text
from analysis.stats.table import (
    FRACTIONS,
    done,
    drift_text,
    failed,
    interval,
    interval_text,
    position_of,
    setting_names,
    setting_text,
    task_columns,
    with_interval,
)
from analysis.stats.wording import ABSENT, number, percent, plural, points, seconds, when, whole_percent


def facts(about: Measured) -> list[tuple[str, str]]:
    """(name, value) pairs of what the study is about."""
    study, results, baseline = about.study, about.results, about.baseline
    n_edits, n_items, planned = (study.get(name) for name in ("n_edits", "n_items", "trials_planned"))
    edits = " from ".join(filter(None, (plural(int(n_edits), "edit") if n_edits else "", study.get("edits_source"))))
    if edits and "reliability" in baseline:
        edits += f"; the unedited model already gives {percent(baseline['reliability'])} of the new answers"
    items = [plural(int(n_items), "item")] if n_items else []
    tasks = [name.removeprefix("capability.") for name in task_columns(results)]
    capability = str(study.get("capability_source") or "")
    if tasks or items:
        capability += f": {' of '.join((*items, plural(len(tasks), 'task')) if tasks else items)}"
        capability += f" ({', '.join(tasks)})" if tasks else ""
    if "capability" in baseline:
        capability += f"; the unedited model scores {percent(baseline['capability'])}"
    n_done = int(study.get("trials_done", len(done(results))))
    n_failed = int(study.get("trials_failed", len(failed(results))))
    trials = f"{plural(n_done, 'trial')} done" + (f" of {int(planned):,} planned" if planned else "")
    trials += f", {n_failed:,} failed" if n_failed else ""
    run = " to ".join(filter(None, (when(study.get("started")), when(study.get("finished")))))
    found = {"Model": str(study["model"]), "Edits": edits, "Capability": capability, "Trials": trials, "Run": run}
    return [(name, value) for name, value in found.items() if value]


def differing(found: Comparison) -> list[tuple[str, str, str]]:
    """(what, here, there) of two studies: their facts and their picks."""
    here, there = (dict(facts(study)) for study in found.studies)
    rows = [(name, here.get(name, ABSENT), there.get(name, ABSENT)) for name in here | there]
    a, b = (pick.position if pick else ABSENT for pick in found.picks)
    return [*rows, ("Pick", a, b)]


def headline(pick: Recommendation) -> dict[str, Any]:
    """The answer: `settings` as text, and `figures`, a list of (name, value, interval) to show next to the position."""
    metrics = pick.metrics
    figures = [(name, percent(metrics[name]), interval_text(metrics, name)) for name in FRACTIONS if name in metrics]
    if "capability_change" in metrics:
        change = f"{points(metrics['capability_change'])} points"
        figures.append(("capability change", change, interval_text(metrics, "capability_change")))
    epochs = f"at most {plural(pick.settings['epochs'], 'epoch')}" if "epochs" in pick.settings else ""
    settings = ", ".join(filter(None, (setting_text(pick.settings), epochs)))
    return {"figures": figures, "settings": settings}


def cost(pick: Recommendation, about: Measured) -> list[tuple[str, str]]:
    """(name, sentence) pairs on what the edit at the pick costs the model and the machine."""
    metrics, baseline, said = pick.metrics, about.baseline, []
    if "capability_change" in metrics:
        scored = f" The unedited model scores {percent(baseline['capability'])}." if "capability" in baseline else ""
        said.append(("Capability", f"{capability_text(metrics)} (same items before and after).{scored}"))
    tasks = [name for name in metrics if name.startswith("capability.") and name in baseline]
    if len(tasks) > 1:
        by_task = ((name.removeprefix("capability."), baseline[name], metrics[name]) for name in tasks)
        said.append(("By task", ", ".join(f"{task} {percent(a)} → {percent(b)}" for task, a, b in by_task) + "."))
    if "portability" in metrics:
        text = f"{percent(metrics['portability'])} of the questions that follow from the edits get the answer that follows."
        said.append(("Portability", text))
    if "locality" in metrics:
        text = f"{with_interval(metrics, 'locality')} of the tokens of answers to unrelated prompts are still the most likely ones"
        more = {
            "locality_first": (percent, "of the first tokens"),
            "locality_kl": (number, "nats of divergence at the first token"),
            "locality_exact": (percent, "of the answers are the same, word for word"),
        }
        parts = [f"{write(metrics[name])} {of}" for name, (write, of) in more.items() if name in metrics]
        said.append(("Locality", "; ".join((text, *parts)) + "."))
    elif "locality_exact" in metrics:  # in a study run by an earlier version
        said.append(("Locality", f"{percent(metrics['locality_exact'])} of unrelated prompts are answered as before."))
    if "drift_kl" in metrics:
        text = f"{drift_text(metrics)} on plain text"
        if "perplexity" in metrics and "perplexity" in baseline:
            text += f"; perplexity {number(baseline['perplexity'])} → {number(metrics['perplexity'])}"
        said.append(("Drift", text + "."))
    times = {"seconds_per_edit": "of training per edit", "seconds": "for the whole trial"}
    if time := [f"{seconds(metrics[name])} {of}" for name, of in times.items() if name in metrics]:
        said.append(("Time", ", ".join(time) + "."))
    return said


def certainty(settings: pd.DataFrame, pick: Recommendation, again: MeasuredAgain) -> list[tuple[str, str]]:
    """(name, sentence) pairs on how far the pick can be trusted. settings: `by_setting(results)`."""
    metrics, n_settings, said = pick.metrics, len(again.picks), []
    low, high = interval(metrics, "reliability")
    if math.isfinite(low):
        text = f"Reliability is a fraction of {plural(round(metrics['n_edits']), 'edit')}: for other edits of this kind, expect"
        said.append(("Edits", f"{text} between {percent(low)} and {percent(high)} (95% interval)."))
    said.append(("Choice", " ".join(pick.reasons[: 1 if n_settings == 1 else 2])))
    if pick.runner_up is not None:
        other = settings[settings["trial_id"] == pick.runner_up].iloc[0]
        text = f"{position_of(other)} ({setting_text(other)}): reliability {percent(other['reliability'])},"
        text += f" generalization {percent(other['generalization'])}"
        if math.isfinite(other["capability_change"]):
            text += f", capability change {points(other['capability_change'])} points"
        text += f", drift {number(other['drift_kl'])} nats" if math.isfinite(other["drift_kl"]) else ""
        said.append(("Runner-up", text + "."))
    said.append(("Seeds", next(reason for reason in pick.reasons if "seed" in reason)))
    if n_settings > 1:
        said.append(("Measured again", _measured_again(settings, pick, again)))
    if n_settings >= 10:
        text = f"The best of {plural(n_settings, 'setting')} owes some of its lead to chance: expect a little less on new edits."
        said.append(("Selection", text))
    return said


def _measured_again(settings: pd.DataFrame, pick: Recommendation, again: MeasuredAgain) -> str:
    """How often the rule picks this setting when everything is measured again."""
    names = setting_names(settings)
    others = sorted((item for item in again.picks.items() if item[0] != pick.trial_id), key=lambda item: -item[1])
    rest = [f"{names[trial]} in {whole_percent(chance)}" for trial, chance in others[:2] if chance >= 0.05]
    what = "edits and items" if again.by_edit else "every measurement"
    text = f"With {what} resampled, the rule picks this setting in {whole_percent(again.picks[pick.trial_id])} of cases"
    return text + (f", {' and '.join(rest)}" if rest else "") + "."
