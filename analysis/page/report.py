"""The report of a study: one self-contained HTML file that answers its owner's questions and works offline.

Here the answers are put together as plain values; `report.html` lays them out (jinja2 with autoescape, so whatever a
user wrote is text), and the figures ride along as JSON that a small script draws with the plotly.js in the file. The same
report compares two studies and tells how a selection found its position: each adds a section.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd

from analysis.page.explorer import explorer
from analysis.page.gallery import (
    comparison_plot,
    gallery,
    importance_plot,
    packed_plotly,
    page_template,
    probe_plot,
    script_json,
)
from analysis.page.how_found import HowFound, rung_rows
from analysis.page.sentences import bend_of, certainty, cost, differing, facts, headline, near_the_front
from analysis.page.tables import agreement_rows, format_rows, front_row, shared_rows, trial_table, varied_axes
from analysis.page.wrong_answers import wrong_answers
from analysis.stats.bootstrap import MeasuredAgain, measured_again
from analysis.stats.comparison import Comparison, Measured, cautions, compare, moved
from analysis.stats.importance import importance_sentences, what_matters
from analysis.stats.pareto import DEFAULT_OBJECTIVES, ParetoFront, knee, pareto_front
from analysis.stats.pick import Recommendation, ranked, recommend
from analysis.stats.signatures import remedies
from analysis.stats.table import TITLES, by_setting, done, failed, has_values
from analysis.stats.wording import number

MAX_MISSES = 40
"""Settings whose wrong answers are listed at most: the pick, the front, then others in the order of the rule."""
KEPT = 200
"""Settings that are drawn however many there are: those that the rule would use first, and the front."""


def render_report(
    study: Mapping[str, Any],
    results: pd.DataFrame,
    *,
    baseline: Mapping[str, float],
    outcomes: pd.DataFrame | None = None,
    other: Measured | None = None,
    found: HowFound | None = None,
    plotly_js: bool = True,
) -> str:
    """The report as HTML.

    Args:
        study: name, model, edits_source, n_edits, findings (sentences), capability_source, n_items, trials_planned,
            trials_done, trials_failed, started, finished (datetime or text), environment (dict), settings_yaml (text),
            and for the commands that change a setting: command (words), edit_counts, chosen_axes
            (`analysis.stats.signatures`). All but name and model may be absent.
        results: the results table (`analysis.stats.table.results_frame`).
        baseline: metrics of the unedited model (capability, capability.TASK, perplexity, reliability, generalization).
        outcomes: per prompt: trial_id, edit_id, kind, prompt, expected, got, correct. Of the trials whose wrong answers
            are to be listed: the pick, the front, and whatever else may be chosen on the page.
        other: a study to compare this one with.
        found: how a selection found its answer.
        plotly_js: put plotly.js in, packed (1.9 MB). Without it the file is small, and figures are drawn only where the
            page is put into one that has `Plotly`.
    """
    if found:  # the grid was never to be run in full
        study = {**study, "trials_planned": None}
    settings, pick = by_setting(results), recommend(results)
    pick_id = pick.trial_id if pick else None
    front = pareto_front(settings, _objectives(settings))
    again = measured_again(settings, front)
    order = list(ranked(settings)["trial_id"])
    plots = gallery(results, front, baseline, pick_id, again.chances, order[:KEPT])
    compared = compare(Measured(study, results, baseline), other) if other else None
    wrong = wrong_answers(outcomes, settings, [*([pick_id] if pick_id else []), *front.trial_ids, *order], MAX_MISSES)
    lists = {item.trial_id: (place, item) for place, item in enumerate(wrong, 1)}
    everything = results.assign(on_front=results["trial_id"].map(_by_trial(settings, again.chances)))
    if compared:
        frames = (everything, compared.studies[1].results)
        named = [frame.assign(study=name) for frame, name in zip(frames, compared.names, strict=True)]
        everything = pd.concat(named, ignore_index=True)
    table = trial_table(everything, pick.trial_ids if pick else ())
    both = _compared(compared) if compared else None
    drawn = [*plots, *([both["plot"]] if both and both["plot"] else [])]
    shown = table.trials.union(*(plot.trials for plot in drawn))
    controls = explorer(everything, settings, {trial: place for trial, (place, _) in lists.items()}, shown)
    weighed, varied = what_matters(results), varied_axes(results)
    by_id = settings.set_index("trial_id", drop=False)
    return page_template("report.html").render(
        name=str(study["name"]),
        model=str(study["model"]),
        settings_yaml=study.get("settings_yaml"),
        facts=[*facts(Measured(study, results, baseline)), *(found.facts if found else ())],
        findings=list(study.get("findings") or ()),
        headline=headline(pick, baseline) if pick else None,
        pick=pick,
        formats=format_rows(pick) if pick else [],
        remedies=remedies(Measured(study, results, baseline), pick),
        command=_command(study, pick, by_id, found) if pick else None,
        cost=cost(pick, baseline) if pick else [],
        certainty=certainty(study.get("n_items"), settings, pick, front, again) if pick else [],
        front=[front_row(by_id.loc[id], varied, again.chances[id], lists.get(id)) for id in front.trial_ids],
        **_front(settings, front, again, pick),
        matters=importance_sentences(weighed),
        not_weighed=weighed.not_shown,
        weighed=importance_plot(weighed) if weighed.found else None,
        found=_found(found, results, pick) if found else None,
        compared=both,
        plots=plots,
        explorer=controls,
        explore_data=script_json(controls),
        table=table,
        n_trials=len(everything),
        misses=wrong,
        n_asked=sum(item.trial_id == pick_id or item.trial_id in front.trial_ids for item in wrong),
        environment={str(k): _readable(v) for k, v in (study.get("environment") or {}).items()},
        plotly_js=packed_plotly() if plotly_js and drawn else None,
        **_failures(results),
    )


def _by_trial(settings: pd.DataFrame, chances: Mapping[str, float]) -> dict[str, float]:
    """trial_id of each seed -> the chance of its setting."""
    seeds = zip(settings["trial_id"], settings["trial_ids"], strict=True)
    return {trial: chances.get(setting, math.nan) for setting, trials in seeds for trial in trials}


def _front(
    settings: pd.DataFrame, front: ParetoFront, again: MeasuredAgain, pick: Recommendation | None
) -> dict[str, Any]:
    """What the page says of the front above its table."""
    return {
        "front_names": [TITLES.get(name, name) for name in front.objectives],
        "knee": knee(front) if len(set(front.points)) > 1 else None,
        "near": near_the_front(settings, front, again),
        "bend": bend_of(settings.set_index("trial_id"), front, pick),
        "again": again,
        "hypervolume": f"{front.hypervolume:.3f}",
        "hypervolume_interval": "{:.3f}, {:.3f}".format(*again.hypervolume),
        "reference": ", ".join(number(x) for x in front.reference),
    }


def _objectives(settings: pd.DataFrame) -> tuple[str, str]:
    measured = all(has_values(settings, name) for name in DEFAULT_OBJECTIVES)
    return DEFAULT_OBJECTIVES if measured else ("reliability", "generalization")


def _command(study: Mapping[str, Any], pick: Recommendation, by_id: pd.DataFrame, found: HowFound | None) -> str:
    """What to type to repeat the pick, quoted for a shell. The run knows its edits, with limit and sample."""
    if found:
        return found.command
    model, run = str(study["model"]), by_id.loc[pick.trial_id, "run_id"] or pick.trial_id
    out = f"{model.rstrip('/').split('/')[-1]}-{pick.position}"
    return f"locft edit {shlex.quote(model)} --from-run {run} --out {shlex.quote(out)}"


def _failures(results: pd.DataFrame) -> dict[str, Any]:
    broken, retried = failed(results), results["retried"].dropna()
    return {
        "causes": Counter(broken["error"].fillna("no cause recorded").replace("", "no cause recorded")).most_common(),
        "retried": Counter(cause for causes in retried for cause in causes.splitlines()).most_common(),
        "n_failed": len(broken),
        "n_diverged": int((done(results)["diverged"] == 1).sum()),
    }


def _found(found: HowFound, results: pd.DataFrame, pick: Recommendation | None) -> dict[str, Any]:
    """What the page says of how a selection found its answer."""
    picked = pick.trial_ids if pick else ()
    return {
        "how": found.how,
        "unmeasured": found.unmeasured,
        "command": found.command,
        "plot": probe_plot(results, found, pick.trial_id if pick else None),
        "rungs": [
            {"name": rung.name, "why": rung.why, "runs": rung_rows(rung, results, picked)} for rung in found.rungs
        ],
    }


def _compared(found: Comparison) -> dict[str, Any]:
    """What the page says of two studies."""
    return {
        "names": found.names,
        "differing": differing(found),
        "cautions": cautions(found),
        "moved": moved(found),
        "agreements": agreement_rows(found),
        "metrics": [TITLES[item.metric] for item in found.agreements],
        "shared": shared_rows(found),
        "n_shared": len(found.shared),
        "plot": comparison_plot(found),
    }


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
