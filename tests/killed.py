"""A training whose process dies."""

from contextlib import contextmanager

import pytest

from locft.train.pipelines import PositionTrainer


class Killed(Exception):
    pass


@contextmanager
def killed_after(steps, monkeypatch):
    """The training inside makes this many steps."""
    left, step = [steps], PositionTrainer.step_on

    def dying(trainer, rows, replay=()):
        left[0] -= 1
        if left[0] < 0:
            raise Killed
        return step(trainer, rows, replay)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PositionTrainer, "step_on", dying)
        yield
