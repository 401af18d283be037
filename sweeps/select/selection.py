"""Auto-selection: the position to edit in a model that nobody has swept, within a budget, with the evidence.

Probe, survey and pick, of one study. All trials are runs of one MLflow study, so the same command goes
on where it was, and nothing runs twice.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from analysis.stats.choice import FAILED, Outcome, outcome_of
from locft.model.positions import TuningPosition
from sweeps.study.estimate import patience_seconds, trial_seconds
from sweeps.select.request import Budget, Question
from sweeps.select.policy import Candidate, Run, Rung, Score, Scores, SelectionTask, leading, start_rate, survey
from sweeps.select.policy_search import PolicySearch
from sweeps.run.cluster import on_workers
from sweeps.run.dispatch import Ending, Reporter, Room
from sweeps.study.trial_types import TrialConfig, TrialInputs, TrialResult
from sweeps.run.runner import run_trials
from sweeps.session import StudySession, study_session
from sweeps.tracking.study_run import Tracker
from sweeps.run.trial import Basis, measure_baseline, train_and_measure

if TYPE_CHECKING:
    from locft.workbench import Baseline

PROBED_EDITS = 50
"""Edits that the probe looks at, at most: all go through the model at once, with everything a backward pass needs."""
FINISHING_SECONDS = 10.0
"""Kept of a budget in minutes for the answer."""
BUSY = 0.95
"""Share of a budget in minutes that workers spend in trials."""
PROBE_FILE = "probe.json"


@dataclass(frozen=True)
class Selection:
    """What a selection found."""

    question: Question
    candidates: tuple[Candidate, ...]
    rungs: tuple[Rung, ...]
    scores: Scores
    """Of all finished runs of the study, also those that an earlier call with another budget asked for. Their seconds are
    those of the clock."""
    ending: Ending
    grid_seconds: float
    """What the full grid would have taken one worker, by the estimate at the pace of these runs."""
    run_ids: Mapping[Run, str]
    """The MLflow run of each."""
    results: pd.DataFrame
    """The table of all its trials, also the failed ones."""
    unedited: Mapping[str, float]
    """Metrics of the unedited model on all edits and items."""
    wall_seconds: float
    concurrent: int

    @property
    def ranking(self) -> list[tuple[Run, Outcome]]:
        """The settings that were measured, the one to use first."""
        return leading(self.scores)

    @property
    def spent_seconds(self) -> float:
        """Of one worker, all runs together."""
        return sum(score.seconds for score in self.scores.values())


class RaceReporter(Reporter, Protocol):
    """Hears of rungs as well as of trials."""

    def rung(self, rung: Rung, open_runs: int) -> None: ...


@contextmanager
def run_selection(
    question: Question,
    store: str,
    *,
    address: str | None = None,
    progress: AbstractContextManager[RaceReporter],
) -> Iterator[tuple[Selection, Tracker]]:
    """Probe and try; every trial goes to MLflow. The same call again goes on where it was.

    The study's run is open while the `with` block runs: `sweeps.select.answer.conclude` writes the answer into it there. Raises InputError before
    anything is written when store or cluster cannot be had.
    """
    began = time.monotonic()
    prepared, study = question.prepared, question.study
    description = f"Selection of a position for {study.model} on {study.edits.source}"
    with study_session(prepared, store, description, address=address, study_id=question.id) as session:
        room = session.start_ray()
        with progress as reporter:
            tracker = session.open_run()
            found = _tried(question, session, reporter, room, began)
        yield found, tracker


def _tried(
    question: Question,
    session: StudySession,
    reporter: RaceReporter,
    room: Room,
    began: float,
) -> Selection:
    prepared, study, concurrent = question.prepared, question.study, room.trials()
    tracker = session.open_run()
    known, _ = _known(question, tracker.load_results(curves=False))
    candidates, baseline = _prepared(question, tracker, reporter.note)
    minutes = question.budget.minutes
    deadline = math.inf if minutes is None else began + 60 * minutes - FINISHING_SECONDS
    task, grid = _task(question, candidates, concurrent, deadline - time.monotonic())
    charged = partial(_charged, task, question.budget)
    search = PolicySearch(
        survey,
        task,
        question.config,
        lambda run, result: charged(run, _score(result)),
        {run: charged(run, score) for run, score in known.items()},
        reporter.rung,
    )
    bases = {prepared.facts.data_fingerprint: Basis(prepared.inputs, baseline)}
    with session.recorder(reporter) as recorder:
        ending = run_trials(
            search,
            partial(train_and_measure, bases=bases),
            resources=study.resources,
            room=room,
            reporter=recorder,
            deadline=deadline,
            patience=partial(patience_seconds, facts=prepared.facts, resources=study.resources),
        )
    results = tracker.load_results()
    scores, run_ids = _known(question, results)
    predicted = sum(task.seconds(run) for run in scores)
    pace = sum(score.seconds for score in scores.values()) / predicted if predicted else 1.0
    return Selection(
        question,
        candidates,
        tuple(search.rungs),
        scores,
        ending,
        grid * pace,
        run_ids,
        results,
        baseline.metrics,
        time.monotonic() - began,
        concurrent,
    )


def _task(question: Question, candidates: tuple[Candidate, ...], concurrent: int, left: float) -> tuple[SelectionTask, float]:
    """The task of the policy, and the estimated cost of the full grid. left: seconds until the deadline."""
    facts = question.prepared.facts

    def seconds(run: Run) -> float:
        return trial_seconds(question.config(run), facts)

    grid = sum(seconds(Run(c.layer, c.module, 1e-3)) for c in candidates)
    budget = left * concurrent * BUSY if question.budget.share is None else question.budget.share * grid
    rate = partial(start_rate, steps=question.steps)
    return SelectionTask(
        candidates, facts.n_layers, seconds, rate, budget, concurrent, priors=question.priors
    ), grid


def _charged(task: SelectionTask, budget: Budget, run: Run, score: Score) -> Score:
    """A share of the grid is counted in estimated seconds, whatever else the machine does; minutes are the clock's."""
    return score if budget.share is None else Score(score.outcome, task.seconds(run))


def _score(result: TrialResult) -> Score:
    outcome = outcome_of(result.metrics) if result.status == "done" else FAILED
    return Score(outcome, result.metrics.get("seconds", 0.0))


def _known(question: Question, results: pd.DataFrame) -> tuple[dict[Run, Score], dict[Run, str]]:
    """The finished runs among a study's trials: their scores and their runs in MLflow."""
    scores, run_ids = {}, {}
    for row in results.to_dict("records"):
        config = TrialConfig(**{name: row[name] for name in TrialConfig.__dataclass_fields__})
        run = question.run(config)
        if run is not None and row["status"] == "done":
            scores[run], run_ids[run] = Score(outcome_of(row), float(row["seconds"])), row["run_id"]
    return scores, run_ids


def _prepared(
    question: Question, tracker: Tracker, note: Callable[[str], None]
) -> tuple[tuple[Candidate, ...], "Baseline"]:
    """The probe's scores, and the unedited model's measurements: from the study's run, else made on workers."""
    from locft.workbench import Baseline

    resources, inputs = question.study.resources, question.prepared.inputs
    baseline_file = f"baseline-{question.prepared.facts.data_fingerprint}.json"
    works: dict[str, Callable[[], Any]] = {
        baseline_file: partial(_measure, inputs),
        PROBE_FILE: partial(_probe, inputs, question.positions, question.seed),
    }
    found = {name: tracker.read_file(name) for name in works}
    if missing := [name for name, text in found.items() if text is None]:
        note("measuring the unedited model, and probing every position")
        made = on_workers([works[name] for name in missing], resources)
        for name, value in zip(missing, made, strict=True):
            found[name] = json.dumps(value)
            tracker.write_file(name, found[name])
    candidates = tuple(Candidate(**row) for row in json.loads(found[PROBE_FILE]))
    return candidates, Baseline.from_dict(json.loads(found[baseline_file]))


def _measure(inputs: TrialInputs) -> dict[str, Any]:
    """On a worker: the unedited model's measurements."""
    return measure_baseline(inputs).to_dict()


def _probe(inputs: TrialInputs, positions: list[tuple[int, str]], seed: int) -> list[dict[str, Any]]:
    """On a worker: the fields of `Candidate` for every position."""
    import torch

    from locft.data.suites import load_suite
    from locft.measure.capability import encode_suite
    from locft.train.encoding import encode_edits
    from locft.model.models import load_model
    from locft.probe import probe_positions

    torch.set_num_threads(inputs.threads)
    loaded = load_model(inputs.model, dtype=inputs.dtype, device=inputs.device, spread=inputs.spread)
    rows = encode_edits(loaded.tokenizer, inputs.edits.requests[:PROBED_EDITS])
    suite = inputs.suite if inputs.suite and inputs.prose_tokens else load_suite("probes", limit=1)
    prose = encode_suite(loaded.tokenizer, suite, inputs.prose_tokens or 512).prose
    found = probe_positions(loaded, rows, prose, [TuningPosition(*place) for place in positions], seed=seed)
    return [
        {
            "layer": scores.position.layer,
            "module": scores.position.module,
            "disturbance": scores.disturbance,
            "gain": scores.gain,
        }
        for scores in found
    ]
