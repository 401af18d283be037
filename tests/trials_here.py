"""The work of a study's workers in this process, for tests of everything around it. Ray has tests of its own."""

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial

import pytest

from sweeps.run.dispatch import ListedTrials, Room
from sweeps.run.runner import SAME_FAILURES, failed_trial
from sweeps.study.trial_types import pack_result, unpack_result


def run_trials(source, work, *, reporter, deadline=math.inf, **_):
    """`sweeps.run.runner.run_trials`, one trial after the other."""
    search = ListedTrials(source) if isinstance(source, Sequence) else source
    errors = []
    while time.monotonic() < deadline:
        key = str(len(errors))
        config = search.propose(key)
        if config is None:
            return "complete"
        reporter.started(1)
        try:
            result = work(config)
        except Exception as error:
            result = failed_trial(config, error)
        result = unpack_result(pack_result(result))
        search.learn(key, result)
        errors.append(result.error)
        reporter.finished(result, 0)
        if len(errors) == SAME_FAILURES and errors[0] and len(set(errors)) == 1:
            return "same_failure"
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
