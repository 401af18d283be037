"""Everything that relies on undocumented internals of Ray, written for Ray 2.60. tests/sweeps/run/test_ray_internals.py fails
if another version of Ray behaves differently."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from locft.errors import out_of_memory


@dataclass(frozen=True)
class WorkerDeath:
    """Why a trial's worker died."""

    cause: str
    """Ray's explanation, in one line."""
    out_of_memory: bool
    """Ray killed it because its node ran out of memory, or an allocation of the trial failed."""
    with_its_node: bool
    """The whole node is gone."""


def death_of(trial) -> WorkerDeath:
    """What killed the worker of a trial of Ray Tune, from the two error files that Ray Tune writes."""
    import ray

    try:
        text = Path(trial.error_file).read_text(encoding="utf-8").strip()
    except (OSError, TypeError):
        text = ""
    try:
        error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # there is none, or it cannot be unpickled here
        error = None
    cause = getattr(error, "cause", None)
    lines = text.partition(" Some common causes")[0].splitlines()  # general advice follows
    line = next((line for line in lines if "low on memory" in line), lines[-1]) if lines else "unknown cause"
    return WorkerDeath(line, isinstance(cause, Exception) and out_of_memory(cause), "node has died" in text)


def worker_of(trial):
    """The actor that runs a trial of Ray Tune."""
    return trial.temporary_state.ray_actor


@contextmanager
def every_death_is_heard() -> Iterator[None]:
    """While the block runs, Ray Tune recognises every loss of a worker as such.

    Ray Tune recognises only losses reported as a RayActorError. On others it ends the whole run ("Caught unexpected exception",
    in `RayActorManager._actor_task_failed`), above all on the OutOfMemoryError that reports a worker killed by its node's memory
    monitor.
    """
    from ray.air.execution._internal.event_manager import RayEventManager
    from ray.exceptions import RayActorError, RayError, RayTaskError

    def as_death(error: Exception) -> Exception:
        if not isinstance(error, RayError) or isinstance(error, (RayActorError, RayTaskError)):
            return error
        death = RayActorError(error_msg=str(error))
        death.cause = error
        return death

    track = RayEventManager.track_future

    def track_future(self, future, on_result=None, on_error=None):
        track(self, future, on_result, on_error and (lambda error: on_error(as_death(error))))

    RayEventManager.track_future = track_future
    try:
        yield
    finally:
        RayEventManager.track_future = track
