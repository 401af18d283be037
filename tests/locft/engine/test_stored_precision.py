"""What a store of hidden states in bfloat16 costs: nothing that the model's own rounding does not."""

import copy
from dataclasses import replace

import pytest
import torch

from locft.engine.tail_engine import TailEngine
from locft.train.reference import full_forward
from tests.tiny import edit_rows, tiny_loaded

EDITS = [
    ("The capital of France is", "Oslo"),
    ("Who wrote Hamlet?", "Jane Austen"),
    ("Water freezes at", "ninety degrees"),
]


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gpt2", "gemma2"])
def test_a_model_in_bfloat16_has_its_states_stored_so_and_is_as_exact_as_without_a_store(architecture):
    exact = tiny_loaded(architecture, layers=6)
    loaded = replace(exact, model=copy.deepcopy(exact.model).to(torch.bfloat16))
    rows = edit_rows(loaded, EDITS)
    engine = TailEngine(loaded, rows, range(6), on_disk=False)
    rounded = copy.deepcopy(loaded.model).float()  # the same weights, computed exactly
    expected, plain = full_forward(rounded)(rows), full_forward(loaded.model)(rows)
    allowed = 1.3 * (plain - expected).norm()
    for layer in range(6):
        assert engine.states.layers[layer].dtype == torch.bfloat16
        assert (engine.forward(layer)({})(rows) - expected).norm() <= allowed, layer


def test_training_in_bfloat16_sees_the_same_whether_states_are_rounded_before_or_after_they_are_gathered():
    """So a float32 model keeps float32, which its measurements need, and its training loses nothing by that."""
    loaded = tiny_loaded("llama")
    rows = edit_rows(loaded, EDITS)
    engine = TailEngine(loaded, rows, range(3), on_disk=False)
    found = engine.forward(1, torch.bfloat16)({})(rows)
    rounded = {layer: states.bfloat16().float() for layer, states in engine.states.layers.items()}
    engine.states = replace(engine.states, layers=rounded)
    assert torch.equal(engine.forward(1, torch.bfloat16)({})(rows), found)
