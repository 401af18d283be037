"""Edits that arrive a few at a time: what is trained, what is replayed, and what an earlier edit is to it."""

from dataclasses import replace

import pytest
import torch

from locft.model.positions import TuningPosition
from locft.train import pipelines
from locft.train.examples import TrainingExamples
from locft.train.methods import HELD_BACK, MethodSettings
from locft.train.objective import edit_losses, mean_loss
from locft.train.pipelines import Beside, Earlier, TrainingSettings, finetune
from locft.train.reference import full_forward
from tests.tiny import EDITS, edit_rows

POSITION = TuningPosition(1, "mlp_down")
SETTINGS = TrainingSettings(pipeline="stream", batch_size=2, learning_rate=0.1, epochs=12, seed=3)
EASY = {"stop_below": 1.5, "skip_below": 1.5}
"""What so small a model can learn of any one edit."""


@pytest.fixture(scope="module")
def rows(loaded):
    return edit_rows(loaded, [*EDITS, ("The largest planet is", "Mars")])


def trained(loaded, rows, earlier=None, **changes):
    return finetune(loaded, TrainingExamples.of_rows(rows), POSITION, replace(SETTINGS, **changes), earlier=earlier)


def loss(loaded, training, rows):
    return mean_loss(full_forward(loaded.model, training.delta.weights(loaded.model)), rows)


def same(one, other):
    return all(torch.equal(one.delta.tensors[name], other.delta.tensors[name]) for name in one.delta.tensors)


def test_all_edits_in_one_arrival_are_trained_as_breadth_first(loaded, rows):
    together = trained(loaded, rows, pipeline="breadth_first")
    assert same(trained(loaded, rows, arrival=len(rows)), together)
    assert same(trained(loaded, rows, arrival=100), together)


def test_each_arrival_ends_when_its_edits_are_learnt(loaded, rows):
    training = trained(loaded, rows, replay=0, epochs=200, **EASY)
    assert len(training.losses) == len(training.arrival_seconds) == len(rows)
    assert max(training.losses) < EASY["stop_below"]
    assert training.steps < 200 * len(rows)
    assert [len(trained(loaded, rows, arrival=size, epochs=1).losses) for size in (1, 4, 6)] == [6, 2, 1]


@pytest.mark.parametrize("rest_below", [0.0, 1.5])
@pytest.mark.parametrize("pipeline", ["stream", "breadth_first", "depth_first"])
def test_few_edits_are_trained_until_they_are_learnt_in_all_formats(loaded, pipeline, rest_below):
    """An epoch draws one format for each edit, so the loss of one epoch may be that of a single format."""
    forms = edit_rows(
        loaded, [(wording, "Mars") for wording in ("Largest planet:", "Q: largest? A:", "Tell me: largest?")]
    )
    for seed in range(4):
        settings = replace(SETTINGS, pipeline=pipeline, epochs=300, seed=seed, rest_below=rest_below, **EASY)
        training = finetune(loaded, TrainingExamples(forms[:1], (forms,)), POSITION, settings)
        weights = training.delta.weights(loaded.model)
        losses = edit_losses(full_forward(loaded.model, weights), forms, "edit")
        assert float(losses.mean()) < EASY["stop_below"], f"{losses} after {training.steps} steps"


def test_replay_keeps_what_came_first(loaded, rows):
    alone, replayed = (trained(loaded, rows, replay=replay, epochs=40) for replay in (0, 4))
    assert loss(loaded, replayed, rows[:3]) < 0.5 * loss(loaded, alone, rows[:3])
    assert not same(alone, replayed)


@pytest.mark.parametrize("replay", [1, 4])
def test_earlier_edits_that_are_forgotten_are_found_and_trained(loaded, rows, replay, monkeypatch):
    """More than replay alone retains; without replay nothing is reviewed."""
    settings = {"replay": replay, "epochs": 150, "stop_below": 1.5, "skip_below": 0.4}

    def forgotten():
        return sum(loss(loaded, trained(loaded, rows, seed=seed, **settings), rows[:-1]) for seed in range(4))

    reviewed, without = forgotten(), trained(loaded, rows, **settings | {"replay": 0})
    monkeypatch.setattr(pipelines, "REVIEWS", 0)
    assert reviewed < 0.99 * forgotten()
    assert same(trained(loaded, rows, **settings | {"replay": 0}), without)


def test_watching_a_stream_sees_each_arrival_and_changes_nothing(loaded, rows):
    seen = []
    watched = finetune(
        loaded, TrainingExamples.of_rows(rows), POSITION, replace(SETTINGS, arrival=2, epochs=2),
        beside=Beside(watch=lambda arrived, change: seen.append((arrived, change()))),
    )  # fmt: skip
    assert [arrived for arrived, _ in seen] == [2, 4, 6]
    assert same(trained(loaded, rows, arrival=2, epochs=2), watched)
    name = next(iter(watched.delta.tensors))
    assert torch.equal(seen[-1][1].tensors[name], watched.delta.tensors[name])
    assert not torch.equal(seen[0][1].tensors[name], seen[1][1].tensors[name])


def test_momentum_that_is_kept_changes_the_steps(loaded, rows):
    assert not same(trained(loaded, rows), trained(loaded, rows, momentum="kept"))


def test_a_stream_can_be_cut_and_gone_on_with(loaded, rows):
    """Without replay an arrival knows nothing of the others but the weights."""
    whole = trained(loaded, rows, replay=0, arrival=1, batch_size=1)
    first = trained(loaded, rows[:4], replay=0, arrival=1, batch_size=1)
    rest = trained(loaded, rows, Earlier(first.delta, 4), replay=0, arrival=1, batch_size=1)
    assert len(rest.losses) == 2
    for name, change in whole.delta.tensors.items():
        torch.testing.assert_close(rest.delta.tensors[name], change, rtol=0, atol=1e-5)


def test_what_is_learnt_already_changes_nothing(loaded, rows):
    first = trained(loaded, rows, pipeline="breadth_first", epochs=40)
    known = 1.1 * max(loss(loaded, first, [row]) for row in rows)
    again = trained(loaded, rows, Earlier(first.delta, 3), arrival=3, skip_below=known)
    assert again.steps == 0
    for name, change in first.delta.tensors.items():
        torch.testing.assert_close(again.delta.tensors[name], change, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "method", [name for name in MethodSettings.__annotations__["method"].__args__ if name not in HELD_BACK]
)
def test_every_method_goes_on_with_an_earlier_edit(loaded, rows, method):
    first = trained(loaded, rows[:3], pipeline="breadth_first", epochs=40)
    more = trained(
        loaded, rows, Earlier(first.delta, 3), arrival=3, method=method, alpha=64.0, norm_bound=0.05, epochs=40
    )
    assert loss(loaded, more, rows[3:]) < loss(loaded, first, rows[3:])
    before = {name: change.norm() for name, change in first.delta.tensors.items()}
    assert all(more.delta.tensors[name].norm() > 0.3 * norm for name, norm in before.items())


def test_time_that_is_over_ends_it(loaded, rows):
    first = trained(loaded, rows[:3], pipeline="breadth_first", epochs=2)
    late = trained(loaded, rows, Earlier(first.delta, 3, seconds=0.0), arrival=1)
    assert late.steps <= 1
    assert len(late.arrival_seconds) == 1
    assert not late.diverged
