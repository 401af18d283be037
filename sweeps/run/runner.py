"""Run a study's open trials with Ray Tune.

Ray Tune decides when and where a trial runs. The tracking store says which trials are open, not Ray's snapshots, which lag
behind after a driver is killed. Ray takes seconds to import: callers import this module only when there is something to run.
"""

import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from locft.errors import out_of_memory
from sweeps.run.dispatch import Dispatch, Ending, ListedTrials, Reporter, Room, Search
from sweeps.run.ray_internals import death_of, every_death_is_heard, worker_of
from sweeps.study.schema import Resources
from sweeps.study.trial_types import TrialConfig, TrialResult, pack_result, unpack_result

os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")  # snapshots grow with every trial, and nothing reads them
os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end the run without telling us
os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # each would be a long traceback; we report it in one line
os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", "64")  # workers that may be starting at the same time
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")

import ray
from ray import tune
from ray.tune.schedulers import FIFOScheduler
from ray.tune.search import Searcher
from ray.tune.stopper import Stopper

SAME_FAILURES = 3
"""How many first trials must all fail with the same error to stop a study without finished trials: the rest would fail, too."""


def run_trials(
    source: Sequence[TrialConfig] | Search,
    work: Callable[[TrialConfig], TrialResult],
    *,
    resources: Resources,
    room: Room,
    reporter: Reporter,
    deadline: float = math.inf,
    patience: Callable[[TrialConfig], float] = lambda trial: math.inf,
    some_done: bool = False,
) -> Ending:
    """Run trials until the source has no more; every result, failures included, goes to the reporter.

    source: the open trials, or a search that proposes them. work: runs a trial, on a worker. resources: for each trial.
    room: how many run at a time. deadline: on the `time.monotonic()` clock; trials still running then are cancelled. patience:
    seconds after which a trial is killed and counts as failed. some_done: earlier runs of the study finished some trial.

    A trial that raises gives a failed result; one whose worker dies is retried (`sweeps.run.dispatch`). When the first
    `SAME_FAILURES` results are failures with the same error, the rest are not started, unless `some_done`. The first Ctrl-C or
    SIGTERM cancels the running trials; a second one raises KeyboardInterrupt at once.
    """
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it would list failed trials, already reported
    dispatch = Dispatch(ListedTrials(source) if isinstance(source, Sequence) else source, room)
    listener = TrialListener(dispatch, room, reporter, deadline, patience, some_done)
    worker = tune.with_resources(
        tune.with_parameters(TrialWorker, work=work), {"cpu": resources.cpus, "gpu": resources.gpus}
    )
    worker.__qualname__ = worker.__name__  # shown in process listings: ray::TrialWorker.train
    with (
        tempfile.TemporaryDirectory(prefix="locft-ray-") as scratch,
        interrupt_calls(listener.interrupt),
        every_death_is_heard(),
    ):
        tune.Tuner(
            worker,
            tune_config=tune.TuneConfig(
                search_alg=DispatchSearcher(dispatch),
                scheduler=InOrder(),
                num_samples=-1,  # the search says when it has no more
                reuse_actors=True,  # a fresh process would load the model again for every trial
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[listener],
                stop=listener,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    return listener.ending


def failed_trial(config: TrialConfig, error: BaseException) -> TrialResult:
    """The result of a trial that raised, with the error in one line."""
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrialResult(config, "failed", f"{type(error).__name__}: {cause}"[:500])


@contextmanager
def interrupt_calls(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `stop`; the next one is handled as before. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def first(number, frame) -> None:
        signal.signal(number, before[number])
        stop()

    for number in before:
        signal.signal(number, first)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TrialWorker(tune.Trainable):
    """The object that Ray Tune keeps on a worker and calls once per trial."""

    def setup(self, config, work):
        self._work = work

    def reset_config(self, new_config) -> bool:
        return True  # Ray has set the new config; the process keeps what it holds

    def step(self):
        trial = TrialConfig(**self.config["trial"])
        try:
            result = self._work(trial)
        except Exception as error:  # whatever a trial raises is that trial's result; the worker and the study go on
            if out_of_memory(error):  # unless ending this process is the remedy
                raise
            result = failed_trial(trial, error)
        return {"done": True, "failed": int(result.status == "failed"), "result": pack_result(result)}


class DispatchSearcher(Searcher):
    """The searcher through which Ray Tune gets its next trial from the dispatch."""

    def __init__(self, dispatch: Dispatch):
        super().__init__(metric="failed", mode="min")
        self._dispatch = dispatch

    def __reduce__(self):
        """Ray pickles its configuration to disk for a restore that never happens here."""
        return Searcher, ()

    def suggest(self, trial_id: str):
        config = self._dispatch.next(trial_id)
        if config == "wait":
            return None
        return {"trial": config.to_dict()} if config else Searcher.FINISHED

    def on_trial_complete(self, trial_id: str, result=None, error: bool = False) -> None:
        """Does nothing, since the listener is notified, with the cause."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: a resumed study gives a new search what the tracking store holds."""

    def restore(self, checkpoint_path: str) -> None:
        """See `save`."""


class InOrder(FIFOScheduler):
    """Trials start in their order.

    Ray's own FIFO scheduler hands a free worker to a trial that is waiting for a new one, and ends the new one while it
    starts: where trials are shorter than the start-up of a worker, no further worker ever comes up.
    """

    def choose_trial_to_run(self, tune_controller):
        return None


class TrialListener(tune.Callback, Stopper):
    """Turns Ray Tune's events about trials into calls of the reporter; Ray asks it after every event whether the study ends."""

    def __init__(
        self,
        dispatch: Dispatch,
        room: Room,
        reporter: Reporter,
        deadline: float,
        patience: Callable[[TrialConfig], float],
        some_done: bool = False,
    ):
        self._dispatch, self._room, self._reporter = dispatch, room, reporter
        self._deadline, self._patience = deadline, patience
        self._running: dict[str, tuple[TrialConfig, Any, float]] = {}
        """By Ray's trial id: the configuration, the worker, and when the trial began."""
        self._first_errors: list[str | None] = [None] if some_done else []
        """Errors of the first `SAME_FAILURES` results of the study; None for a trial that is done."""
        self._given_up: Ending | None = None
        self._told_empty = False

    def __reduce__(self):
        """Ray pickles its configuration to disk for a restore that never happens here; display and client are left out."""
        return tune.Callback, ()

    @property
    def ending(self) -> Ending:
        """Why the study ends here; "complete" unless something ends it early."""
        errors = self._first_errors
        same = len(errors) == SAME_FAILURES and errors[0] is not None and len(set(errors)) == 1
        return self._given_up or ("same_failure" if same else "complete")

    def stop_all(self) -> bool:
        return self.ending != "complete"

    def __call__(self, trial_id: str, result: Any) -> bool:
        return False  # Ray's question about a single trial

    def interrupt(self) -> None:
        self._given_up = "interrupted"

    def on_trial_start(self, iteration, trials, trial, **info):
        self._running[trial.trial_id] = TrialConfig(**trial.config["trial"]), worker_of(trial), time.monotonic()
        self._reporter.started(len(self._running))

    def on_step_end(self, iteration, trials, **info):
        if self._room.empty and not self._told_empty:
            self._reporter.note("every node that could run a trial is gone; waiting for another")
        self._told_empty = self._room.empty
        now = time.monotonic()
        if now > self._deadline and not self._given_up:
            self._given_up = "out_of_time"
        if self._given_up:  # Ray would wait ten seconds for a trial that may take minutes
            for _, worker, _ in self._running.values():
                ray.kill(worker)
            self._running.clear()
            return
        for key, (config, worker, began) in list(self._running.items()):
            if now - began > (allowed := self._patience(config)):
                error = TimeoutError(f"not finished after {allowed / 60:.3g} minutes (resources.minutes)")
                self._dispatch.given_up(key)
                self._hear(key, failed_trial(config, error))
                ray.kill(worker)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        packed, key = result.pop("result"), trial.trial_id  # popped, since Ray keeps the last result of every trial
        if self._dispatch.holds(key):
            unpacked = unpack_result(packed)
            self._dispatch.finished(key, unpacked)
            self._hear(key, unpacked)

    def on_trial_error(self, iteration, trials, trial, **info):
        key = trial.trial_id
        if self._given_up or not self._dispatch.holds(key):
            return
        config, death = TrialConfig(**trial.config["trial"]), death_of(trial)
        began = self._running.pop(key, None) is not None
        lost = {"out_of_memory": death.out_of_memory, "with_its_node": death.with_its_node}
        if self._dispatch.died(key, began=began, **lost):
            if began:
                self._reporter.retried(config, death.cause)
        else:
            self._hear(key, failed_trial(config, RuntimeError(f"worker died: {death.cause}")))

    def _hear(self, key: str, result: TrialResult) -> None:
        self._running.pop(key, None)
        if len(self._first_errors) < SAME_FAILURES:
            self._first_errors.append(result.error if result.status == "failed" else None)
        self._reporter.finished(result, len(self._running))
