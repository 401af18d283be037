"""The work of a study's workers in this process, for tests of everything around it. Ray has tests of its own."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest

from sweeps.run.dispatch import Dispatch, ListedTrials, Room
from sweeps.run.runner import TrialListener, TrialWorker

ONE = "one"
"""The key of the trial that runs."""


def run_trials(source, work, *, room, reporter, deadline=math.inf, some_done=False, **_):
    """`sweeps.run.runner.run_trials`, one trial after the other: what a worker does and what the driver hears are its own."""
    dispatch = Dispatch(ListedTrials(source) if isinstance(source, Sequence) else source, room)
    listener = TrialListener(dispatch, room, reporter, deadline, lambda _: math.inf, some_done)
    while time.monotonic() < deadline:
        config = dispatch.next(ONE)
        if config is None:
            return "complete"
        reporter.started(1)
        result = TrialWorker.step(SimpleNamespace(config={"trial": config.to_dict()}, _work=work))
        listener.on_trial_result(0, [], SimpleNamespace(trial_id=ONE), result)
        if listener.ending != "complete":
            return listener.ending
    return "out_of_time"


def in_this_process(patch: pytest.MonkeyPatch) -> None:
    """From now on studies need no Ray; up to two trials count as run side by side."""

    def here(works, *_):
        return [work() for work in works]

    patch.setattr("sweeps.run.runner.run_trials", run_trials)
    patch.setattr("sweeps.session.on_workers", here)
    patch.setattr("sweeps.select.selection.on_workers", here)
    patch.setattr("sweeps.session.ray_cluster", lambda _, resources, *__: nullcontext(Room(partial(room, resources))))


def room(resources):
    return resources.places([{"CPU": 2.0, "GPU": 0.0}])
