"""The answer of a selection: a position file, a page, and what MLflow keeps of it."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np

from analysis.stats.choice import RULE, intervals, probabilities
from analysis.page.selection_page import Ranked, RungRun, render_selection
from analysis.stats.wording import number, percent, plural, seconds
from sweeps.tracking.outbox import with_retries
from sweeps.select.position_file import FORMAT, SETTINGS
from sweeps.select.policy import Run, start_rate
from sweeps.select.request import METHOD
from sweeps.select.selection import Selection
from sweeps.study.reader import study_to_yaml
from sweeps.tracking.registry import register_position
from sweeps.tracking.store import TrackingError
from sweeps.tracking.study_run import Tracker

UNMEASURED = "by the probe alone: the budget ended before any run finished, so nothing was measured there"


@dataclass(frozen=True)
class Answer:
    """What a selection says."""

    ranking: tuple[Ranked, ...]
    """The settings that were measured, the one to use first; empty when nothing finished."""
    position: dict[str, Any] | None
    """The position file's content; from the probe alone when time ran out before any run finished (`predicted` is empty)."""
    html: str
    not_recorded: str | None = None
    """Why MLflow lacks the answer or the registered position."""


def conclude(selection: Selection, tracker: Tracker, position_file: str) -> Answer:
    """Work the answer out and write it into the study's run in MLflow, which is closed then.

    position_file: its name in the command shown. A store that is away is asked again for a while, and then done without:
    the answer says so.
    """
    try:
        ranking = _ranking(selection, tracker)
        content = _position(selection, ranking) if ranking else _unmeasured(selection)
        answer = Answer(ranking, content, _page(selection, ranking, content, position_file))
        try:
            with_retries(partial(_record, selection, tracker, answer))
            if content:
                register_position(tracker.client, tracker.run_id(), selection.question.study.model, content)
        except TrackingError as error:
            return replace(answer, not_recorded=str(error))
        return answer
    finally:
        tracker.abandon()  # unless it was finished


def _record(selection: Selection, tracker: Tracker, answer: Answer) -> None:
    """Into the study's run, and that closed."""
    ranking, content = answer.ranking, answer.position
    if content:
        tracker.write_file("position.json", json.dumps(content, indent=2))
    summary = {"runs": len(selection.scores), "grid_share": selection.spent_seconds / selection.grid_seconds}
    if content:
        summary |= {f"pick_{name}": value["mean"] for name, value in content["predicted"].items()}
    if ranking:
        summary["pick_chance"] = ranking[0].chance
    status = {"complete": "done", "out_of_time": "done", "interrupted": "stopped"}.get(selection.ending, "failed")
    text = "Nothing finished."
    if content:
        sure = f"chance of being the best: {percent(content['chance'])}). {RULE}" if ranking else f"{UNMEASURED})"
        text = f"**Edit at {content['position']}** with learning rate {content['settings']['learning_rate']:g} ({sure}"
    tracker.finish(
        selection.results,
        answer.html,
        {**(content or {}), "trial_ids": _trial_ids(selection, ranking)},
        summary,
        status,
        answer=text,
    )


def _ranking(selection: Selection, tracker: Tracker) -> tuple[Ranked, ...]:
    settings = selection.ranking
    try:
        correct = with_retries(lambda: [_by_edit(selection, tracker, run) for run, _ in settings])
    except TrackingError:  # the chances are rougher without them, and the answer is there
        correct = []
    known = bool(correct) and all(found is not None and found.shape == correct[0].shape for found in correct)
    chances = probabilities(
        [outcome for _, outcome in settings], np.stack(correct) if known else None, selection.question.seed
    )
    return tuple(
        Ranked(
            run.position, run.layer, run.module, run.learning_rate, len(_seeds(selection, run)), outcome, chance
        )
        for (run, outcome), chance in zip(settings, chances, strict=True)
    )


def _by_edit(selection: Selection, tracker: Tracker, setting: Run) -> np.ndarray | None:
    """(2, edits): how right each edit's own prompt and its rephrased one were answered, mean over seeds; None if unknown."""
    parts = []
    for run in _seeds(selection, setting):
        outcomes = tracker.load_outcomes(selection.run_ids[run])
        means = [
            outcomes[outcomes["kind"] == kind].groupby("edit_id")["correct"].mean().astype(float)
            for kind in ("reliability", "generalization")
        ]
        if len(means[0]) == 0 or len(means[1]) == 0:
            return None
        parts.append(np.stack([means[0], means[1].reindex(means[0].index).fillna(means[1].mean())]))
    return np.mean(parts, axis=0)


def _seeds(selection: Selection, setting: Run) -> list[Run]:
    """The runs of a setting."""
    return sorted(run for run in selection.scores if replace(run, seed=setting.seed) == setting)


def _trial_ids(selection: Selection, ranking: Sequence[Ranked]) -> list[str]:
    if not ranking:
        return []
    return [selection.question.config(run).id for run in _seeds(selection, selection.ranking[0][0])]


def _position(selection: Selection, ranking: Sequence[Ranked]) -> dict[str, Any]:
    run, outcome = selection.ranking[0]
    edits = selection.question.prepared.facts.n_edits
    second = ranking[1] if len(ranking) > 1 else None
    first_seed = _seeds(selection, run)[0]
    return _content(selection, first_seed) | {
        "predicted": {
            name: dict(zip(("mean", "low", "high"), found, strict=True))
            for name, found in intervals(outcome, edits).items()
        },
        "chance": ranking[0].chance,
        "runner_up": second and {"position": second.position, "learning_rate": second.learning_rate, "chance": second.chance},
        "run_id": selection.run_ids.get(first_seed),
    }


def _unmeasured(selection: Selection) -> dict[str, Any] | None:
    """What the probe would take, where time ran out before any run finished; None where runs failed or were interrupted."""
    if selection.ending != "out_of_time" or not selection.candidates:
        return None
    best = min(selection.candidates, key=lambda candidate: candidate.disturbance)
    return _content(selection, Run(best.layer, best.module, start_rate(best, selection.question.steps)))


def _content(selection: Selection, run: Run) -> dict[str, Any]:
    """The position file, without what is known from measuring the run's setting."""
    question, facts = selection.question, selection.question.prepared.facts
    config = question.config(run)
    return {
        "format": FORMAT,
        "model": question.study.model,
        "model_fingerprint": facts.model_fingerprint,
        "dtype": config.dtype,
        "position": run.position,
        "depth": config.depth,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "predicted": {},
        "chance": None,
        "runner_up": None,
        "measured_on": {
            "edits": facts.n_edits if selection.scores else 0,
            "of": facts.n_edits,
            "source": question.study.edits.source,
        },
        "how": {
            "method": METHOD,
            "seed": question.seed,
            "budget": {key: value for key, value in asdict(question.budget).items() if value is not None},
            "runs": len(selection.scores),
            "worker_seconds": round(selection.spent_seconds, 1),
            "grid_share": selection.spent_seconds / selection.grid_seconds,
            "wall_seconds": round(selection.wall_seconds, 1),
            "ending": selection.ending,
        },
        "run_id": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _page(
    selection: Selection, ranking: Sequence[Ranked], content: dict[str, Any] | None, position_file: str
) -> str:
    question, study, facts = selection.question, selection.question.study, selection.question.prepared.facts
    share = selection.spent_seconds / selection.grid_seconds
    model, source = shlex.quote(study.model), shlex.quote(study.edits.source)
    budget = question.budget
    asked = f"{budget.minutes:g} minutes" if budget.share is None else f"{percent(budget.share)} of the grid's cost"
    grid = seconds(selection.grid_seconds / selection.concurrent)
    limit = "" if study.edits.limit is None else f" --limit {study.edits.limit}"
    settings = (
        f"{study.space.pipeline[0].replace('_', '-')}, {study.space.batch_size[0]} edits a step, at most {study.epochs} epochs,"
        f" Adam, loss averaged by {study.space.loss_average[0]}"
    )
    caveat = f"This is {UNMEASURED}." if content and not ranking else None
    about = {
        "model": study.model,
        "pick": content and {"position": content["position"], "rate": number(content["settings"]["learning_rate"])},
        "lead": f"For {plural(facts.n_edits, 'edit')} like those of {study.edits.source}, found with {percent(share)} of"
        " the full grid's cost.",
        "command": f"locft edit {model} --edits {source}{limit} --position {shlex.quote(position_file)} --out edited",
        "settings": settings,
        "level_edits": facts.n_edits,
        "how": _how(selection),
        "caveat": caveat,
        "facts": [
            ("Model", f"{study.model}, {facts.n_layers} layers, fingerprint {facts.model_fingerprint}"),
            ("Edits", f"{plural(facts.n_edits, 'edit')} of {study.edits.source}"),
            ("Capability", question.prepared.capability_source),
            ("Unedited", ", ".join(f"{name} {number(value)}" for name, value in selection.unedited.items())),
            ("Budget", asked + (" (it ended the selection)" if selection.ending == "out_of_time" else "")),
            (
                "Cost",
                f"{plural(len(selection.scores), 'run')}, {seconds(selection.wall_seconds)} in all; the grid of"
                f" {plural(len(selection.candidates), 'position')} would take about {grid}",
            ),
            ("Method", f"{METHOD}, seed {question.seed}"),
        ],
        "settings_yaml": study_to_yaml(study),
    }
    probe = [(c.layer, c.module, c.disturbance) for c in selection.candidates]
    return render_selection(about, ranking, _rungs(selection, ranking), probe)


def _how(selection: Selection) -> str:
    return (
        "The probe reads gradients of the unedited model over some edits and some prose, and orders all"
        f" {plural(len(selection.candidates), 'position')} by what learning would disturb there; the same gradients set each"
        " position's learning rate. Half of the budget runs the first of them; most of the rest runs the best of each kind of"
        " module, the kinds in turn, so that each gets the same time. What is kept goes to a gentler learning rate and"
        " further seeds of the leaders."
    )


def _rungs(selection: Selection, ranking: Sequence[Ranked]) -> list[tuple[str, str, list[RungRun]]]:
    return [
        (rung.name, rung.why, [_rung_run(selection, run, ranking) for run in rung.runs]) for rung in selection.rungs
    ]


def _rung_run(selection: Selection, run: Run, ranking: Sequence[Ranked]) -> RungRun:
    score = selection.scores.get(run)
    picked = bool(ranking) and run.position == ranking[0].position
    fate = "did not finish" if score is None else "the pick" if picked else ""
    outcome = score.outcome if score else None
    return RungRun(run.position, run.learning_rate, run.seed, True, outcome, fate, picked)
