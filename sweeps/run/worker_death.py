"""How Ray says that the worker of a trial is gone, and why."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from locft.errors import out_of_memory


@dataclass(frozen=True)
class Death:
    """Of a worker, in the middle of a trial or before it."""

    cause: str
    """What Ray says of it, in one line."""
    out_of_memory: bool
    """Ray ended it because its node ran out of memory, or the trial was refused more."""
    with_its_node: bool
    """The whole node is gone."""


def death_of(trial) -> Death:
    """What killed the worker of this trial of Ray Tune, from the files that Ray Tune left of it."""
    import ray

    try:
        said = Path(trial.error_file).read_text(encoding="utf-8").strip()
    except (OSError, TypeError):
        said = ""
    try:
        error = ray.cloudpickle.loads(Path(trial.pickled_error_file).read_bytes())
    except Exception:  # it does not unpickle here, or is none of the errors that Ray Tune keeps
        error = None
    cause = getattr(error, "cause", None)
    lines = said.partition(" Some common causes")[0].splitlines()  # advice follows there
    told = next((line for line in lines if "low on memory" in line), lines[-1]) if lines else "no cause known"
    return Death(told, isinstance(cause, Exception) and out_of_memory(cause), "node has died" in said)


@contextmanager
def every_death_is_heard() -> Iterator[None]:
    """Within it Ray Tune takes every loss of a worker for one.

    It knows only those that are a RayActorError, and ends the whole run with "Caught unexpected exception" for others
    (Ray 2.60, `RayActorManager._actor_task_failed`): above all for the OutOfMemoryError with which Ray tells that a node's
    memory monitor has killed a worker.
    """
    from ray.air.execution._internal.event_manager import RayEventManager
    from ray.exceptions import RayActorError, RayError, RayTaskError

    def known(error: Exception) -> Exception:
        if not isinstance(error, RayError) or isinstance(error, (RayActorError, RayTaskError)):
            return error
        death = RayActorError(error_msg=str(error))
        death.cause = error
        return death

    track = RayEventManager.track_future

    def track_future(self, future, on_result=None, on_error=None):
        track(self, future, on_result, on_error and (lambda error: on_error(known(error))))

    RayEventManager.track_future = track_future
    try:
        yield
    finally:
        RayEventManager.track_future = track
