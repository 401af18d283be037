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
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from sweeps.records import TrialConfig, TrialResult, pack_result, unpack_result
from sweeps.search import Search, as_searcher
from sweeps.trial import Basis, TrialInputs, resident_workbench, run_trial

if TYPE_CHECKING:
    from locft.workbench import Baseline

T = TypeVar("T")

SAME_FAILURES = 3
"""So many first trials that all fail for one reason stop the study: the rest would fail for it too."""
WORKER_RESTARTS = 2
"""A trial whose worker process died is tried so many times more."""

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

    Raises whatever the first one that fails raises.
    """
    import ray

    def call(work: Callable[[], T]) -> T:
        return work()

    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=WORKER_RESTARTS)(call)
    try:
        return ray.get([task.remote(work) for work in works])
    except ray.exceptions.RayTaskError as error:  # its own text is the worker's whole traceback
        raise error.cause from error


def compute_baseline(inputs: TrialInputs, cpus: float, gpus: float) -> "Baseline":
    """Measure the unedited model on a worker."""
    return on_workers([lambda: resident_workbench(inputs).baseline], cpus, gpus)[0]


def run_trials(
    source: list[TrialConfig] | Search,
    bases: Mapping[str, Basis],
    *,
    cpus: float,
    gpus: float,
    concurrent: int,
    reporter: Reporter,
    deadline: float = math.inf,
    trial_seconds: float = math.inf,
) -> Ending:
    """Run trials until the source has no more; every result, failures included, goes to the reporter.

    source: the open trials, or a search that proposes them. bases: by the `data_fingerprint` of trials. deadline: as of
    `time.monotonic`; what runs then is given up. trial_seconds: a trial that takes longer is killed and failed. One that raises is a failed result and the others go on; when the
    first `SAME_FAILURES` results are failures with one cause, the rest is not started. On Ctrl-C or SIGTERM the running trials
    are given up; a second one raises KeyboardInterrupt at once.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # it would end the run without telling us
    os.environ.setdefault("TUNE_PRINT_ALL_TRIAL_ERRORS", "0")  # each would be a long traceback; we say it in one line
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # what did not complete, the reporter has heard
    listener = _listener(reporter, deadline, trial_seconds)
    search = {} if isinstance(source, list) else {"search_alg": as_searcher(source), "num_samples": source.trials}
    space = {"trial": tune.grid_search([config.to_dict() for config in source])} if isinstance(source, list) else None
    trainable = tune.with_parameters(_trainable, bases=dict(bases))
    with tempfile.TemporaryDirectory(prefix="locft-ray-") as scratch, _on_interrupt(listener.stopper.interrupt):
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            param_space=space,
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                reuse_actors=True,  # a fresh process would load the model anew for every trial
                trial_name_creator=lambda trial: trial.trial_id,
                trial_dirname_creator=lambda trial: trial.trial_id,
                **search,
            ),
            run_config=tune.RunConfig(
                storage_path=scratch,
                verbose=0,
                callbacks=[listener],
                stop=listener.stopper,
                failure_config=tune.FailureConfig(max_failures=WORKER_RESTARTS),
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


def _trainable(config: Mapping[str, Any], bases: Mapping[str, Basis]) -> None:
    """What Ray Tune calls on a worker."""
    from ray import tune

    trial = TrialConfig(**config["trial"])
    basis = bases[trial.data_fingerprint]
    try:
        result = run_trial(resident_workbench(basis.inputs, basis.baseline), trial)
    except Exception as error:  # whatever a trial raises is that trial's result; the worker and the study go on
        result = worker_failure(trial, error)
    tune.report({"failed": int(result.status == "failed"), "result": pack_result(result)})


def _listener(reporter: Reporter, deadline: float, trial_seconds: float):
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
            self.done: set[str] = set()
            self.workers: dict[str, Any] = {}
            self.began: dict[str, float] = {}
            self.overdue: set[str] = set()
            """Trials that took too long: Ray starts them again, and they are killed again until it gives them up."""

        def __reduce__(self):
            """Ray writes its set-up to disk for a restore that never happens here; screen and client stay out of it."""
            return tune.Callback, ()

        def on_trial_start(self, iteration, trials, trial, **info):
            self.workers[trial.trial_id] = trial.temporary_state.ray_actor
            self.began[trial.trial_id] = time.monotonic()
            if trial.trial_id in self.overdue:
                ray.kill(self.workers[trial.trial_id])
            reporter.started(_others_running(trials, trial) + 1)

        def on_step_end(self, iteration, trials, **info):
            if time.monotonic() > deadline and not self.stopper.given_up:
                self.stopper.given_up = "out_of_time"
            if self.stopper.given_up:  # Ray would wait ten seconds for a trial that may take minutes
                for worker in self.workers.values():
                    ray.kill(worker)
                self.workers.clear()
                return
            for trial in trials:
                late = trial.status == "RUNNING" and time.monotonic() - self.began[trial.trial_id] > trial_seconds
                if late and trial.trial_id not in self.overdue:
                    self.overdue.add(trial.trial_id)
                    error = TimeoutError(f"not done after {trial_seconds / 60:g} minutes (resources.minutes)")
                    self._hear(worker_failure(TrialConfig(**trial.config["trial"]), error), _others_running(trials, trial))
                    ray.kill(self.workers[trial.trial_id])

        def on_trial_recover(self, iteration, trials, trial, **info):
            config = TrialConfig(**trial.config["trial"])
            if not (self.stopper.given_up or config.id in self.done or trial.trial_id in self.overdue):
                reporter.retried(config, _death(trial))

        def on_trial_result(self, iteration, trials, trial, result, **info):
            self.began[trial.trial_id] = math.inf
            self._hear(unpack_result(result["result"]), _others_running(trials, trial))

        def on_trial_error(self, iteration, trials, trial, **info):
            if self.stopper.given_up or trial.trial_id in self.overdue:
                return
            error = RuntimeError(f"worker died: {_death(trial)}")
            self._hear(worker_failure(TrialConfig(**trial.config["trial"]), error), _others_running(trials, trial))

        def _hear(self, result: TrialResult, running: int) -> None:
            if result.config.id in self.done:  # its worker died after the result, and Ray tried it again
                return
            if result.status == "done":
                self.done.add(result.config.id)
            self.stopper.note(result)
            reporter.finished(result, running)

    return Listener()


def _death(trial) -> str:
    """Why Ray says a trial's worker died, in one line; the advice that follows there is left out."""
    try:
        said = Path(trial.error_file).read_text(encoding="utf-8").strip()
    except OSError:
        said = ""
    return said.splitlines()[-1].partition(" Some common causes")[0] if said else "no cause known"


def _others_running(trials, trial) -> int:
    """The status of the trial itself is not reliable inside a callback: it is set before some and after others."""
    return sum(other.status == "RUNNING" for other in trials if other is not trial)
