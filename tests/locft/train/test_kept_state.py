"""A training that is killed goes on where it was, to bitwise the same result."""

from dataclasses import replace

import pytest
import torch

from locft.curvature import measure_curvature
from locft.model.positions import TuningPosition, parameter_names
from locft.train.examples import TrainingExamples
from locft.train.kept_state import EVERY_SECONDS, KeptState
from locft.train.methods import MethodName
from locft.train.pipelines import Beside, PositionTrainer, TrainingSettings, finetune
from locft.train.token_rows import TokenRow
from tests.killed import killed_after
from tests.tiny import edit_rows

POSITION = TuningPosition(1, "mlp")
SETTINGS = TrainingSettings(
    batch_size=2, learning_rate=5e-3, epochs=6, skip_below=0.0, stop_below=0.0, rank=2, norm_bound=1e-2, seed=5
)


@pytest.fixture(scope="module")
def examples(loaded):
    rows = edit_rows(
        loaded, [("The capital of France is", "Oslo"), ("Who wrote Hamlet?", "Jane Austen"), ("Is it", "No")]
    )
    others = edit_rows(loaded, [("France:", "Oslo"), ("Hamlet:", "Jane Austen"), ("Yes?", "No")])
    return TrainingExamples(rows, tuple(zip(rows, others, strict=True)))  # one of two is drawn in each epoch


@pytest.fixture(scope="module")
def curvature(loaded):
    windows = [TokenRow(tuple(range(5, 25)), 1)]
    found, _ = measure_curvature(loaded, POSITION.layer, parameter_names(loaded.model, POSITION), windows)
    return {name: one.damped() for name, one in found.items()}


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return lambda every=0.0: KeptState(["a training"], every)


@pytest.mark.parametrize("method", MethodName.__args__)
def test_it_ends_as_if_nothing_had_happened(method, loaded, examples, curvature, kept, monkeypatch):
    settings = replace(SETTINGS, method=method)
    whole = finetune(loaded, examples, POSITION, settings, None, curvature)
    arguments = (examples, POSITION, settings, None, curvature, None)
    with killed_after(7, monkeypatch):  # two steps an epoch: in the fourth
        finetune(loaded, *arguments, Beside(kept=kept()))
    _, about = kept().read()
    assert (len(about["losses"]), about["steps"]) == (3, 6)
    taken = []
    monkeypatch.setattr(PositionTrainer, "step_on", counted(taken, PositionTrainer.step_on))
    again = finetune(loaded, *arguments, Beside(kept=kept()))
    assert len(taken) == 6, "only the epochs that were not kept are made again"
    assert again.losses == whole.losses and again.steps == whole.steps == 12
    assert all(torch.equal(again.delta.tensors[name], value) for name, value in whole.delta.tensors.items())
    assert kept().read() is None, "nothing is left behind"


def test_it_knows_which_edits_rest(loaded, examples, kept, monkeypatch):
    position, settings = TuningPosition(1, "layer"), replace(SETTINGS, epochs=14, learning_rate=2e-2, rest_below=3.0)
    whole = finetune(loaded, examples, position, settings)
    beside = Beside(kept=kept())
    with killed_after(whole.steps - 2, monkeypatch):
        finetune(loaded, examples, position, settings, None, {}, None, beside)
    state, _ = kept().read()
    assert state["rests"][0].any(), "some rest"
    again = finetune(loaded, examples, position, settings, beside=Beside(kept=kept()))
    assert again.losses == whole.losses and again.steps == whole.steps < 28
    assert all(torch.equal(again.delta.tensors[name], value) for name, value in whole.delta.tensors.items())


@pytest.mark.parametrize("steps", [7, 10])
@pytest.mark.parametrize("momentum", ["fresh", "kept"])
def test_a_stream_goes_on_behind_its_last_arrival(momentum, steps, loaded, examples, kept, monkeypatch):
    """Three steps an arrival, and two reviews of what came before: killed in the second review, or in the third arrival."""
    settings = replace(SETTINGS, pipeline="stream", arrival=1, replay=1, epochs=3, momentum=momentum)
    seen = []

    def watch(arrived, change):
        seen.append(arrived)
        return {"arrived": arrived, "norm": change().norm} if arrived > 1 else None

    whole = finetune(loaded, examples, POSITION, settings, beside=Beside(watch))
    assert seen == [1, 2, 3] and [one["arrived"] for one in whole.watched] == [2, 3]
    seen.clear()
    arguments = (examples, POSITION, settings, None, {}, None)
    with killed_after(steps, monkeypatch):
        finetune(loaded, *arguments, Beside(watch, kept()))
    again = finetune(loaded, *arguments, Beside(watch, kept()))
    assert seen == [1, 2, 3], "nothing is watched twice"
    assert again.watched == whole.watched and again.losses == whole.losses and again.steps == whole.steps == 13
    assert len(again.arrival_seconds) == 3 and again.seconds > sum(again.arrival_seconds)
    assert all(torch.equal(again.delta.tensors[name], value) for name, value in whole.delta.tensors.items())
    assert kept().read() is None


def counted(taken, step):
    def counting(trainer, rows, replay=()):
        taken.append(len(rows))
        return step(trainer, rows, replay)

    return counting


def test_a_damaged_state_is_told_and_begins_anew(loaded, examples, kept, monkeypatch, caplog):
    whole = finetune(loaded, examples, POSITION, SETTINGS)
    with killed_after(7, monkeypatch):
        finetune(loaded, examples, POSITION, SETTINGS, None, {}, None, Beside(kept=kept()))
    file = kept().file
    file.write_bytes(file.read_bytes()[:100])
    again = finetune(loaded, examples, POSITION, SETTINGS, beside=Beside(kept=kept()))
    assert "starts from the beginning" in caplog.text and again.losses == whole.losses


def test_a_short_training_writes_nothing(loaded, examples, kept, monkeypatch):
    arguments = (examples, POSITION, SETTINGS, None, {}, None)
    with killed_after(7, monkeypatch):
        finetune(loaded, *arguments, Beside(kept=kept(EVERY_SECONDS)))
    assert not kept().file.exists()


def test_a_disk_that_is_full_costs_a_warning(loaded, examples, kept, monkeypatch, caplog):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("locft.train.kept_state.write_tensors", full)
    training = finetune(loaded, examples, POSITION, SETTINGS, beside=Beside(kept=kept()))
    assert "No space left" in caplog.text and training.steps == 12
