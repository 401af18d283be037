"""Auto-selection: find the position to edit in a model that nobody has swept, within a budget.

The survey runs some of all positions, and the rule of the pick ranks what was measured. A method that takes a learning rate
gets it from a probe of all positions. All trials are runs of one MLflow study, so the same command resumes, and nothing runs
twice.
"""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any, Literal, Protocol

import pandas as pd
import torch

from analysis.stats.table import done
from locft.data.suites import load_suite
from locft.measure.capability import encode_suite
from locft.model.positions import TuningPosition
from locft.probe import probe_positions
from locft.train.encoding import encode_edits
from locft.workbench import Baseline
from sweeps.run.cluster import on_workers
from sweeps.run.dispatch import Reporter
from sweeps.run.trial import measure_baseline, planned_model
from sweeps.select.policy import (
    Candidate,
    Policy,
    Run,
    Rung,
    Score,
    Scores,
    SelectionTask,
    best_guess,
    budget_left,
    chance_elsewhere,
    slowness,
    survey,
    with_all_edits,
)
from sweeps.select.request import Selection, SelectionRequest
from sweeps.session import StudySession, study_session
from sweeps.study.estimate import trial_seconds
from sweeps.study.plan import PreparedStudy
from sweeps.study.trial_types import TrialConfig, TrialResult, config_of_row
from sweeps.tracking.study_run import Tracker

PROBED_EDITS = 50
"""Most edits that the probe reads: all go through the model at once, with everything a backward pass needs."""
FINISHING_SECONDS = 10.0
"""Part of a budget in minutes that is kept for the answer."""
BUSY = 0.95
"""Share of a budget in minutes that workers spend in trials."""
PROBE_FILE = "probe.json"
PROBE_VERSION = 2
"""Raised whenever the probe's scores change; stored ones of another version are not used."""


class SelectionReporter(Reporter, Protocol):
    """A reporter that is notified of rungs as well as of trials."""

    def rung(self, rung: Rung, open_runs: int, left: float) -> None: ...


@contextmanager
def run_selection(
    request: SelectionRequest,
    store: str,
    *,
    address: str | None = None,
    reporter: SelectionReporter,
    policy: Policy = survey,
) -> Iterator[tuple[Selection, Tracker]]:
    """Run the positions that the policy asks for; every trial is recorded in MLflow. Repeating the call resumes.

    The study's run stays open while the `with` block runs, so that `sweeps.select.answer.conclude` can write the answer
    into it. Raises InputError before anything is written when the store or the cluster cannot be used.
    """
    began = time.monotonic()
    description = f"Selection of a position for {request.study.model} on {request.study.edits.source}"
    with study_session(request, store, description, address=address) as session:
        session.start_ray()
        tracker = session.open_run()
        yield _select(request, session, reporter, policy, began), tracker


def _select(
    request: SelectionRequest, session: StudySession, reporter: SelectionReporter, policy: Policy, began: float
) -> Selection:
    tracker, concurrent = session.open_run(), session.room.trials()
    candidates, baseline = _prepared(request, tracker, reporter.note)
    deadline = math.inf if request.minutes is None else began + 60 * request.minutes - FINISHING_SECONDS
    grid = sum(trial_seconds(trial, request.facts) for trial in request.plan.trials)
    share, left = request.share, deadline - time.monotonic()

    def expected_seconds(run: Run) -> float:
        return trial_seconds(request.config(run), request.facts)

    def score(run: Run, row: dict[str, Any]) -> Score:
        """A budget in minutes is charged real seconds; a share of the grid estimated ones, whatever else the machine is doing."""
        return Score(row, row.get("seconds", 0.0) if share is None else expected_seconds(run))

    def finished(results: pd.DataFrame) -> dict[Run, Score]:
        """The runs of the request that are done."""
        rows = done(results).to_dict("records")
        return {run: score(run, row) for row in rows if (run := request.run(config_of_row(row)))}

    def tell(rung: Rung, open_runs: int) -> None:
        reporter.rung(rung, open_runs, min(deadline - time.monotonic(), seconds_left(task, search.so_far)))

    task = SelectionTask(
        candidates,
        request.facts.n_layers,
        expected_seconds,
        request.start_rate,
        budget=left * concurrent * BUSY if share is None else share * grid,
        method=request.fixed["method"],
        concurrent=concurrent,
        timed=share is None,
        compared_on=request.compared_on,
        other_rate=request.has_rate,
        priors=request.priors,
        known=finished(tracker.load_results(curves=False)),
    )
    search = PolicySearch(policy, task, request.config, score, tell)
    ending = session.run_trials(search, baseline, reporter, deadline, some_done=bool(task.known))
    results = _of_request(request, tracker.load_results())
    over = finished(results)
    found = Selection(
        request,
        results,
        baseline.metrics,
        candidates,
        best_guess(task),
        tuple(search.rungs),
        ending,
        chance_elsewhere(task, over),
        grid * _really(task, over),
        time.monotonic() - began,
        concurrent,
    )
    if found.all_edits_ended:
        reporter.note(
            f"the leader's run with all edits {found.all_edits_ended}; the answer's figures are of the sample"
        )
    return found


def _of_request(request: SelectionRequest, results: pd.DataFrame) -> pd.DataFrame:
    """The trials that are runs of the request."""
    own = [request.run(config_of_row(row)) is not None for row in results.to_dict("records")]
    return results[pd.Series(own, dtype=bool)].reset_index(drop=True)


def _really(task: SelectionTask, scores: Scores) -> float:
    """Ratio of the seconds that the runs took to those expected, over the runs whose time is known; 1 without any."""
    taken = {run: score.row["seconds"] for run, score in scores.items() if "seconds" in score.row}
    expected = sum(map(task.seconds, taken))
    return sum(taken.values()) / expected if expected else 1.0


def seconds_left(task: SelectionTask, scores: Scores) -> float:
    """Time to spend the rest of the budget and to run the leader with all edits, at the speed of the runs so far."""
    left = max(0.0, budget_left(task, scores)) / (slowness(task, scores) or 1.0) / task.concurrent
    return _really(task, scores) * (left + sum(map(task.seconds, with_all_edits(task, scores))))


class PolicySearch:
    """A policy as a `sweeps.run.dispatch.Search`. Runs with a known score are not run again, so a stopped selection resumes."""

    def __init__(
        self,
        policy: Policy,
        task: SelectionTask,
        to_config: Callable[[Run], TrialConfig],
        to_score: Callable[[Run, dict[str, Any]], Score],
        tell: Callable[[Rung, int], None],
    ):
        """to_score: from a row of the results table. tell: called with every rung and the number of its runs that are not known
        yet."""
        self.rungs: list[Rung] = []
        self.scores = dict(task.known)
        """Scores of all runs that are over."""
        self._policy, self._seconds = policy(task), task.seconds
        self._to_config, self._to_score, self._tell = to_config, to_score, tell
        self._queue: list[Run] = []
        self._running: dict[str, Run] = {}
        self._waits = False
        """The policy waits for the outcome of a running run: it is not asked again before one ends."""

    @property
    def so_far(self) -> Scores:
        """Scores of all runs that have begun; those still running have their expected cost."""
        running = {run: Score({"status": "running"}, self._seconds(run)) for run in self._running.values()}
        return self.scores | running

    def propose(self, key: str) -> TrialConfig | Literal["wait"] | None:
        if self._waits:
            return "wait"
        while not self._queue:
            try:
                rung = self._policy.send(self.so_far if self.rungs else None)
            except StopIteration:
                return None
            if rung is None:
                self._waits = True
                return "wait"
            self.rungs.append(rung)
            self._queue = [run for run in rung.runs if run not in self.scores]
            self._tell(rung, len(self._queue))
        run = self._queue.pop(0)
        self._running[key] = run
        return self._to_config(run)

    def learn(self, key: str, result: TrialResult | None) -> None:
        """A run that brought no result has failed, at its expected cost, so that it is not asked for again in this call."""
        run = self._running.pop(key)
        self._waits = False
        if result is None:
            self.scores[run] = Score({"status": "failed"}, self._seconds(run))
        else:
            self.scores[run] = self._to_score(run, result.to_row())


def _prepared(
    request: SelectionRequest, tracker: Tracker, note: Callable[[str], None]
) -> tuple[tuple[Candidate, ...], Baseline]:
    """The positions, with the probe's scores if the method takes a learning rate, and the unedited model's measurements: read
    from the study's run, or else made on workers."""
    baseline_file = f"baseline-{request.facts.data_fingerprint}.json"
    works: dict[str, tuple[str, Callable[[], Any]]] = {
        baseline_file: ("measuring the unedited model", partial(measure_baseline, request.inputs)),
    }
    if request.has_rate:
        probe = partial(probe_scores, request.inputs, request.positions, request.seed)
        works[PROBE_FILE] = "probing every position", probe
    found = {name: json.loads(text) for name in works if (text := tracker.read_file(name)) is not None}
    if not _probed(request, found.get(PROBE_FILE)):
        found.pop(PROBE_FILE, None)
    if missing := [name for name in works if name not in found]:
        note(", and ".join(works[name][0] for name in missing))
        made = on_workers([works[name][1] for name in missing], request.study.resources)
        for name, value in zip(missing, made, strict=True):
            text = json.dumps(value, default=Baseline.to_dict)
            tracker.write_file(name, text)
            found[name] = json.loads(text)
    probed, unprobed = _probed(request, found.get(PROBE_FILE)), tuple(Candidate(*place) for place in request.positions)
    return probed or unprobed, Baseline.from_dict(found[baseline_file])


def _probed(request: SelectionRequest, probed: Any) -> tuple[Candidate, ...]:
    """The planned positions in their order. probed: content of the probe's file; where it has another version or seed, or
    lacks a position, there are none."""
    if not isinstance(probed, dict) or (probed["version"], probed["seed"]) != (PROBE_VERSION, request.seed):
        return ()
    found = {(row["layer"], row["module"]): Candidate(**row) for row in probed["scores"]}
    return tuple(found[place] for place in request.positions) if found.keys() >= {*request.positions} else ()


def probe_scores(inputs: PreparedStudy, positions: Sequence[tuple[int, str]], seed: int) -> dict[str, Any]:
    """On a worker: the content of the probe's file, with the fields of a `Candidate` for every position."""
    torch.set_num_threads(inputs.study.resources.cpus)
    loaded, prose_tokens = planned_model(inputs), inputs.study.capability.prose_tokens
    rows = encode_edits(loaded.tokenizer, inputs.edits.requests[:PROBED_EDITS])
    suite = inputs.suite if inputs.suite and prose_tokens else load_suite("probes", limit=1)
    prose = encode_suite(loaded.tokenizer, suite, prose_tokens or 512).prose
    found = probe_positions(loaded, rows, prose, [TuningPosition(*place) for place in positions], seed=seed)
    scores = [
        asdict(Candidate(*place, scores.disturbance, scores.gain))
        for place, scores in zip(positions, found, strict=True)
    ]
    return {"version": PROBE_VERSION, "seed": seed, "scores": scores}
