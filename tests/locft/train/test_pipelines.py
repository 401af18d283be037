"""The objective and the pipelines, held to their written definition by computations made independently here."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from locft.errors import out_of_memory
from locft.model.models import model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.examples import TrainingExamples
from locft.train.objective import batch_loss, loss_and_gradients
from locft.train.pipelines import Rests, TrainingSettings, finetune
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from tests.tiny import EDITS

POSITION = TuningPosition(1, "mlp_down")
WEIGHT = "model.layers.1.mlp.down_proj.weight"
SETTINGS = TrainingSettings(batch_size=2, learning_rate=1e-2, epochs=3, skip_below=0.0, stop_below=0.0, seed=3)


def token_losses(model, tokenizer, prompt: str, target: str) -> list[float]:
    """-log p of every target token and the EOS, from the written definition: one unpadded row, plain softmax."""
    prompt_ids = tokenizer(prompt)["input_ids"]
    target_ids = [*tokenizer(" " + target)["input_ids"], tokenizer.eos_token_id]
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + target_ids])).logits[0].double().numpy()
    losses = []
    for offset, token in enumerate(target_ids):
        scores = logits[len(prompt_ids) + offset - 1]
        losses.append(math.log(np.exp(scores - scores.max()).sum()) + scores.max() - scores[token])
    return losses


def test_loss_is_the_mean_over_tokens_of_an_edit_then_over_edits(loaded, rows):
    by_edit = [token_losses(loaded.model, loaded.tokenizer, *edit) for edit in EDITS]
    logits = full_forward(loaded.model)(rows)
    found = loss_and_gradients(lambda batch: logits.requires_grad_(), [logits], rows, "token", at_least=math.inf)
    assert found.by_edit == pytest.approx([np.mean(b) for b in by_edit], rel=1e-5) and found.gradients is None
    assert batch_loss(logits, rows, "edit").item() == pytest.approx(np.mean([np.mean(b) for b in by_edit]), rel=1e-5)
    assert batch_loss(logits, rows, "token").item() == pytest.approx(np.mean(np.concatenate(by_edit)), rel=1e-5)
    assert len({len(losses) for losses in by_edit}) > 1, "edits of one length could not tell the two averages apart"


def test_last_token_asks_the_prompt_alone_for_every_token_of_the_answer(loaded, rows):
    """As ROME's and EasyEdit's FT-L: one forward over the prompts, without targets and without EOS."""
    by_edit = []
    for prompt, target in EDITS:
        with torch.no_grad():
            logits = loaded.model(torch.tensor([loaded.tokenizer(prompt)["input_ids"]])).logits[0, -1].double()
        answer = loaded.tokenizer(" " + target)["input_ids"]
        by_edit.append(-logits.log_softmax(-1)[answer].mean().item())
    found = batch_loss(full_forward(loaded.model)(rows), rows, "last_token")
    assert found.item() == pytest.approx(np.mean(by_edit), rel=1e-5)
    assert any(len(row.target_ids) > 2 for row in rows)


@pytest.mark.parametrize("gap", [0.0, 30.0, 85.0, 95.0, 110.0, 500.0, -40.0])
def test_loss_and_gradient_of_targets_however_unlikely(gap):
    """Also where the probability of the target is too small for a float32, or 1 but for its last bit."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 50, generator=generator) + 40
    logits[1, 7] -= gap
    logits.requires_grad_()
    rows = [TokenRow((1, 7), 1), TokenRow((1, 7), 1), TokenRow((1, 3), 1)]
    found = batch_loss(logits, rows, "edit")
    expected = torch.nn.functional.cross_entropy(logits.double(), torch.tensor([7, 7, 3]))
    assert found.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_breadth_first_takes_the_adam_steps_of_the_definition(loaded, rows):
    training = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, SETTINGS)
    weight = loaded.model.get_parameter(WEIGHT).detach().clone()
    first, second, step, expected_losses = torch.zeros_like(weight), torch.zeros_like(weight), 0, []
    order = torch.Generator().manual_seed(SETTINGS.seed)
    for _ in range(SETTINGS.epochs):
        drawn, total = torch.randperm(len(rows), generator=order).tolist(), 0.0
        for batch in (drawn[0:2], drawn[2:4], drawn[4:5]):
            free = weight.clone().requires_grad_()
            loss = torch.zeros(())
            for row in (rows[index] for index in batch):
                logits = torch.func.functional_call(
                    loaded.model, {WEIGHT: free}, (torch.tensor([row.token_ids]),)
                ).logits[0]
                targets = torch.tensor(row.target_ids)
                picked = logits[row.start - 1 : -1].log_softmax(-1).gather(1, targets[:, None])
                loss = loss - picked.mean() / len(batch)
            total += loss.item() * len(batch)
            (gradient,) = torch.autograd.grad(loss, free)
            step += 1
            first = 0.9 * first + 0.1 * gradient
            second = 0.999 * second + 0.001 * gradient**2
            weight = weight - SETTINGS.learning_rate * (first / (1 - 0.9**step)) / (
                (second / (1 - 0.999**step)).sqrt() + 1e-8
            )
        expected_losses.append(total / len(rows))
    assert training.losses == pytest.approx(expected_losses, rel=1e-4)
    assert training.steps == step == 9
    change = weight - loaded.model.get_parameter(WEIGHT)
    # the direction of Adam's first steps is the sign of tiny gradients: compare where it is not rounding noise
    assert torch.isclose(training.delta.tensors[WEIGHT], change, atol=1e-4).float().mean() > 0.99


def test_depth_first_finishes_a_batch_before_the_next(loaded, rows):
    settings = replace(SETTINGS, pipeline="depth_first", batch_size=1, epochs=200, stop_below=1.5, learning_rate=5e-3)
    training = finetune(loaded, TrainingExamples.of_rows(rows), TuningPosition(1, "layer"), settings)
    assert len(training.losses) == len(rows)
    assert all(loss < 1.5 for loss in training.losses)
    short = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, replace(settings, epochs=4))
    assert short.steps == 4 * len(rows), "at most `epochs` steps a batch"


def test_breadth_first_stops_at_the_epoch_mean_and_reshuffles(loaded, rows):
    settings = replace(SETTINGS, epochs=400, stop_below=1.5, learning_rate=5e-3)
    training = finetune(loaded, TrainingExamples.of_rows(rows), TuningPosition(1, "layer"), settings)
    assert training.losses[-1] < 1.5 <= min(training.losses[:-1])
    assert len(training.losses) < 400
    other_order = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, replace(SETTINGS, seed=4))
    assert other_order.losses != finetune(loaded, TrainingExamples.of_rows(rows), POSITION, SETTINGS).losses


@given(st.lists(st.lists(st.floats(0, 2), min_size=3, max_size=3), max_size=30))
def test_what_is_learnt_rests_longer_and_comes_back(losses):
    """Against the definition, edit by edit."""
    rests, last, due, length = Rests(3, 1.0), [0.0] * 3, [0] * 3, [0] * 3
    for epoch, drawn in enumerate(losses):
        awake, known = rests.epoch()
        assert awake == [edit for edit in range(3) if due[edit] <= epoch]
        assert known == pytest.approx(sum(last[edit] for edit in range(3) if edit not in awake))
        rests.asked(awake, [drawn[edit] for edit in awake])
        for edit in awake:
            last[edit] = drawn[edit]
            length[edit] = (2 if length[edit] else 1) if drawn[edit] < 1.0 else 0
            due[edit] = epoch + 1 + length[edit]


def test_resting_spends_the_steps_on_what_is_not_learnt(loaded, rows):
    """The EDITS share words, and two of them stay at a nat, so "learnt" is set high."""
    position, examples = TuningPosition(1, "layer"), TrainingExamples.of_rows(rows)
    settings = TrainingSettings(batch_size=1, epochs=30, learning_rate=2e-2, skip_below=0.0, stop_below=0.0)
    always, rested = (finetune(loaded, examples, position, replace(settings, rest_below=b)) for b in (0.0, 2.0))
    assert always.steps == 30 * len(rows) and len(rested.losses) == 30
    assert rested.steps < 0.6 * always.steps and rested.trained_loss < 2.0
    assert rested.losses[0] == always.losses[0], "nothing is learnt yet"
    all_at_once = finetune(loaded, examples, position, replace(settings, rest_below=100.0, epochs=8))
    assert all_at_once.steps == 3 * len(rows), "in the first epoch, after a rest of one, and after one of two"


def test_a_batch_below_the_threshold_takes_no_step(loaded, rows):
    training = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, replace(SETTINGS, skip_below=1e9))
    assert training.steps == 0
    assert training.delta.norm == 0.0
    assert len(training.losses) == SETTINGS.epochs


@pytest.mark.parametrize("pipeline", ["breadth_first", "depth_first"])
def test_training_is_bitwise_deterministic_and_leaves_the_model_alone(loaded, rows, pipeline):
    before = model_fingerprint(loaded.model)
    settings = replace(SETTINGS, pipeline=pipeline)
    alone = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, settings)
    finetune(
        loaded, TrainingExamples.of_rows(rows), TuningPosition(2, "layer"), replace(settings, seed=9, learning_rate=0.3)
    )
    torch.manual_seed(123)  # the global generator must play no part
    again = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, settings)
    assert torch.equal(alone.delta.tensors[WEIGHT], again.delta.tensors[WEIGHT])
    assert alone.losses == again.losses
    assert model_fingerprint(loaded.model) == before
    assert all(parameter.grad is None for parameter in loaded.model.parameters())


def test_only_the_position_changes(loaded, rows):
    delta = finetune(loaded, TrainingExamples.of_rows(rows), TuningPosition(0, "attn_q"), SETTINGS).delta
    assert list(delta.tensors) == ["model.layers.0.self_attn.q_proj.weight"]
    assert delta.norm > 0


def test_divergence_is_reported_and_weights_stay_finite(loaded, rows):
    training = finetune(
        loaded,
        TrainingExamples.of_rows(rows),
        TuningPosition(1, "layer"),
        replace(SETTINGS, learning_rate=1e38, epochs=20),
    )
    assert training.diverged
    assert all(math.isfinite(loss) for loss in training.losses)


class Scarce:
    """A forward on a machine that can only take `most` rows at once."""

    def __init__(self, loaded, most):
        self.loaded, self.most, self.asked = loaded, most, []

    def __call__(self, weights):
        plain = full_forward(self.loaded.model, weights)

        def logits(rows):
            self.asked.append(len(rows))
            if len(rows) > self.most and torch.is_grad_enabled():
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:121] . DefaultCPUAllocator: not enough memory: you tried"
                )
            return plain(rows)

        return logits


@pytest.mark.parametrize("average", ["edit", "token", "last_token"])
def test_where_memory_is_short_a_batch_is_computed_in_pieces_with_the_same_gradient(loaded, rows, average):
    settings = replace(SETTINGS, batch_size=5, loss_average=average)
    plain = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, settings)
    scarce = Scarce(loaded, 2)
    pieces = finetune(loaded, TrainingExamples.of_rows(rows), POSITION, settings, scarce)
    assert plain.pieces == 1 and pieces.pieces == 4 and pieces.steps == plain.steps
    assert scarce.asked[:6] == [5, 3, 2, 2, 1, 2], (
        "found out once: whole, in halves, in quarters, and then so every time"
    )
    np.testing.assert_allclose(pieces.losses, plain.losses, rtol=1e-4)
    for name, change in plain.delta.tensors.items():
        torch.testing.assert_close(pieces.delta.tensors[name], change, rtol=2e-3, atol=1e-5)


def test_replayed_edits_that_do_not_fit_are_computed_in_pieces(loaded, rows):
    """They may be more than a batch."""
    settings, examples = replace(SETTINGS, pipeline="stream", batch_size=1, replay=4), TrainingExamples.of_rows(rows)
    plain, scarce = (finetune(loaded, examples, POSITION, settings, *more) for more in ((), (Scarce(loaded, 2),)))
    assert scarce.pieces == 2 and scarce.steps == plain.steps
    np.testing.assert_allclose(scarce.losses, plain.losses, rtol=1e-3)


def test_memory_that_a_cpu_does_not_have_is_recognised():
    with pytest.raises((MemoryError, RuntimeError)) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert out_of_memory(error.value)
    assert not out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_when_not_even_one_edit_fits_it_is_an_error(loaded, rows):
    with pytest.raises(RuntimeError, match="not enough memory"):
        finetune(loaded, TrainingExamples.of_rows(rows), POSITION, SETTINGS, Scarce(loaded, 0))
