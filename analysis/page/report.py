"""The report of a study: one self-contained HTML file that answers its owner's questions and works offline.

This module assembles the answers as plain values; `report.html` lays them out (jinja2 with autoescape, so that whatever a
user wrote stays text), and the figures are embedded as JSON that a small script draws with the plotly.js in the file. The
same report can compare two studies and explain how a selection found its position: each adds a section.
"""

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import jinja2
import pandas as pd

from analysis.page import gallery, sentences, tables
from analysis.page.wrong_answers import wrong_answers
from analysis.stats.bootstrap import MeasuredAgain, measured_again
from analysis.stats.comparison import Comparison, Measured, cautions, moved
from analysis.stats.importance import importance_sentences, what_matters
from analysis.stats.pareto import DEFAULT_OBJECTIVES, pareto_front
from analysis.stats.pick import Recommendation, ranked, recommend
from analysis.stats.signatures import remedies
from analysis.stats.table import TITLES, by_setting, causes, done, has_values
from analysis.stats.wording import number, percent

MAX_MISSES = 40
"""Maximum number of settings whose wrong answers are listed: the pick, the front, then others in the order of the rule."""
KEPT = 200
"""Number of settings, the first in the order of the rule, that are always drawn in addition to the front."""


@dataclass(frozen=True)
class HowFound:
    """How a selection found its answer: what its report shows in addition to the results of the study."""

    how: str
    """The explanation, in sentences."""
    command: str
    """The command that makes the edit, from the position file."""
    facts: tuple[tuple[str, str], ...]
    """(name, value) of what was asked and what it cost, such as ("Budget", "40 minutes"); shown after those of the study."""
    probe: tuple[tuple[int, str, float], ...]
    """(layer, module, disturbance) of every position, if there was a probe; a low disturbance is good."""
    rungs: tuple[tuple[str, str, Sequence[Mapping[str, Any]]], ...]
    """(name, why, runs) of each group started together: why is a sentence, a run has trial_id, position, learning_rate, seed."""
    unmeasured: str | None = None
    """Where no run finished in time: the best guess, in sentences."""


def render_report(
    study: Mapping[str, Any],
    results: pd.DataFrame,
    *,
    baseline: Mapping[str, float],
    outcomes: pd.DataFrame | None = None,
    compared: Comparison | None = None,
    found: HowFound | None = None,
) -> str:
    """The report as HTML.

    study: name and model; if known also edits_source, n_edits, findings (sentences), capability_source, n_items, trials_planned,
    trials_done, trials_failed, started, finished (datetime or text), environment, settings_yaml, for commands that change a
    setting command (words), edit_counts, chosen_axes (`analysis.stats.signatures`), and for comparisons edits_asked (the most that
    a trial asks about), ask_formats, prose (its source, None for the built-in one), prose_tokens, and fingerprints (hashes of
    edits, items and prose). baseline: metrics of the unedited model.
    outcomes: per prompt trial_id, edit_id, kind, prompt, expected, got, correct, of the trials whose wrong answers are to be
    listed. compared: with another study. found: how a selection found its answer.
    """
    if found:  # the grid was never meant to be run in full
        study = {**study, "trials_planned": None}
    about = Measured(study, results, baseline)
    settings, pick = by_setting(results), recommend(results)
    complete = all(has_values(settings, name) for name in DEFAULT_OBJECTIVES)
    front = pareto_front(settings, DEFAULT_OBJECTIVES if complete else ("reliability", "generalization"))
    again, order = measured_again(settings, front), list(ranked(settings)["trial_id"])
    pick_id, picked = (pick.trial_id, pick.trial_ids) if pick else (None, ())
    misses = wrong_answers(outcomes, settings, [*order[:1], *front.trial_ids, *order], MAX_MISSES)
    places = {item.trial_id: place for place, item in enumerate(misses, 1)}
    everything, weighed = _everything(results, settings, again.chances, compared), what_matters(results)
    plots = list(gallery.gallery(results, front, baseline, pick_id, again.chances, order[:KEPT]))
    between = _compared(compared) if compared else None
    drawn = [*plots, *([between["plot"]] if between and between["plot"] else [])]
    trials = tables.trial_table(everything, picked)
    controls = tables.explorer(everything, settings, places, trials.trials.union(*(plot.trials for plot in drawn)))
    on_front = settings[settings["trial_id"].isin(front.trial_ids)]
    return _PAGES.get_template("report.html").render(
        study=study,
        facts=[*sentences.facts(about), *(found.facts if found else ())],
        environment={key: _readable(value) for key, value in (study.get("environment") or {}).items()},
        pick=pick,
        answer=_answer(about, pick, settings, again, found) if pick else None,
        remedies=remedies(about, pick),
        front=front,
        on_front=tables.trial_table(on_front.assign(on_front=on_front["trial_id"].map(again.chances)), picked),
        again=again,
        matters=importance_sentences(weighed),
        not_weighed=weighed.not_shown,
        causes=causes(results, "error"),
        retried=causes(results, "retried"),
        n_diverged=int((done(results)["diverged"] == 1).sum()),
        misses=misses,
        places=places,
        n_asked=sum(trial == pick_id or trial in front.trial_ids for trial in places),
        found=_found(found, results, pick) if found else None,
        compared=between,
        plots=plots,
        trials=trials,
        n_trials=len(everything),
        explorer=controls,
        explore_data=gallery.script_json(controls),
        plotly_js=gallery.packed_plotly() if drawn else None,
    )


_PAGES = jinja2.Environment(
    loader=jinja2.PackageLoader("analysis.page", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
"""The page's files: the template, and the script and styles that it includes."""


def _answer(
    about: Measured, pick: Recommendation, settings: pd.DataFrame, again: MeasuredAgain, found: HowFound | None
) -> dict[str, Any]:
    """What the page says about the pick."""
    return {
        "headline": sentences.headline(pick),
        "formats": tables.format_rows(pick),
        "command": found.command if found else _command(about.study, pick, settings),
        "cost": sentences.cost(pick, about),
        "certainty": sentences.certainty(settings, pick, again),
    }


def _everything(
    results: pd.DataFrame, settings: pd.DataFrame, chances: Mapping[str, float], compared: Comparison | None
) -> pd.DataFrame:
    """All trials, with the chance that their setting is on the front; then those of another study, told apart by `study`."""
    seeds = zip(settings["trial_id"], settings["trial_ids"], strict=True)
    of_trial = {trial: chances.get(setting, math.nan) for setting, trials in seeds for trial in trials}
    own = results.assign(on_front=results["trial_id"].map(of_trial))
    if compared is None:
        return own
    frames = zip((own, compared.studies[1].results), compared.names, strict=True)
    return pd.concat([frame.assign(study=name) for frame, name in frames], ignore_index=True)


def _command(study: Mapping[str, Any], pick: Recommendation, settings: pd.DataFrame) -> str:
    """The command that repeats the pick, shell-quoted. The run records its edits, with limit and sample."""
    model, (run,) = study["model"], settings.loc[settings["trial_id"] == pick.trial_id, "run_id"]
    out = f"{model.rstrip('/').split('/')[-1]}-{pick.position}"
    return f"locft edit {shlex.quote(model)} --from-run {run or pick.trial_id} --out {shlex.quote(out)}"


def _found(found: HowFound, results: pd.DataFrame, pick: Recommendation | None) -> dict[str, Any]:
    """What the page says about how a selection found its answer."""
    picked = pick.trial_ids if pick else ()
    known = {row["trial_id"]: row for row in results.to_dict("records")}
    return {
        **vars(found),
        "plot": gallery.probe_plot(results, found.probe, pick.trial_id if pick else None),
        "rungs": [
            (name, why, [_run_row(run, known.get(run["trial_id"], {}), picked) for run in runs])
            for name, why, runs in found.rungs
        ],
    }


def _run_row(run: Mapping[str, Any], row: Mapping[str, Any], picked: Sequence[str]) -> dict[str, Any]:
    """A run of a selection: its values as text, `kept` if it belongs to the pick, and `fate`. row: its result, or empty."""
    kept = run["trial_id"] in picked
    fate = "the pick" if kept else ""
    if row.get("status") != "done":
        fate = f"failed: {row['error']}" if row else "did not finish"
    elif row["diverged"] == 1:
        fate = "diverged"
    texts = {name: percent(row.get(name, math.nan)) for name in ("reliability", "generalization")}
    texts |= {"drift": number(row.get("drift_kl", math.nan)), "rate": number(run["learning_rate"] or math.nan)}
    return {"position": run["position"], "seed": run["seed"], "fate": fate, "kept": kept, **texts}


def _compared(found: Comparison) -> dict[str, Any]:
    """What the page says about two studies."""
    return {
        "names": found.names,
        "differing": sentences.differing(found),
        "cautions": cautions(found),
        "moved": moved(found),
        "agreements": tables.agreement_rows(found),
        "heads": ["position", *chain(*(((TITLES[item.metric], ""), ("there", "")) for item in found.agreements))],
        "shared": tables.shared_rows(found),
        "n_shared": len(found.shared),
        "plot": gallery.comparison_plot(found),
    }


def _readable(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
