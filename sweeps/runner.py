"""Run a study's open trials with Ray Tune.

Ray Tune decides when and where a trial runs; which trials are open is decided by what the tracking store holds, never by
Ray's own snapshots (after a killed driver those lag behind). So the same command resumes a study.
"""

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from sweeps.records import TrialConfig, TrialResult, pack_result, unpack_result
from sweeps.search import TrialSearch
from sweeps.trial import TrialInputs, resident_workbench, run_trial

if TYPE_CHECKING:
    from locft.workbench import Baseline
    from sweeps.schema import Resources

SAME_FAILURES = 3
"""So many first trials that all fail for one reason stop the study: the rest would fail for it too."""
WORKER_RESTARTS = 2
"""A trial whose worker process died is tried so many times more."""


class Reporter(Protocol):
    """Hears what happens to trials; called in the driver, one call at a time."""

    def started(self, running: int) -> None: ...

    def finished(self, result: TrialResult, running: int) -> None: ...


def worker_failure(config: TrialConfig, error: BaseException) -> TrialResult:
    """A failed trial as a result, its cause in one line."""
    cause = (str(error).strip() or type(error).__name__).splitlines()[0]
    return TrialResult(config, "failed", f"{type(error).__name__}: {cause}"[:500])


@contextmanager
def ray_session(address: str | None) -> Iterator[None]:
    """Connect to the cluster at `address` (auto finds one), or start Ray on this machine and stop it afterwards.

    A Ray that is already running in this process is used and left alone.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    from locft.errors import InputError

    if ray.is_initialized():
        yield
        return
    quiet = {"include_dashboard": False} if address is None else {}
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"Ray cluster {address!r}: {str(error).strip().splitlines()[0]}; start one with `ray up ray_cluster.yaml` or "
            "`ray start --head`, or leave --address away to run on this machine"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def compute_baseline(inputs: TrialInputs, cpus: float, gpus: float) -> "Baseline":
    """Measure the unedited model on a worker (which keeps the model for its trials)."""
    import ray

    def measure() -> "Baseline":
        return resident_workbench(inputs).baseline

    return ray.get(ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=WORKER_RESTARTS)(measure).remote())


def run_trials(
    source: list[TrialConfig] | TrialSearch,
    inputs: TrialInputs,
    baseline: "Baseline",
    *,
    cpus: float,
    gpus: float,
    concurrent: int,
    reporter: Reporter,
    minutes: float | None = None,
) -> None:
    """Run trials until the source has no more; every result, failures included, goes to the reporter.

    source: the open trials, or a search that proposes them. A trial that raises is a failed result and the others go on;
    when the first `SAME_FAILURES` results are failures with one cause, the rest is not started.
    """
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune

    listener = _listener(reporter)
    search = {} if isinstance(source, list) else {"search_alg": source.as_searcher(), "num_samples": source.trials}
    space = {"trial": tune.grid_search([config.to_dict() for config in source])} if isinstance(source, list) else None
    trainable = tune.with_parameters(_trainable, inputs=inputs, baseline=baseline)
    with tempfile.TemporaryDirectory(prefix="locft-ray-") as scratch:
        tune.Tuner(
            tune.with_resources(trainable, {"cpu": cpus, "gpu": gpus}),
            param_space=space,
            tune_config=tune.TuneConfig(
                max_concurrent_trials=concurrent,
                reuse_actors=True,  # a fresh process would load the model anew for every trial
                time_budget_s=minutes * 60 if minutes else None,
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


def _trainable(config: Mapping[str, Any], inputs: TrialInputs, baseline: "Baseline") -> None:
    """What Ray Tune calls on a worker."""
    from ray import tune

    trial = TrialConfig(**config["trial"])
    try:
        result = run_trial(resident_workbench(inputs, baseline), trial)
    except Exception as error:  # whatever a trial raises is that trial's result; the worker and the study go on
        result = worker_failure(trial, error)
    tune.report({"failed": int(result.status == "failed"), "result": pack_result(result)})


def _listener(reporter: Reporter):
    """Ray Tune callback that turns events into the reporter's; carries the stopper that it feeds."""
    from ray import tune
    from ray.tune.stopper import Stopper

    class StopOnSameFailure(Stopper):
        def __init__(self):
            self.causes: list[str | None] = []

        def note(self, result: TrialResult) -> None:
            if len(self.causes) < SAME_FAILURES:
                self.causes.append(result.error if result.status == "failed" else None)

        def __call__(self, trial_id: str, result: Mapping[str, Any]) -> bool:
            return False

        def stop_all(self) -> bool:
            first = self.causes[0] if self.causes else None
            return first is not None and len(self.causes) == SAME_FAILURES and set(self.causes) == {first}

    class Listener(tune.Callback):
        def __init__(self):
            self.stopper = StopOnSameFailure()

        def __reduce__(self):
            """Ray writes its set-up to disk for a restore that never happens here; screen and client stay out of it."""
            return tune.Callback, ()

        def on_trial_start(self, iteration, trials, trial, **info):
            reporter.started(_running(trials))

        def on_trial_result(self, iteration, trials, trial, result, **info):
            self._hear(unpack_result(result["result"]), trials)

        def on_trial_error(self, iteration, trials, trial, **info):
            error = RuntimeError(f"worker died: {str(trial.get_error() or 'no cause known').strip().splitlines()[-1]}")
            self._hear(worker_failure(TrialConfig(**trial.config["trial"]), error), trials)

        def _hear(self, result: TrialResult, trials) -> None:
            self.stopper.note(result)
            reporter.finished(result, max(0, _running(trials) - 1))

    return Listener()


def _running(trials) -> int:
    return sum(trial.status == "RUNNING" for trial in trials)


def concurrent_trials(resources: "Resources") -> int:
    """Trials at a time that the running Ray can hold; InputError when it cannot hold one."""
    import ray

    from locft.errors import InputError

    have = ray.cluster_resources()
    cpus, gpus = have.get("CPU", 0.0), have.get("GPU", 0.0)
    if resources.cpus > cpus or resources.gpus > gpus:
        raise InputError(
            f"resources: a trial wants {resources.cpus:g} CPUs and {resources.gpus:g} GPUs, but Ray has {cpus:g} CPUs and "
            f"{gpus:g} GPUs in all; ask for less, or give --address of a larger cluster"
        )
    fit = int(cpus // resources.cpus)
    if resources.gpus:
        fit = min(fit, int(gpus / resources.gpus + 1e-9))
    return fit if resources.concurrent == "auto" else min(fit, resources.concurrent)
