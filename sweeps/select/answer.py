"""The answer of a selection: a position file, a report, and what MLflow keeps of it."""

import json
import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from analysis.page.report import HowFound
from analysis.stats.bootstrap import measured_again
from analysis.stats.formats import by_format
from analysis.stats.table import by_setting, done, drift_text, expected, with_interval
from analysis.stats.wording import percent, plural, seconds
from sweeps.answer import StudyAnswer, StudyState, answer_of, answer_text
from sweeps.select.belief import SCALES
from sweeps.select.policy import Run
from sweeps.select.position_file import FORMAT, SETTINGS, UNMEASURED, measured_sentence, with_rate
from sweeps.select.request import METHOD, Selection, SelectionRequest
from sweeps.study.schema import Study
from sweeps.tracking.outbox import with_retries
from sweeps.tracking.registry import register_position
from sweeps.tracking.store import TrackingError
from sweeps.tracking.study_run import Tracker


@dataclass(frozen=True)
class SelectionAnswer:
    """What a selection says."""

    position: dict[str, Any] | None
    """Content of the position file; None when there is nothing to recommend. Without any finished run it is a
    guess (`predicted` is empty)."""
    html: str
    """The report."""
    command: str
    """The command line that makes the edit at that position."""
    not_recorded: str | None = None
    """Why MLflow lacks the answer or the registered position."""


def conclude(selection: Selection, tracker: Tracker, position_file: str) -> SelectionAnswer:
    """Work out the answer, write it into the study's run in MLflow, and close that run.

    position_file: its name, for the command shown. If the store stays unreachable, the position is returned all the same.
    """
    content = _position(selection)
    found = _how_found(selection, content, position_file)
    state = StudyState(selection.request, selection.compared, selection.baseline)
    answer, lost = None, None
    try:
        answer = with_retries(partial(answer_of, state, tracker, found=found))
        with_retries(partial(_record, selection, tracker, content, answer))
        if content:
            register_position(tracker.client, tracker.run_id(), selection.request.study.model, content)
    except TrackingError as error:  # the report may lack the answers to single prompts, which only the store has
        answer, lost = answer or answer_of(state, None, found=found), str(error)
    return SelectionAnswer(content, answer.report_html, found.command, lost)


def _record(selection: Selection, tracker: Tracker, content: dict[str, Any] | None, answer: StudyAnswer) -> None:
    """Write the answer into the study's run, and close the run."""
    summary = {"runs": selection.done, "grid_share": selection.spent_seconds / selection.grid_seconds}
    pick, text = answer.recommendation, answer_text(answer)
    if content:
        tracker.write_file("position.json", json.dumps(content, indent=2))
        summary |= {f"pick_{name}": value["mean"] for name, value in content["predicted"].items()}
        if pick:
            summary["pick_chance"] = content["chance"]
            text += f"\n- The chance that it is the best position measured is {percent(content['chance'])}."
            text += "".join(f"\n- {sentence}" for _, sentence in _sample_fact(selection))
        else:
            text = f"**Edit at {content['position']}** ({UNMEASURED})."
    tracker.finish(
        tracker.load_results(),
        answer.report_html,
        {**(content or {}), "trial_ids": list(selection.pick["trial_ids"]) if pick else []},
        summary,
        {"complete": "done", "out_of_time": "done", "interrupted": "stopped"}.get(selection.ending, "failed"),
        answer=text,
    )


def _position(selection: Selection) -> dict[str, Any] | None:
    """The content of the position file.

    If time ran out before any run finished, it is the best guess; None if runs failed or were interrupted.
    """
    request, facts = selection.request, selection.request.facts
    ranking = selection.ranking.to_dict("records")
    if ranking:
        run = _run_of(ranking[0])
    elif selection.ending == "out_of_time":
        guess = selection.best_guess
        run = Run(guess.layer, guess.module, request.start_rate(guess))
    else:
        return None
    config = request.config(run)
    return {
        "format": FORMAT,
        "model": request.study.model,
        "model_fingerprint": facts.model_fingerprint,
        "dtype": config.dtype,
        "position": run.position,
        "depth": config.depth,
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "ask_formats": list(request.study.ask_formats),
        "predicted": {},
        "formats": {},
        "chance": None,
        "chance_elsewhere": selection.chance_elsewhere,
        "runner_up": None,
        "measured_on": _measured_on(selection),
        "how": {
            "method": METHOD,
            "seed": request.seed,
            "budget": {"minutes": request.minutes} if request.share is None else {"share": request.share},
            "runs": selection.done,
            "worker_seconds": round(selection.spent_seconds, 1),
            "grid_share": selection.spent_seconds / selection.grid_seconds,
            "wall_seconds": round(selection.wall_seconds, 1),
            "ending": selection.ending,
        },
        "run_id": None,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **(_expectations(selection, ranking) if ranking else {}),
    }


def _expectations(selection: Selection, ranking: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The entries of the position file that need measurements. ranking: rows of the settings compared, the pick first."""
    chance = measured_again(by_setting(selection.compared), seed=selection.request.seed).picks
    whole, (pick, *others) = selection.pick, ranking
    elsewhere = (row for row in others if _run_of(row).position != _run_of(pick).position)
    other = next(elsewhere, others[0] if others else None)
    second = other and {
        "position": _run_of(other).position,
        "learning_rate": other["learning_rate"] if selection.request.has_rate else None,
        "chance": chance[other["trial_id"]],
        "trades": {name: float(more) for name in SCALES if math.isfinite(more := other[name] - pick[name])},
    }
    return {
        "predicted": {
            name: dict(zip(("mean", "low", "high"), found, strict=True)) for name, found in expected(whole).items()
        },
        "formats": by_format(whole, "reliability"),
        "chance": chance[pick["trial_id"]],
        "runner_up": second,
        "run_id": whole["run_id"],
    }


def _run_of(row: Mapping[str, Any]) -> Run:
    return Run(row["layer"], row["module"], row["learning_rate"], row["seed"])


def _measured_on(selection: Selection) -> dict[str, Any]:
    """How many edits the predictions are based on (0 if nothing was measured), on how many the positions were compared, and how
    the run with all of them ended if it gives no predictions."""
    request, row, ended = selection.request, selection.pick, selection.all_edits_ended
    of, source = request.facts.n_edits, request.study.edits.source
    edits = 0 if row is None else row["edit_count"] or of
    found = {"edits": int(edits), "compared_on": request.compared_on or of, "of": of, "source": source}
    return found | ({"all_edits": ended} if ended else {})


def _how_found(selection: Selection, content: dict[str, Any] | None, position_file: str) -> HowFound:
    """What the report says besides the results."""
    request, study = selection.request, selection.request.study
    positions = plural(len(selection.candidates), "position")
    share, minutes = request.share, request.minutes
    budget = f"{minutes:g} minutes" if share is None else f"{percent(share)} of the grid's cost"
    ended = " (it ended the selection)" if selection.ending == "out_of_time" else ""
    grid = seconds(selection.grid_seconds / selection.concurrent)
    spent = percent(selection.spent_seconds / selection.grid_seconds)
    cost = f"{plural(selection.done, 'run')} in {seconds(selection.wall_seconds)}, {spent} of the full grid's cost"
    run = {(row["layer"], row["module"]) for row in done(selection.results).to_dict("records")}
    not_run, chance = len(selection.candidates) - len(run), percent(selection.chance_elsewhere)
    rate_tried = " and a run at another rate: half, or double if it learnt too little" if request.has_rate else ""
    unmeasured = None
    if content and not content["predicted"]:
        unmeasured = f"Edit {with_rate(content['position'], content['settings'])}, {UNMEASURED}."
    return HowFound(
        how=(
            f"{_beforehand(request, positions)} The first two runs are at different depths."
            " Positions behave like their neighbours in depth and like others with the same module, so every run also says"
            " something about positions that were not run, and about how far the expectations hold. The next runs are always"
            " those with the best chance, for their cost, of being the pick or on the front. Some of the budget is kept for a"
            f" second seed of the leader{rate_tried}. If there are many edits, positions are compared on a sample."
        ),
        command=edit_command(study, position_file),
        facts=(
            ("Budget", budget + ended),
            ("Cost", f"{cost}; the grid of {positions} would take about {grid}"),
            ("Not run", f"{not_run} positions; the chance that one of them is clearly better is {chance}"),
            *_sample_fact(selection),
            ("Method", f"{METHOD}, seed {request.seed}"),
        ),
        probe=tuple((c.layer, c.module, c.disturbance) for c in selection.candidates) if request.has_rate else (),
        rungs=tuple((rung.name, rung.why, [_run(request, run) for run in rung.runs]) for rung in selection.rungs),
        unmeasured=unmeasured,
    )


def _beforehand(request: SelectionRequest, positions: str) -> str:
    """What is expected before anything is run, in sentences."""
    if not request.has_rate:
        return "As in earlier models, late layers are expected to generalize more."
    return (
        f"The probe computes gradients of the unedited model on some edits and some prose. It ranks all {positions} by how much"
        " training there would disturb the model, and sets each position's learning rate. As in earlier models, late layers are"
        " expected to drift less and generalize more, and attention to drift more."
    )


def _sample_fact(selection: Selection) -> Iterator[tuple[str, str]]:
    """If positions are compared on a sample: the fact that the page is about it, and what the pick measured with all edits."""
    request, row = selection.request, selection.pick
    if not request.compared_on or row is None:
        return
    if row["edit_count"]:
        yield "Sample", measured_sentence(_measured_on(selection))
    else:
        about = f"from a random sample of {request.compared_on} of the {request.facts.n_edits:,} edits"
        measured = ", ".join(f"{name} {with_interval(row, name)}" for name in ("reliability", "generalization"))
        all_edits = f"With all of them, the pick measured: {measured}, drift {drift_text(row)}"
        yield "Sample", f"These results are {about}. {all_edits}."


def _run(request: SelectionRequest, run: Run) -> dict[str, Any]:
    rate = run.learning_rate if request.has_rate else None
    return {"trial_id": request.config(run).id, "position": run.position, "learning_rate": rate, "seed": run.seed}


def edit_command(study: Study, position_file: str) -> str:
    """The command that makes the edits of a study at the position in a position file."""
    edits = study.edits
    options = {"--limit": edits.limit, "--sample-seed": edits.sample_seed}
    chosen = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    mapped = [word for name, keys in edits.map.items() for word in ("--map", f"{name}={','.join(keys)}")]
    words = ["locft", "edit", study.model, "--edits", edits.source, *chosen, *mapped, "--position", position_file]
    return shlex.join([*words, "--out", "edited"])
