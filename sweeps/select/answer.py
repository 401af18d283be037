"""The answer of a selection: a position file, a page, and what MLflow keeps of it."""

import json
import shlex
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from analysis.page.how_found import HowFound, RungOfRuns, RungRun
from analysis.page.report import render_report
from analysis.stats.bootstrap import chances
from analysis.stats.pick import RULE
from analysis.stats.table import by_setting, expected
from analysis.stats.wording import number, percent, plural, seconds
from sweeps.answer import answer_of, measured
from sweeps.select.policy import Run, start_rate
from sweeps.select.position_file import FORMAT, SETTINGS, UNMEASURED
from sweeps.select.request import METHOD
from sweeps.select.selection import Selection
from sweeps.tracking.outbox import with_retries
from sweeps.tracking.registry import register_position
from sweeps.tracking.store import TrackingError
from sweeps.tracking.study_run import Tracker


@dataclass(frozen=True)
class SelectionAnswer:
    """What a selection says."""

    position: dict[str, Any] | None
    """Content of the position file; None when there is nothing to recommend. Without any finished run it comes from the
    probe alone (`predicted` is empty)."""
    html: str
    not_recorded: str | None = None
    """Why MLflow lacks the answer or the registered position."""


def conclude(selection: Selection, tracker: Tracker, position_file: str) -> SelectionAnswer:
    """Work out the answer, and write it into the study's run in MLflow, which that closes.

    position_file: its name, for the command shown. If the store stays away, the answer is given all the same and says so.
    """
    content = _position(selection)
    answer = SelectionAnswer(content, _page(selection, tracker, content, position_file))
    try:
        with_retries(partial(_record, selection, tracker, answer))
        if content:
            register_position(tracker.client, tracker.run_id(), selection.request.study.model, content)
    except TrackingError as error:
        return replace(answer, not_recorded=str(error))
    return answer


def _record(selection: Selection, tracker: Tracker, answer: SelectionAnswer) -> None:
    """Write the answer into the study's run, and close that."""
    content = answer.position
    summary = {"runs": len(selection.finished), "grid_share": selection.spent_seconds / selection.grid_seconds}
    text, trial_ids = "Nothing finished.", ()
    if content:
        tracker.write_file("position.json", json.dumps(content, indent=2))
        summary |= {f"pick_{name}": value["mean"] for name, value in content["predicted"].items()}
        sure = f"{UNMEASURED})."
        if content["predicted"]:
            trial_ids = selection.ranking["trial_ids"][0]
            summary["pick_chance"] = content["chance"]
            sure = f"chance of being the best: {percent(content['chance'])}). {RULE}"
        text = f"**Edit at {content['position']}** with learning rate {content['settings']['learning_rate']:g} ({sure}"
    tracker.finish(
        tracker.load_results(),
        answer.html,
        {**(content or {}), "trial_ids": list(trial_ids)},
        summary,
        {"complete": "done", "out_of_time": "done", "interrupted": "stopped"}.get(selection.ending, "failed"),
        answer=text,
    )


def _position(selection: Selection) -> dict[str, Any] | None:
    """The content of the position file.

    If time ran out before any run finished, it is the probe's best position; None if runs failed or were interrupted.
    """
    request, ranking = selection.request, selection.ranking.to_dict("records")
    if not ranking:
        if selection.ending != "out_of_time" or not selection.candidates:
            return None
        best = min(selection.candidates, key=lambda candidate: candidate.disturbance)
        return _content(selection, Run(best.layer, best.module, start_rate(best, request.steps)))
    pick, *others = ranking
    chance = chances(by_setting(selection.state.results), seed=request.seed)
    second = others[0] if others else None
    return _content(selection, Run(pick["layer"], pick["module"], pick["learning_rate"], pick["seed"])) | {
        "predicted": {
            name: dict(zip(("mean", "low", "high"), found, strict=True)) for name, found in expected(pick).items()
        },
        "chance": chance[pick["trial_id"]],
        "runner_up": second
        and {
            "position": f"{second['layer']}.{second['module']}",
            "learning_rate": second["learning_rate"],
            "chance": chance[second["trial_id"]],
        },
        "run_id": pick["run_id"],
    }


def _content(selection: Selection, run: Run) -> dict[str, Any]:
    """The content of the position file for a run, without what only its measurements tell."""
    request, facts = selection.request, selection.request.facts
    config = request.config(run)
    return {
        "format": FORMAT,
        "model": request.study.model,
        "model_fingerprint": facts.model_fingerprint,
        "dtype": config.dtype,
        "position": run.position,
        "depth": config.depth,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "predicted": {},
        "chance": None,
        "runner_up": None,
        "measured_on": {
            "edits": 0 if selection.finished.empty else facts.n_edits,
            "of": facts.n_edits,
            "source": request.study.edits.source,
        },
        "how": {
            "method": METHOD,
            "seed": request.seed,
            "budget": {key: value for key, value in asdict(request.budget).items() if value is not None},
            "runs": len(selection.finished),
            "worker_seconds": round(selection.spent_seconds, 1),
            "grid_share": selection.spent_seconds / selection.grid_seconds,
            "wall_seconds": round(selection.wall_seconds, 1),
            "ending": selection.ending,
        },
        "run_id": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _page(selection: Selection, tracker: Tracker, content: dict[str, Any] | None, position_file: str) -> str:
    """The report of the selection's study, with how the answer was found."""
    found = _how_found(selection, content, position_file)
    try:
        return with_retries(lambda: answer_of(selection.state, tracker, found=found).report_html)
    except TrackingError:  # without the answers to single prompts, which the store has
        own = measured(selection.state, None)
        return render_report(own.study, own.results, baseline=own.baseline, found=found)


def _how_found(selection: Selection, content: dict[str, Any] | None, position_file: str) -> HowFound:
    request, study, budget = selection.request, selection.request.study, selection.request.budget
    model, source = shlex.quote(study.model), shlex.quote(study.edits.source)
    asked = f"{budget.minutes:g} minutes" if budget.share is None else f"{percent(budget.share)} of the grid's cost"
    share = percent(selection.spent_seconds / selection.grid_seconds)
    limit = "" if study.edits.limit is None else f" --limit {study.edits.limit}"
    unmeasured = None
    if content and not content["predicted"]:
        rate = content["settings"]["learning_rate"]
        unmeasured = f"Edit at {content['position']} with learning rate {number(rate)}: this is {UNMEASURED}."
    return HowFound(
        how="The probe reads gradients of the unedited model over some edits and some prose, and orders all"
        f" {plural(len(selection.candidates), 'position')} by what learning would disturb there; the same gradients set each"
        " position's learning rate. Half of the budget runs the first of them; most of the rest runs the best of each kind"
        " of module, the kinds in turn, so that each gets the same time. What is kept goes to a gentler learning rate and"
        " further seeds of the leaders.",
        command=f"locft edit {model} --edits {source}{limit} --position {shlex.quote(position_file)} --out edited",
        facts=(
            ("Budget", asked + (" (it ended the selection)" if selection.ending == "out_of_time" else "")),
            (
                "Cost",
                f"{plural(len(selection.finished), 'run')}, {seconds(selection.wall_seconds)} in all: {share} of the cost of"
                f" the grid of {plural(len(selection.candidates), 'position')}, which would take about"
                f" {seconds(selection.grid_seconds / selection.concurrent)}",
            ),
            ("Method", f"{METHOD}, seed {request.seed}"),
        ),
        probe=tuple((one.layer, one.module, one.disturbance) for one in selection.candidates),
        rungs=tuple(
            RungOfRuns(
                rung.name,
                rung.why,
                tuple(
                    RungRun(request.config(run).id, run.position, run.learning_rate, run.seed) for run in rung.runs
                ),
            )
            for rung in selection.rungs
        ),
        unmeasured=unmeasured,
    )
