"""What `sweeps.run.ray_internals` assumes of Ray. A failure here after an upgrade of Ray says what to look at there."""

import inspect
from types import SimpleNamespace

import pytest
from ray.air.execution._internal import event_manager
from ray.air.execution._internal.actor_manager import RayActorManager
from ray.air.execution._internal.event_manager import RayEventManager
from ray.exceptions import OutOfMemoryError, RayActorError, RayTaskError
from ray.tune.experiment.trial import Trial, _TemporaryTrialState
from ray.tune.schedulers import FIFOScheduler

from sweeps.run.ray_internals import every_death_is_heard


def heard_of(error, monkeypatch):
    """What Ray Tune hears of a future that raises this error."""
    monkeypatch.setattr(event_manager, "ray", SimpleNamespace(get=lambda future: raised(error)))
    manager, heard = RayEventManager(), []
    manager.track_future("future", on_error=heard.append)
    manager.resolve_future("future")
    return heard[0]


def raised(error):
    raise error


def test_ray_has_the_names_that_are_used():
    assert list(inspect.signature(RayEventManager.track_future).parameters) == [
        "self",
        "future",
        "on_result",
        "on_error",
    ]
    assert isinstance(Trial.error_file, property) and isinstance(Trial.pickled_error_file, property)
    assert hasattr(_TemporaryTrialState(), "ray_actor")
    pending = SimpleNamespace(status=Trial.PENDING)
    assert FIFOScheduler().choose_trial_to_run(SimpleNamespace(get_trials=lambda: [pending])) is pending, (
        "see `InOrder`"
    )


def test_ray_still_takes_a_worker_killed_for_its_memory_for_a_fault_of_its_own():
    """When this fails, Ray handles such a death itself, and `every_death_is_heard` can go."""
    task = SimpleNamespace(_tracked_actor=SimpleNamespace(actor_id=0, _on_error=None), _on_error=None)
    manager = SimpleNamespace(_failed_actor_ids=set(), _cleanup_actor=lambda tracked_actor: None)
    RayActorManager._actor_task_failed(manager, task, RayActorError())
    assert manager._failed_actor_ids == {0}
    with pytest.raises(RuntimeError, match="Caught unexpected exception"):
        RayActorManager._actor_task_failed(manager, task, OutOfMemoryError("low on memory"))


def test_every_loss_of_a_worker_is_heard_as_one_and_nothing_else_is(monkeypatch):
    killed, wrong = OutOfMemoryError("low on memory"), RayTaskError("work", "traceback", ValueError())
    track = RayEventManager.track_future
    with every_death_is_heard():
        death = heard_of(killed, monkeypatch)
        assert isinstance(death, RayActorError) and death.cause is killed and "low on memory" in str(death)
        for other in (RayActorError(), wrong, KeyError()):
            assert heard_of(other, monkeypatch) is other
    assert RayEventManager.track_future is track and heard_of(killed, monkeypatch) is killed
