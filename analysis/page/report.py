"""The report of a study: one self-contained HTML file that answers its owner's questions and works offline.

Here the answers are put together as plain values; `report.html` lays them out (jinja2 with autoescape, so whatever a
user wrote is text), and the figures ride along as JSON that a small script draws with the plotly.js in the file.
"""

import math
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from analysis.page.sentences import certainty, cost, headline
from analysis.stats.bootstrap import MeasuredAgain, measured_again
from analysis.stats.comparison import (
    Comparison,
    Measured,
    agreement_rows,
    cautions,
    compare,
    differing,
    moved,
    shared_rows,
)
from analysis.figures.comparison import comparison_plots
from analysis.page.explorer import explorer
from analysis.page.gallery import Plot, gallery, packed_plotly, page_plot, page_template
from analysis.stats.importance import WhatMatters, importance_figure, sentences, what_matters
from analysis.stats.intervals import interval, seed_range
from analysis.figures.style import TITLES
from analysis.page.wrong_answers import Misses, edit_misses
from analysis.stats.pareto import DEFAULT_OBJECTIVES, ParetoFront, can_be_objective, knee, pareto_front
from analysis.stats.pick import Recommendation, ranked, recommend
from analysis.stats.table import FRACTIONS, by_setting, done, failed, has_values, setting_names, task_columns
from analysis.page.tables import trial_table
from analysis.stats.wording import (
    ABSENT,
    number,
    percent,
    plural,
    points,
    points_interval,
    seconds,
    seed_span,
    share_interval,
    when,
    whole_percent,
)

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
    plotly_js: bool = True,
) -> str:
    """The report as HTML.

    Args:
        study: name, model, edits_source, n_edits, findings (sentences), capability_source, n_items, trials_planned,
            trials_done, trials_failed, started, finished (datetime or text), environment (dict), settings_yaml (text),
            objectives. All but name and model may be absent.
        results: the results table (`analysis.stats.table.results_frame`).
        baseline: metrics of the unedited model (capability, capability.TASK, perplexity, reliability, generalization).
        outcomes: per prompt: trial_id, edit_id, kind, prompt, expected, got, correct. Of the trials whose wrong answers
            are to be listed (the pick, the front); where it holds all trials, the bootstrap draws the edits again.
        other: a study to compare this one with.
        plotly_js: put plotly.js in, packed (1.9 MB). Without it the file is small, and figures are drawn only where the
            page is put into one that has `Plotly`.
    """
    settings = by_setting(results)
    objectives = _objectives(study, settings)
    front = pareto_front(settings, objectives)
    pick = recommend(results)
    pick_id = pick.trial_id if pick else None
    bend = knee(front) if len(set(front.points)) > 1 else None
    doubt = measured_again(settings, front)
    order = list(ranked(settings)["trial_id"])
    plots = gallery(results, objectives, baseline, front.trial_ids, pick_id, doubt.chances, order[:KEPT])
    weighed = what_matters(results)
    compared = compare(Measured(study, results, baseline), other) if other else None
    missed = edit_misses(outcomes, settings, [*([pick_id] if pick_id else []), *front.trial_ids, *order], MAX_MISSES)
    lists = {item.trial_id: place for place, item in enumerate(missed, 1)}
    chances = {trial: doubt.chances.get(row, math.nan) for row, ids in zip(settings["trial_id"], settings["trial_ids"], strict=True) for trial in ids}
    table = trial_table(results.assign(on_front=results["trial_id"].map(chances)), pick.trial_ids if pick else ())
    shown = table.trials.union(*(plot.trials for plot in plots))
    found = settings.set_index("trial_id", drop=False)
    broken = failed(results)
    causes = Counter(error if isinstance(error, str) and error else "no cause recorded" for error in broken["error"])
    return page_template("report.html").render(
        name=str(study["name"]),
        model=str(study["model"]),
        settings_yaml=study.get("settings_yaml"),
        facts=_facts(study, results, baseline),
        findings=list(study.get("findings") or ()),
        headline=headline(pick, baseline) if pick else None,
        pick=pick,
        command=_command(study, pick, found) if pick else None,
        cost=cost(pick, baseline) if pick else [],
        certainty=certainty(study, settings, pick, front, doubt) if pick else [],
        front=[
            _front_row(found.loc[trial], trial == pick_id, trial == bend, doubt.chances[trial], lists.get(trial), missed)
            for trial in front.trial_ids
        ],
        near=_near(settings, front, doubt),
        by_edit=doubt.by_edit,
        draws=doubt.draws,
        front_names=[TITLES.get(name, name) for name in objectives],
        bend=_bend(found, front, pick),
        hypervolume=f"{front.hypervolume:.3f}",
        hypervolume_interval="{:.3f}, {:.3f}".format(*doubt.hypervolume),
        reference=", ".join(number(x) for x in front.reference),
        matters=sentences(weighed),
        not_weighed=weighed.not_shown,
        weighed=_weighed_plot(weighed) if weighed.found else None,
        compared=_compared(compared) if compared else None,
        plots=plots,
        explorer=explorer(results, settings, lists, shown),
        model_argument=shlex.quote(str(study["model"])),
        table=table,
        n_trials=len(results),
        misses=missed,
        n_asked=sum(item.trial_id == pick_id or item.trial_id in front.trial_ids for item in missed),
        causes=causes.most_common(),
        retried=Counter(cause for causes in results["retried"].dropna() for cause in causes.splitlines()).most_common(),
        n_failed=len(broken),
        n_diverged=int((done(results)["diverged"] == 1).sum()),
        environment={str(k): _readable(v) for k, v in (study.get("environment") or {}).items()},
        plotly_js=packed_plotly() if plotly_js and (plots or compared) else None,
    )


def _objectives(study: Mapping[str, Any], settings: pd.DataFrame) -> tuple[str, str]:
    """The study's first two objectives that are better when higher, if measured; else the usual ones, or what was."""
    asked = study.get("objectives") or DEFAULT_OBJECTIVES
    wanted = tuple(name for name in asked if can_be_objective(name))[:2]
    if len(set(wanted)) == 2 and all(has_values(settings, name) for name in wanted):
        return wanted
    if all(has_values(settings, name) for name in DEFAULT_OBJECTIVES):
        return DEFAULT_OBJECTIVES
    return "reliability", "generalization"


def _facts(study: Mapping[str, Any], results: pd.DataFrame, baseline: Mapping[str, float]) -> list[tuple[str, str]]:
    """(name, value) of what was asked."""
    n_edits, n_items = study.get("n_edits"), study.get("n_items")
    edits = " from ".join(
        filter(None, (plural(int(n_edits), "edit") if n_edits else "", str(study.get("edits_source") or "")))
    )
    before = baseline.get("reliability")
    if before is not None and edits:
        edits += f"; the unedited model gives {percent(before)} of the new answers already"
    items = [plural(int(n_items), "item")] if n_items else []
    tasks = [name.removeprefix("capability.") for name in task_columns(results)]
    capability = str(study.get("capability_source") or "")
    if tasks or items:
        capability += f": {' of '.join((*items, plural(len(tasks), 'task')) if tasks else items)}"
        capability += f" ({', '.join(tasks)})" if tasks else ""
    if "capability" in baseline:
        capability += f"; the unedited model scores {percent(baseline['capability'])}"
    planned = study.get("trials_planned")
    n_done = int(study.get("trials_done", len(done(results))))
    n_failed = int(study.get("trials_failed", len(failed(results))))
    trials = f"{plural(n_done, 'trial')} done" + (f" of {int(planned):,} planned" if planned else "")
    trials += f", {n_failed:,} failed" if n_failed else ""
    run = " to ".join(filter(None, (when(study.get("started")), when(study.get("finished")))))
    facts = [
        ("Model", str(study.get("model", ABSENT))),
        ("Edits", edits),
        ("Capability", capability),
        ("Trials", trials),
    ]
    return [(name, value) for name, value in (*facts, ("Run", run)) if value]


def _command(study: Mapping[str, Any], pick: Recommendation, found: pd.DataFrame) -> str:
    """What to type to repeat the pick, quoted for a shell. The run knows its edits, with limit and sample."""
    run = found.loc[pick.trial_id, "run_id"] or pick.trial_id
    model = str(study.get("model", "MODEL"))
    out = f"{model.rstrip('/').split('/')[-1]}-{pick.position}"
    return f"locft edit {shlex.quote(model)} --from-run {run} --out {shlex.quote(out)}"


def _bend(found: pd.DataFrame, front: ParetoFront, pick: Recommendation | None) -> str | None:
    """What the front's knee offers against the pick, in one sentence; None when it is the pick."""
    bend = knee(front)
    if bend is None or pick is None or bend == pick.trial_id:
        return None
    row, chosen = found.loc[bend], found.loc[pick.trial_id]
    gains = [
        f"{points(row[name] - chosen[name])} points of {TITLES.get(name, name)}"
        for name in front.objectives
        if math.isfinite(chosen[name])
    ]
    return f"It bends most at {row['layer']}.{row['module']}: {' and '.join(gains)} against the pick."


def _near(settings: pd.DataFrame, front: ParetoFront, doubt: MeasuredAgain) -> str | None:
    """The settings that are not on the front as measured, but may well be, in one sentence."""
    near = sorted(
        ((chance, trial) for trial, chance in doubt.chances.items() if chance >= 0.2 and trial not in front.trial_ids),
        reverse=True,
    )
    if not near:
        return None
    names = setting_names(settings)
    named = [f"{names[trial]} ({whole_percent(chance)})" for chance, trial in near[:4]]
    more = f" and {len(near) - 4} more" if len(near) > 4 else ""
    return f"Not on it as measured, but with a chance of a fifth or more: {', '.join(named)}{more}."


def _weighed_plot(weighed: WhatMatters) -> Plot:
    return page_plot(
        "importance", "Importance of the axes", importance_figure(weighed),
        "How much an axis decides whether a trial is among the best quarter (PED-ANOVA), as a share of all axes. What does"
        " not reach beyond the tick is grey: shuffled results give as much. Each axis is weighed by itself, so axes that"
        " were varied together share what they explain.",
        "Bars of the importance of each axis; the sentences above hold the values.",
    )  # fmt: skip


def _compared(found: Comparison) -> dict[str, Any]:
    """What the page says of two studies."""
    return {
        "names": found.names,
        "differing": differing(found),
        "cautions": cautions(found),
        "moved": moved(found),
        "agreements": agreement_rows(found),
        "metrics": [TITLES[name] for name in found.metrics],
        "shared": shared_rows(found),
        "n_shared": len(found.shared),
        "plots": comparison_plots(found),
    }


def _front_row(
    row: pd.Series, is_pick: bool, is_knee: bool, chance: float, listed: int | None, missed: Sequence[Misses]
) -> dict[str, Any]:
    return {
        "position": f"{row['layer']}.{row['module']}",
        "settings": f"{str(row['pipeline']).replace('_first', '-first')}, batch {number(row['batch_size'])},"
        f" rate {number(row['learning_rate'])}" + (f", {row['n_seeds']} seeds" if row["n_seeds"] > 1 else ""),
        "shares": [(percent(row[name]), share_interval(*interval(row, name))) for name in FRACTIONS],
        "capability": percent(row["capability"]),
        "change": points(row["capability_change"]),
        "interval": points_interval(*interval(row, "capability_change")),
        "drift": number(row["drift_kl"]),
        "drift_span": seed_span(*seed_range(row)),
        "seconds": seconds(row["seconds_per_edit"]),
        "trial_id": row["trial_id"],
        "pick": is_pick,
        "knee": is_knee,
        "chance": whole_percent(chance),
        "misses": listed,
        "wrong": missed[listed - 1].groups[0].wrong if listed else None,
    }


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
