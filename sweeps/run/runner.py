"""Run a study's open trials with Ray Tune.

Ray Tune decides when and where a trial runs; which trials are open is decided by what the tracking store holds, never
by Ray's own snapshots (after a killed driver those lag behind). So the same command resumes a study.
"""

import logging
import math
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from locft.errors import InputError, out_of_memory
from sweeps.run.dispatch import Dispatch, Listed
from sweeps.run.cluster import WORKER_RESTARTS, Room
from sweeps.study.trial_types import TrialConfig, TrialResult, pack_result, unpack_result
from sweeps.run.search import Search
from sweeps.run.trial import Basis, resident_workbench, run_trial
from sweeps.run.worker_death import death_of, every_death_is_heard

if TYPE_CHECKING:
    from sweeps.study.schema import Resources

T = TypeVar("T")

SAME_FAILURES = 3
"""So many first trials that all fail for one reason stop the study: the rest would fail for it too."""
PENDING = "64"
"""Workers that Ray Tune starts side by side."""

Ending = Literal["complete", "same_failure", "interrupted", "out_of_time"]
"""Why no further trial is run: there is none, the first ones all failed for one reason, Ctrl-C, or the deadline."""


class Reporter(Protocol):
    """Hears what happens to trials; called in the driver, one call at a time (`note` also from another thread)."""

    def note(self, text: str) -> None:
        """Something that whoever waits should know."""

    def started(self, running: int) -> None: ...

    def retried(self, config: TrialConfig, cause: str) -> None: ...

    def finished(self, result: TrialResult, running: int) -> None: ...


def worker_failure(config: TrialConfig, error: BaseException) -> TrialResult:
    """A failed trial as a result, its cause in one line."""
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrialResult(config, "failed", f"{type(error).__name__}: {cause}"[:500])


def on_workers(works: Sequence[Callable[[], T]], cpus: float, gpus: float) -> list[T]:
    """Run functions on workers, side by side where there is room; what they return, in their order.

    Raises whatever the first one that fails raises; InputError where Ray ended each attempt because a node ran out of memory.
    """
    import ray

    def call(work: Callable[[], T]) -> T:
        return work()

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=WORKER_RESTARTS)(call)
    try:
        return ray.get([task.remote(work) for work in works])
    except ray.exceptions.RayTaskError as error:  # its own text is the worker's whole traceback
        raise error.cause from error
    except ray.exceptions.OutOfMemoryError as error:
        tries = f"measuring on a worker ran out of memory {WORKER_RESTARTS + 1} times"
        raise InputError(f"{tries}: {str(error).splitlines()[0]}") from error


def alone(work: Callable[[], T], resources: "Resources", *, here: bool) -> T:
    """Run a function while no trial runs: in this process where trials run `here` (`sweeps.run.cluster.trials_run_here`), since
    a worker would first have to be started, else on a worker."""
    return work() if here else on_workers([work], resources.cpus, resources.gpus)[0]


def train_and_measure(config: TrialConfig, bases: Mapping[str, Basis]) -> TrialResult:
    """The work of a trial. bases: by the `data_fingerprint` of trials."""
    basis = bases[config.data_fingerprint]
    return run_trial(resident_workbench(basis.inputs, basis.baseline), config)


def run_trials(
    source: Sequence[TrialConfig] | Search,
    bases: Mapping[str, Basis],
    *,
    cpus: float,
    gpus: float,
    room: Room,
    reporter: Reporter,
    deadline: float = math.inf,
    patience: Callable[[TrialConfig], float] = lambda trial: math.inf,
    work: Callable[[TrialConfig, Mapping[str, Basis]], TrialResult] = train_and_measure,
) -> Ending:
    """Run trials until the source has no more; every result, failures included, goes to the reporter.

    source: the open trials, or a search that proposes them. bases: what `work` needs. room: how many run at a time, asked
    again and again. deadline: as of `time.monotonic`; what runs then is given up. patience: a trial that takes more seconds
    than that is killed and failed. One that raises is a failed result and the others go on; one whose worker is lost is tried again
    (`sweeps.run.dispatch`). When the first `SAME_FAILURES` results are failures with one cause, the rest is not started. On
    Ctrl-C or SIGTERM the running trials are given up; a second one raises KeyboardInterrupt at once.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("TUNE_GLOBAL_CHECKPOINT_S", "1000000")  # Ray's snapshots grow with every trial; nothing reads them
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end the run without telling us
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # each would be a long traceback; we say it in one line
    os.environ.setdefault("TUNE_MAX_PENDING_TRIALS_PG", PENDING)
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # what did not complete, the reporter has heard
    dispatch = Dispatch(Listed(source) if isinstance(source, Sequence) else source, room)
    listener = _listener(dispatch, room, reporter, deadline, patience)
    worker = tune.with_parameters(_worker(), work=partial(work, bases=dict(bases)))
    worker = tune.with_resources(worker, {"cpu": cpus, "gpu": gpus})
    worker.__qualname__ = worker.__name__  # what lists of processes show: ray::TrialWorker.train
    with (
        tempfile.TemporaryDirectory(prefix="locft-ray-") as scratch,
        _on_interrupt(listener.stopper.interrupt),
        every_death_is_heard(),
    ):
        tune.Tuner(
            worker,
            tune_config=tune.TuneConfig(
                search_alg=_searcher(dispatch),
                scheduler=_scheduler(),
                num_samples=-1,  # the search says when it has no more
                reuse_actors=True,  # a fresh process would load the model anew for every trial
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[listener],
                stop=listener.stopper,
                checkpoint_config=tune.CheckpointConfig(checkpoint_at_end=False),
            ),
        ).fit()
    return listener.stopper.ending


@contextmanager
def _on_interrupt(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM calls `stop`, the next one does what it did before. Nothing outside the main thread."""
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


def _worker():
    """What Ray Tune keeps on a worker, and calls there once a trial."""
    from ray import tune

    class TrialWorker(tune.Trainable):
        def setup(self, config, work):
            self._work = work

        def reset_config(self, new_config) -> bool:
            return True  # Ray has set it; the process goes on with what it holds

        def step(self):
            trial = TrialConfig(**self.config["trial"])
            try:
                result = self._work(trial)
            except Exception as error:  # whatever a trial raises is that trial's result; the worker and the study go on
                if out_of_memory(error):  # unless ending this process is what helps
                    raise
                result = worker_failure(trial, error)
            return {"done": True, "failed": int(result.status == "failed"), "result": pack_result(result)}

    return TrialWorker


def _searcher(dispatch: Dispatch):
    """Where Ray Tune asks for the next trial."""
    from ray.tune.search import Searcher

    class Driven(Searcher):
        def __reduce__(self):
            """Ray writes its set-up to disk for a restore that never happens here."""
            return Searcher, ()

        def suggest(self, trial_id: str):
            config = dispatch.next(trial_id)
            if config == "wait":
                return None
            return {"trial": config.to_dict()} if config else Searcher.FINISHED

        def on_trial_complete(self, trial_id: str, result=None, error: bool = False) -> None:
            """The listener hears it, with the cause."""

        def save(self, checkpoint_path: str) -> None:
            """Nothing to save: a resumed study tells a new search what the tracking store holds."""

        def restore(self, checkpoint_path: str) -> None:
            """See `save`."""

    return Driven(metric="failed", mode="min")


def _scheduler():
    """Trials start in their order.

    Ray's own first-in-first-out hands a free worker to the trial that waits for a new one, and ends that one while it
    starts: where trials are shorter than the start of a worker, no further worker ever comes up.
    """
    from ray.tune.schedulers import FIFOScheduler

    class InOrder(FIFOScheduler):
        def choose_trial_to_run(self, tune_controller):
            return None

    return InOrder()


def _listener(
    dispatch: Dispatch, room: Room, reporter: Reporter, deadline: float, patience: Callable[[TrialConfig], float]
):
    """Ray Tune callback that turns events into the reporter's; carries the stopper that it feeds."""
    import ray
    from ray import tune
    from ray.tune.stopper import Stopper

    class StudyStopper(Stopper):
        """Asked by Ray Tune after every event whether the study ends here."""

        def __init__(self):
            self.causes: list[str | None] = []
            self.given_up: Ending | None = None

        def interrupt(self) -> None:
            self.given_up = "interrupted"

        def note(self, result: TrialResult) -> None:
            if len(self.causes) < SAME_FAILURES:
                self.causes.append(result.error if result.status == "failed" else None)

        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            return False

        @property
        def ending(self) -> Ending:
            if self.given_up:
                return self.given_up
            first = self.causes[0] if self.causes else None
            alike = first is not None and len(self.causes) == SAME_FAILURES and set(self.causes) == {first}
            return "same_failure" if alike else "complete"

        def stop_all(self) -> bool:
            return self.ending != "complete"

    class Listener(tune.Callback):
        def __init__(self):
            self.stopper = StudyStopper()
            self.running: dict[str, tuple[TrialConfig, Any, float]] = {}
            """By Ray's id of the trial: what it is, its worker, and when it began."""
            self.told_empty = False

        def __reduce__(self):
            """Ray writes its set-up to disk for a restore that never happens here; screen and client stay out of it."""
            return tune.Callback, ()

        def on_trial_start(self, iteration, trials, trial, **info):
            config, worker = TrialConfig(**trial.config["trial"]), trial.temporary_state.ray_actor
            self.running[trial.trial_id] = config, worker, time.monotonic()
            reporter.started(len(self.running))

        def on_step_end(self, iteration, trials, **info):
            if room.empty and not self.told_empty:
                reporter.note("every node that could run a trial is gone; waiting for another")
            self.told_empty = room.empty
            now = time.monotonic()
            if now > deadline and not self.stopper.given_up:
                self.stopper.given_up = "out_of_time"
            if self.stopper.given_up:  # Ray would wait ten seconds for a trial that may take minutes
                for _, worker, _ in self.running.values():
                    ray.kill(worker)
                self.running.clear()
                return
            for key, (config, worker, began) in list(self.running.items()):
                if now - began > (allowed := patience(config)):
                    error = TimeoutError(f"not done after {allowed / 60:.3g} minutes (resources.minutes)")
                    dispatch.given_up(key)
                    self._hear(key, worker_failure(config, error))
                    ray.kill(worker)

        def on_trial_result(self, iteration, trials, trial, result, **info):
            packed = result.pop("result")  # Ray keeps the last result of every trial
            if dispatch.holds(trial.trial_id):
                result = unpack_result(packed)
                dispatch.finished(trial.trial_id, result)
                self._hear(trial.trial_id, result)

        def on_trial_error(self, iteration, trials, trial, **info):
            key = trial.trial_id
            if self.stopper.given_up or not dispatch.holds(key):
                return
            config, death = TrialConfig(**trial.config["trial"]), death_of(trial)
            began = self.running.pop(key, None) is not None
            lost = {"out_of_memory": death.out_of_memory, "with_its_node": death.with_its_node}
            if dispatch.died(key, began=began, **lost):
                if began:
                    reporter.retried(config, death.cause)
            else:
                self._hear(key, worker_failure(config, RuntimeError(f"worker died: {death.cause}")))

        def _hear(self, key: str, result: TrialResult) -> None:
            self.running.pop(key, None)
            self.stopper.note(result)
            reporter.finished(result, len(self.running))

    return Listener()
