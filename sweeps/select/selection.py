"""Auto-selection: the position to edit in a model that nobody has swept, within a budget, with the evidence.

Probe, survey (or another policy) and pick, of one study. All trials are runs of one MLflow study, so the same command goes
on where it was, and nothing runs twice.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import pandas as pd

from analysis.stats.choice import FAILED, Outcome, outcome_of
from locft.model.positions import TuningPosition
from sweeps.select.baselines import POLICIES
from sweeps.study.estimate import patience_seconds, trial_seconds
from sweeps.select.request import Budget, Question
from sweeps.select.race import Candidate, Run, Rung, Score, Scores, Task, leading, start_rate
from sweeps.select.race_search import RaceSearch
from sweeps.run.cluster import Room
from sweeps.study.trial_types import TrialConfig, TrialResult
from sweeps.run.runner import Ending, Reporter, on_workers, run_trials
from sweeps.session import StudySession, study_session
from sweeps.tracking.study_run import Tracker
from sweeps.run.trial import Basis, TrialInputs, measure_baseline

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
    def level(self) -> int:
        """The highest level at which any run finished; -1 when none did."""
        return max((run.level for run in self.scores), default=-1)

    @property
    def ranking(self) -> list[tuple[Run, Outcome]]:
        """The settings measured at that level, the one to use first."""
        return leading(self.scores, self.level)

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
    tracking_uri: str | None,
    *,
    address: str | None = None,
    progress: AbstractContextManager[RaceReporter],
) -> Iterator[tuple[Selection, Tracker]]:
    """Probe and try; every trial goes to MLflow. The same call again goes on where it was.

    The study's run is open while the `with` block runs: `sweeps.select.answer.conclude` writes the answer into it there. Raises InputError before
    anything is written when store or cluster cannot be had.
    """
    began = time.monotonic()
    levels, study = question.levels, question.study
    description = f"Selection of a position for {study.model} on {study.edits.source} ({question.method})"
    with study_session(levels.full, tracking_uri, description, study_id=question.id) as session:
        room = session.start_ray(address)
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
    levels, study, concurrent = question.levels, question.study, room.trials()
    tracker = session.open_run()
    known, _ = _known(question, tracker.load_results(question.id, curves=False))
    candidates, baselines = _prepared(question, tracker, reporter.note)
    minutes = question.budget.minutes
    deadline = math.inf if minutes is None else began + 60 * minutes - FINISHING_SECONDS
    task, grid = _task(question, candidates, concurrent, deadline - time.monotonic())
    charged = partial(_charged, task, question.budget)
    search = RaceSearch(
        POLICIES[question.method],
        task,
        levels.config,
        lambda run, result: charged(run, _score(result)),
        {run: charged(run, score) for run, score in known.items()},
        reporter.rung,
    )
    bases = {
        level.facts.data_fingerprint: Basis(level.inputs, baseline)
        for level, baseline in zip(question.levels_run, baselines, strict=True)
    }
    with session.recorder(reporter) as recorder:
        ending = run_trials(
            search,
            bases,
            cpus=study.resources.cpus,
            gpus=study.resources.gpus,
            room=room,
            reporter=recorder,
            deadline=deadline,
            patience=partial(patience_seconds, facts=levels.full.facts, resources=study.resources),
        )
    results = tracker.load_results(question.id)
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
        baselines[-1].metrics,
        time.monotonic() - began,
        concurrent,
    )


def _task(question: Question, candidates: tuple[Candidate, ...], concurrent: int, left: float) -> tuple[Task, float]:
    """The task of the policy, and the estimated cost of the full grid. left: seconds until the deadline."""
    levels = question.levels

    def seconds(run: Run) -> float:
        return trial_seconds(levels.config(run), levels.studies[run.level].facts)

    top = len(levels.studies) - 1
    grid = sum(seconds(Run(c.layer, c.module, 1e-3, top)) for c in candidates)
    budget = left * concurrent * BUSY if question.budget.share is None else question.budget.share * grid

    def rate(candidate: Candidate, level: int) -> float:
        steps = question.study.epochs * math.ceil(levels.edits[level] / question.study.space.batch_size[0])
        return start_rate(candidate, steps)

    n_layers = levels.full.facts.n_layers
    task = Task(candidates, levels.edits, n_layers, seconds, rate, budget, concurrent, question.seed)
    return replace(task, priors=question.priors), grid


def _charged(task: Task, budget: Budget, run: Run, score: Score) -> Score:
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
        run = question.levels.run(config)
        if run is not None and row["status"] == "done":
            scores[run], run_ids[run] = Score(outcome_of(row), float(row["seconds"])), row["run_id"]
    return scores, run_ids


def _prepared(
    question: Question, tracker: Tracker, note: Callable[[str], None]
) -> tuple[tuple[Candidate, ...], list["Baseline"]]:
    """The probe's scores, and the unedited model at each level that is run: from the study's run, else made on workers."""
    from locft.workbench import Baseline

    resources = question.study.resources
    names = [f"baseline-{level.facts.data_fingerprint}.json" for level in question.levels_run]
    works: dict[str, Callable[[], Any]] = {
        name: partial(_measure, level.inputs) for name, level in zip(names, question.levels_run, strict=True)
    }
    works = dict(reversed(works.items()))  # the longest first
    works[PROBE_FILE] = partial(_probe, question.levels.full.inputs, question.levels.positions, question.seed)
    found = {name: tracker.study_file(question.id, name) for name in works}
    if missing := [name for name, text in found.items() if text is None]:
        note("measuring the unedited model, and probing every position")
        made = on_workers([works[name] for name in missing], resources.cpus, resources.gpus)
        for name, value in zip(missing, made, strict=True):
            found[name] = json.dumps(value)
            tracker.put_study_file(question.id, name, found[name])
    candidates = tuple(Candidate(**row) for row in json.loads(found[PROBE_FILE]))
    return candidates, [Baseline.from_dict(json.loads(found[name])) for name in names]


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
