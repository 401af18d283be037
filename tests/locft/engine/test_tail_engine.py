"""The engine against the reference: packing, stored states, logits, gradients and whole trials, on every architecture."""

import errno
import os
import tempfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from locft.data.requests import load_edits
from locft.data.suites import load_suite
from locft.engine import boundary_states as prefix
from locft.engine import tail
from locft.engine import tail_engine as engine_module
from locft.engine.packing import PrefixTree, pack_rows
from locft.engine.tail import supports_tail
from locft.engine.tail_engine import TailEngine, coarse_pays, coarse_products
from locft.model.models import LoadedModel, model_fingerprint
from locft.model.positions import TuningPosition, list_positions, parameter_names
from locft.train.encoding import encode_edit
from locft.train.examples import TrainingExamples
from locft.train.objective import batch_loss
from locft.train.pipelines import TrainingSettings, finetune
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from locft.workbench import Workbench
from tests.every_type import tiny_model_of
from tests.tiny import ARCHITECTURES, RELATED, tiny_loaded, tiny_tokenizer

UNPACKED = {"gemma2", "gemma3_text", "bloom", "mamba", "rwkv", "mamba2", "lfm2", "qwen3_next"}
"""Windows shorter than the rows, biases made from a two-dimensional mask, recurrent states."""
TEXTS = [
    ("The capital of France is", "Oslo"),
    ("The capital of France is", "Rome of course"),
    ("Who wrote Hamlet?", "Jane Austen"),
    ("Water", "ice cream and more"),
    ("x", "y"),
]


def edit_rows():
    return [encode_edit(tiny_tokenizer(), prompt, target) for prompt, target in TEXTS]


token_rows = st.lists(
    st.lists(st.integers(0, 3), min_size=2, max_size=9).flatmap(
        lambda ids: st.integers(1, len(ids)).map(lambda start: TokenRow(tuple(ids), start))
    ),
    min_size=1,
    max_size=12,
)


@given(rows=token_rows, limit=st.integers(0, 20))
@settings(max_examples=150, deadline=None)
def test_every_token_of_a_pack_sees_exactly_its_own_row_so_far(rows, limit):
    tree = PrefixTree(rows)
    pack = pack_rows(tree, rows, limit)
    mask = pack.attention_mask(torch.float32)
    supervised = iter(zip(pack.sequence.tolist(), pack.place.tolist(), strict=True))
    for row in rows:
        for position in range(row.start, len(row.token_ids)):
            number, place = next(supervised)
            if limit == 0:
                seen = pack.nodes[number, : place + 1]
                assert mask[number].sum() == len(row.token_ids)
            else:
                seen = pack.nodes[number, mask[number, 0, place] == 0]
            assert tuple(tree.token_ids[np.sort(seen.numpy())]) == row.token_ids[:position]
            assert pack.position_ids[number, place] == position - 1
    assert next(supervised, None) is None


def test_shared_beginnings_are_computed_once():
    question = tuple(range(10))
    rows = [TokenRow((*question, choice, 40), 10) for choice in (20, 21, 22, 23)]
    pack = pack_rows(PrefixTree(rows), rows, 256)
    assert int((pack.nodes >= 0).sum()) == 10 + 4 * 2


def test_a_short_beginning_shared_by_many_is_computed_more_than_once():
    """Every token sees each place of its sequence: 64 chat prompts behind one system prompt are no sequence of 1000 tokens."""
    beginning = tuple(range(25))
    rows = [TokenRow((*beginning, *range(100 * n, 100 * n + 16)), 40) for n in range(1, 65)]
    pack = pack_rows(PrefixTree(rows), rows, 96)
    sequences, width = pack.nodes.shape
    assert 100 < width < 250 and sequences > 1
    assert (pack.nodes >= 0).sum() < 1.25 * (25 + 64 * 16)


def test_a_long_row_makes_no_padding_of_the_others():
    short = [TokenRow(tuple(range(100 * n, 100 * n + 10)), 5) for n in range(1, 41)]
    rows = [*short, TokenRow(tuple(range(9000, 9200)), 199)]
    pack = pack_rows(PrefixTree(rows), rows, 96)
    assert pack.nodes.shape == (3, 200) and (pack.nodes >= 0).all()


def test_batches_of_similar_length_have_the_same_shape():
    lengths = range(65, 73)
    rows = [TokenRow((length, *range(1000, 999 + length)), length - 2) for length in lengths]
    tree = PrefixTree(rows)
    assert {pack_rows(tree, [row], 96).nodes.shape for row in rows} == {(1, 72)}


def test_sequences_are_filled_evenly():
    rows = [TokenRow(tuple(range(i * 20, i * 20 + 15)), 10) for i in range(100)]
    pack = pack_rows(PrefixTree(rows), rows, 256)
    assert (pack.nodes >= 0).float().mean() > 0.95


BEGINS_BEHIND = {"mlp_down", "attn_o", "mixer_out"}
"""Matrices behind which a step may begin."""


def positions_of(loaded):
    """Every position of the middle layer; of the others the whole layer, and what a step may begin behind."""
    found = list_positions(loaded.model)
    ends = {"layer", *BEGINS_BEHIND}
    return [info for info in found if info.position.layer == 1 or info.position.module in ends]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_logits_and_gradients_of_every_kind_of_position_are_the_references(architecture):
    loaded, rows = tiny_loaded(architecture), edit_rows()
    before = model_fingerprint(loaded.model)
    engine = TailEngine(loaded, rows)
    assert (engine.limit == 0) == (architecture in UNPACKED)
    for info in positions_of(loaded):
        weights = {name: (loaded.model.get_parameter(name) + 0.01).requires_grad_() for name in info.names}
        expected = full_forward(loaded.model, weights)(rows)
        wanted = gradients(expected, rows, weights)
        for forward in (
            engine.forward(info.position.layer),
            engine.training_forward(info.position, rows, torch.float32),
        ):
            logits = forward(weights)(rows)
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
            for name, gradient in gradients(logits, rows, weights).items():
                scale = float(max(value.abs().max() for value in wanted.values()))
                torch.testing.assert_close(
                    gradient, wanted[name], atol=1e-5 * scale, rtol=1e-3, msg=f"{info.position} {name}"
                )
    assert model_fingerprint(loaded.model) == before


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_coarse_logits_are_near_the_exact_ones_at_every_layer(architecture, monkeypatch):
    loaded, rows = tiny_loaded(architecture), edit_rows()
    engine = TailEngine(loaded, rows)
    monkeypatch.setattr("locft.engine.tail_engine.training_precision", lambda device: "float32")
    assert engine.coarse_forward(1) is None
    monkeypatch.setattr("locft.engine.tail_engine.training_precision", lambda device: "bfloat16")
    for info in (info for info in list_positions(loaded.model) if info.position.module == "layer"):
        weights = {name: loaded.model.get_parameter(name) * 1.1 for name in info.names}
        expected = full_forward(loaded.model, weights)(rows)
        logits = engine.coarse_forward(info.position.layer)(weights)(rows)
        error = (logits - expected).norm(dim=1) / expected.norm(dim=1)
        assert error.median() <= 3e-2, info.position  # rounding sends some tokens of a mixture to another expert


def gradients(logits, rows, weights):
    found = torch.autograd.grad(batch_loss(logits, rows, "edit"), list(weights.values()), allow_unused=True)
    return {name: torch.zeros_like(weights[name]) if g is None else g for name, g in zip(weights, found, strict=True)}


CUT = {"llama": ("mlp_down",), "gptj": ("mlp_down", "attn_o"), "mamba": ("mixer_out",), "olmo2": (), "granite": ()}


@pytest.mark.parametrize("architecture", CUT)
def test_a_step_begins_behind_the_matrix_only_where_the_output_is_linear_in_it(architecture):
    """olmo2 has a norm behind the MLP, granite scales it; a parallel block adds attention and MLP side by side."""
    loaded, rows = tiny_loaded(architecture), edit_rows()
    engine = TailEngine(loaded, rows)
    positions = [info.position for info in list_positions(loaded.model) if info.position.layer == 1]
    cut = [
        p.module for p in positions if "_forward_above" in engine.training_forward(p, rows, torch.float32).__qualname__
    ]
    assert tuple(cut) == CUT[architecture]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "bloom", "mamba"])
@pytest.mark.parametrize("pipeline", ["breadth_first", "depth_first"])
def test_the_trained_delta_is_the_references_after_several_steps(architecture, pipeline):
    loaded, rows = tiny_loaded(architecture), edit_rows()
    position = next(p.position for p in list_positions(loaded.model) if p.position.layer == 1)
    plan = TrainingSettings(pipeline=pipeline, batch_size=2, learning_rate=1e-3, epochs=4, skip_below=0, stop_below=0)
    forward = TailEngine(loaded, rows).training_forward(position, rows, torch.float32)
    fast, plain = (
        finetune(loaded, TrainingExamples.of_rows(rows), position, plan, forward),
        finetune(loaded, TrainingExamples.of_rows(rows), position, plan),
    )
    assert fast.losses == pytest.approx(plain.losses, rel=1e-4)
    for name, change in plain.delta.tensors.items():
        # Adam's first steps follow the sign of a gradient, which rounding decides where the gradient is nothing
        assert (fast.delta.tensors[name] - change).norm() < 0.05 * change.norm()


def test_a_whole_trial_has_the_references_metrics():
    loaded, edits, suite = tiny_loaded("llama"), load_edits("atlas", limit=4), load_suite("probes", limit=4)
    fast = Workbench.prepare(loaded, edits, suite, 256)
    plain = Workbench.prepare(loaded, edits, suite, 256, engine=None)
    assert fast.baseline.scores == plain.baseline.scores
    assert fast.baseline.metrics == pytest.approx(plain.baseline.metrics)
    delta = plain.train(TuningPosition(1, "mlp"), TrainingSettings(learning_rate=1e-2, epochs=8)).delta
    got, expected = fast.measure(delta), plain.measure(delta)
    assert [replace(one, kl=None) for one in got.outcomes] == [replace(one, kl=None) for one in expected.outcomes]
    moved = [[outcome.kl for outcome in one.outcomes if outcome.kl is not None] for one in (got, expected)]
    assert moved[0] and moved[0] == pytest.approx(moved[1], rel=1e-4)
    times = {"evaluate_seconds", "capability_seconds"}
    assert {k: v for k, v in got.metrics.items() if k not in times} == pytest.approx(
        {k: v for k, v in expected.metrics.items() if k not in times}, rel=1e-4
    )


def test_bfloat16_training_is_close_and_measured_in_the_models_own_dtype():
    loaded, rows = tiny_loaded("llama"), edit_rows()
    engine = TailEngine(loaded, rows)
    plan = TrainingSettings(batch_size=3, learning_rate=1e-2, epochs=5, skip_below=0, stop_below=0)
    position = TuningPosition(1, "mlp")
    coarse = finetune(
        loaded, TrainingExamples.of_rows(rows), position, plan, engine.training_forward(position, rows, torch.bfloat16)
    )
    fine = finetune(
        loaded, TrainingExamples.of_rows(rows), position, plan, engine.training_forward(position, rows, torch.float32)
    )
    assert coarse.losses == pytest.approx(fine.losses, rel=0.05)
    assert all(change.dtype == torch.float32 for change in coarse.delta.tensors.values())
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.parameters())


def test_states_are_stored_once_and_read_back(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows = tiny_loaded("llama"), edit_rows()
    first = TailEngine(loaded, rows, [0, 1], on_disk=True)
    files = sorted(tmp_path.rglob("*.npy"))
    assert [file.stem for file in files] == ["000", "001", "002"]
    monkeypatch.setattr(prefix, "_computed", lambda *_: pytest.fail("computed again"))
    again = TailEngine(loaded, rows, [0, 1], on_disk=True)
    for layer in (0, 1, 2):
        assert torch.equal(first.states.layers[layer], again.states.layers[layer])
    again.states.layers[0][0] = 7.0  # a private page: the file and other processes keep theirs
    assert not torch.equal(again.states.layers[0], TailEngine(loaded, rows, [0, 1], on_disk=True).states.layers[0])


def test_states_of_another_number_of_threads_are_others(tmp_path, monkeypatch):
    """The number of threads can change the last bits: what is stored may not decide which ones a trial gets."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows, before = tiny_loaded("llama"), edit_rows(), torch.get_num_threads()
    try:
        for threads in (1, 2, 1):
            torch.set_num_threads(threads)
            stored = TailEngine(loaded, rows, [0], on_disk=True).states.layers[2]
            assert torch.equal(stored, TailEngine(loaded, rows, [0], on_disk=False).states.layers[2])
    finally:
        torch.set_num_threads(before)
    assert len(list(tmp_path.rglob("002.npy"))) == 2


def test_a_half_written_file_is_never_read(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows = tiny_loaded("llama"), edit_rows()
    whole = TailEngine(loaded, rows, [1], on_disk=True)
    file = next(tmp_path.rglob("001.npy"))
    os.replace(file, file.with_suffix(".partial"))  # as a killed writer leaves it
    with open(file.with_suffix(".partial"), "r+b") as stream:
        stream.truncate(100)
    assert torch.equal(TailEngine(loaded, rows, [1], on_disk=True).states.layers[1], whole.states.layers[1])


def test_a_damaged_file_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows = tiny_loaded("llama"), edit_rows()
    whole = TailEngine(loaded, rows, [1]).states.layers[1].clone()
    file = next(tmp_path.rglob("001.npy"))
    for damage in (
        lambda: os.truncate(file, 200),
        lambda: os.truncate(file, 5),
        lambda: np.save(file, np.zeros((3, 32), np.float32)),
    ):
        damage()
        assert torch.equal(TailEngine(loaded, rows, [1]).states.layers[1], whole)


def test_states_are_kept_in_memory_where_the_disk_is_full(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows = tiny_loaded("llama"), edit_rows()
    expected = TailEngine(loaded, rows, [1], on_disk=False).states.layers[1]

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    assert torch.equal(TailEngine(loaded, rows, [1]).states.layers[1], expected)
    assert "No space left on device; keeping hidden states in memory instead" in caplog.text
    assert not [*tmp_path.rglob("*.npy"), *tmp_path.rglob("*.partial")]


def test_large_states_of_one_training_are_in_a_file_without_a_name(tmp_path, monkeypatch, caplog):
    """And in memory where the disk is full. Training takes the same steps in all three cases."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows, position = tiny_loaded("llama"), edit_rows(), TuningPosition(1, "mlp_down")

    def trained(on_disk):
        engine = TailEngine(loaded, rows, [1], on_disk=on_disk)
        forward = engine.training_forward(position, rows, torch.float32)
        return finetune(loaded, TrainingExamples.of_rows(rows), position, TrainingSettings(epochs=2), forward)

    in_memory, before = trained(False), set(tmp_path.rglob("*"))
    assert not before
    monkeypatch.setattr(prefix, "SCRATCH_BYTES", 0)
    opened, unnamed = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **given: opened.append(unnamed(**given)) or opened[-1])
    on_disk, files = trained(True), [file for file in tmp_path.rglob("*") if file.is_file()]
    assert len(opened) == 2 and all(file.suffix in {".npy", ".lock"} for file in files), "nothing is left behind"

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    without_space = trained(True)
    assert len(opened) == 4 and "No space left on device; keeping the states of a training in memory" in caplog.text
    for other in (on_disk, without_space):
        assert other.losses == in_memory.losses
        assert all(torch.equal(change, other.delta.tensors[name]) for name, change in in_memory.delta.tensors.items())


def test_rows_whose_tokens_and_depths_are_alike_are_told_apart(tmp_path, monkeypatch):
    """Both trees hold the tokens 1 2 3 4 5 at the depths 0 1 2 1 2, but the last one follows another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded = tiny_loaded("llama")
    for paths in ([(1, 2, 3), (1, 4), (1, 2, 5)], [(1, 2, 3), (1, 4, 5)]):
        rows = [TokenRow(path, 1) for path in paths]
        stored = TailEngine(loaded, rows, [2]).states.layers[2]
        torch.testing.assert_close(
            stored, TailEngine(loaded, rows, [2], on_disk=False).states.layers[2], rtol=0, atol=0
        )


def test_layers_that_do_not_fit_are_reached_from_the_one_below(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows = tiny_loaded("llama", layers=6), edit_rows()
    all_layers = TailEngine(loaded, rows, range(6))
    one_layer = all_layers.states.layers[0].nbytes
    monkeypatch.setattr(prefix, "LIMIT_BYTES", 2 * one_layer)
    few = TailEngine(loaded, rows, range(6), on_disk=True)
    assert few.states.stride == 3 and sorted(few.states.layers) == [0, 3]
    for others in (
        [2],
        [2, 5],
        [],
    ):  # where a trial starts from does not depend on what else is studied, nor where states lie
        for on_disk in (True, False):
            engine = TailEngine(loaded, rows, others, on_disk=on_disk)
            assert torch.equal(engine.forward(2)({})(rows), few.forward(2)({})(rows))
    position = TuningPosition(2, "mlp_down")
    weights = {
        "model.layers.2.mlp.down_proj.weight": loaded.model.get_parameter("model.layers.2.mlp.down_proj.weight") * 1.1
    }
    torch.testing.assert_close(
        few.forward(2)(weights)(rows), all_layers.forward(2)(weights)(rows), atol=1e-5, rtol=1e-4
    )
    cut = few.training_forward(position, rows, torch.float32)
    torch.testing.assert_close(cut(weights)(rows), all_layers.forward(2)(weights)(rows), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "architecture, window", [("llama", None), ("gemma3_text", 24), ("gpt_oss", 24), ("mistral", 24)]
)
def test_an_engine_over_other_rows_is_the_one_that_these_rows_would_have(architecture, window, monkeypatch):
    """Rows longer than a window cannot be packed, and the states of fewer or more tokens fit for other layers."""
    loaded = tiny_loaded(architecture, layers=4, **({"sliding_window": window} if window else {}))
    short = edit_rows()
    long = [encode_edit(loaded.tokenizer, f"I would like to know this. {prompt}", target) for prompt, target in TEXTS]
    states = TailEngine(loaded, short, on_disk=False).states.layers[3]
    monkeypatch.setattr(prefix, "LIMIT_BYTES", 4 * states.nbytes)
    for rows, other in ((short, long), (long, short)):
        twin, fresh = TailEngine(loaded, rows, on_disk=False).over(other), TailEngine(loaded, other, on_disk=False)
        assert twin.states.stride == fresh.states.stride == (1 if other is short else 2)
        assert twin.limit == (0 if window else fresh.limit)
        for layer in range(4):
            expected = full_forward(loaded.model)(other)
            torch.testing.assert_close(twin.forward(layer)({})(other), expected, atol=2e-5, rtol=1e-4)


def test_the_least_recently_used_states_make_room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    loaded, rows = tiny_loaded("llama"), edit_rows()
    TailEngine(loaded, rows[:2], [0], on_disk=True)
    (old,) = (file.parent for file in tmp_path.rglob("000.npy"))
    monkeypatch.setattr(prefix, "LIMIT_BYTES", 2 * sum(file.stat().st_size for file in old.glob("*.npy")) - 2)
    TailEngine(loaded, rows[2:], [0], on_disk=True)
    assert not old.exists()


def test_a_model_without_a_tail_is_computed_whole_and_says_so(caplog):
    loaded = tiny_loaded("llama")
    forward = loaded.model.forward
    loaded.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)  # as accelerate's device map does
    try:
        assert supports_tail(loaded.model)
        with pytest.raises(ValueError, match="the forward method of the model is replaced"):
            TailEngine(loaded, edit_rows())
        bench = Workbench.prepare(loaded, load_edits("atlas", limit=2), None)
    finally:
        del loaded.model.forward
    assert bench.engine is None
    assert "every step computes the whole model" in caplog.text


def test_windows_shorter_than_a_row_forbid_packing():
    assert TailEngine(tiny_loaded("mistral", sliding_window=4), edit_rows(), on_disk=False).limit == 0
    assert TailEngine(tiny_loaded("mistral", sliding_window=200), edit_rows(), on_disk=False).limit > 0


@pytest.mark.parametrize("architecture", RELATED)
def test_models_that_share_a_row_of_the_table_have_the_references_logits_too(architecture):
    loaded, rows = tiny_loaded(architecture), edit_rows()
    engine = TailEngine(loaded, rows, on_disk=False)
    for layer in (0, 2):
        weights = {
            name: loaded.model.get_parameter(name) + 0.01
            for name in parameter_names(loaded.model, TuningPosition(layer, "layer"))
        }
        weights = {name: value.requires_grad_() for name, value in weights.items()}
        expected, logits = full_forward(loaded.model, weights)(rows), engine.forward(layer)(weights)(rows)
        torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
        wanted = gradients(expected, rows, weights)
        scale = float(max(value.abs().max() for value in wanted.values()))
        for name, gradient in gradients(logits, rows, weights).items():
            torch.testing.assert_close(gradient, wanted[name], atol=2e-5 * scale, rtol=1e-3, msg=name)


def test_an_engine_that_does_not_compute_what_the_model_does_is_not_used(monkeypatch, caplog):
    """Whatever is wrong with a view: first packing is given up, then the view."""
    whole = tail.tail_hidden

    def wrong(view, boundary, attention_mask, *more):
        return whole(view, boundary, attention_mask, *more) + (0.1 if attention_mask.ndim == everywhere else 0.0)

    monkeypatch.setattr("locft.engine.model_views.tail_hidden", wrong)
    everywhere = 4  # with masks of ours
    assert TailEngine(tiny_loaded("llama"), edit_rows(), on_disk=False).limit == 0
    monkeypatch.setattr("locft.engine.model_views.tail_hidden", lambda *given: whole(*given) + 0.1)
    bench = Workbench.prepare(tiny_loaded("llama"), load_edits("atlas", limit=2), None)
    assert bench.engine is None and "does not give what its full forward pass gives" in caplog.text


def test_an_architecture_without_a_tail_is_trained_whole_and_says_so(caplog):
    loaded = LoadedModel("zaya", tiny_model_of("zaya"), tiny_tokenizer(), "zaya")
    bench = Workbench.prepare(loaded, load_edits("atlas", limit=2), None)
    assert bench.engine is None and "its layers need more than the hidden states of the layers below" in caplog.text
    training = bench.train(TuningPosition(1, "layer"), TrainingSettings(learning_rate=1e-2, epochs=5))
    assert training.losses[-1] < training.losses[0]
    assert bench.measure(training.delta).metrics["n_edits"] == 2


def test_a_trial_does_not_depend_on_what_ran_before():
    loaded, rows = tiny_loaded("llama"), edit_rows()
    plan = TrainingSettings(batch_size=2, learning_rate=1e-2, epochs=3, precision="bfloat16")

    def train(engine, position, plan):
        return finetune(
            loaded,
            TrainingExamples.of_rows(rows),
            position,
            plan,
            engine.training_forward(position, rows, torch.bfloat16),
        ).delta

    used, fresh = TailEngine(loaded, rows), TailEngine(loaded, rows)
    position = TuningPosition(1, "mlp_down")
    train(used, TuningPosition(0, "layer"), replace(plan, seed=4))
    train(used, TuningPosition(1, "mlp"), plan)
    one, other = train(used, position, plan), train(fresh, position, plan)
    assert all(torch.equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_coarse_products_only_where_they_are_faster_and_only_inside(monkeypatch):
    loaded = tiny_loaded("llama")
    assert torch.get_float32_matmul_precision() == "highest"
    with coarse_products():
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    monkeypatch.setattr(engine_module, "training_precision", lambda device: "float32")
    assert not coarse_pays(loaded.model)
    monkeypatch.setattr(engine_module, "training_precision", lambda device: "bfloat16")
    assert coarse_pays(loaded.model) and not coarse_pays(loaded.model.to(torch.bfloat16))
