"""Deltas: what comes back from disk is what was trained, fits only its base, and leaves no trace when taken away."""

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from locft.errors import InputError
from locft.model.delta import EditDelta, applied, apply_delta, revert
from locft.model.models import model_fingerprint
from locft.model.positions import TuningPosition
from locft.train.encoding import encode_edit
from locft.train.examples import TrainingExamples
from locft.train.pipelines import TrainingSettings, finetune
from locft.train.reference import full_forward
from tests.tiny import tiny_loaded


@pytest.fixture(scope="module")
def loaded():
    return tiny_loaded("qwen2")


@pytest.fixture(scope="module")
def rows(loaded):
    return [encode_edit(loaded.tokenizer, "The capital of France is", "Oslo")]


@pytest.fixture(scope="module")
def delta(loaded, rows):
    return finetune(
        loaded, TrainingExamples.of_rows(rows), TuningPosition(1, "mlp"), TrainingSettings(learning_rate=1e-2, epochs=3)
    ).delta


def test_reloaded_delta_is_bitwise_the_same(delta, tmp_path):
    again = EditDelta.load(delta.save(tmp_path))
    assert again.position == "1.mlp"
    assert again.base_fingerprint == delta.base_fingerprint
    assert dict(again.settings) == dict(delta.settings)
    assert all(torch.equal(again.tensors[name], delta.tensors[name]) for name in delta.tensors)
    assert EditDelta.load(tmp_path).tensors.keys() == delta.tensors.keys(), "the folder serves as well as the file"


def test_apply_and_revert_are_exact(loaded, rows, delta):
    before = model_fingerprint(loaded.model)
    substituted = full_forward(loaded.model, delta.weights(loaded.model))(rows)
    originals = apply_delta(loaded, delta)
    assert model_fingerprint(loaded.model) != before
    assert torch.equal(full_forward(loaded.model)(rows), substituted), "stand-in weights and edited weights agree"
    revert(loaded, originals)
    assert model_fingerprint(loaded.model) == before


def test_an_edit_writes_to_no_memory_of_the_model(loaded, delta):
    """It may be a file's, which other processes have mapped."""
    weight = loaded.model.get_parameter(next(iter(delta.tensors)))
    memory, content, place = weight.detach(), weight.detach().clone(), weight.data_ptr()
    with applied(loaded, delta):
        assert torch.equal(memory, content) and not torch.equal(weight, content)
    assert weight.data_ptr() == place and torch.equal(weight, content)


def test_a_failure_inside_leaves_the_model_unedited(loaded, delta):
    before = model_fingerprint(loaded.model)
    with pytest.raises(RuntimeError), applied(loaded, delta):
        raise RuntimeError("a trial that dies")
    assert model_fingerprint(loaded.model) == before


def test_foreign_base_is_refused(delta):
    other = tiny_loaded("qwen2", seed=5)
    with pytest.raises(InputError, match="fingerprint"), applied(other, delta):
        pass


def test_files_that_are_no_delta_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        EditDelta.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("not tensors")
    with pytest.raises(InputError, match="not readable as safetensors"):
        EditDelta.load(tmp_path / "text.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(InputError, match="expected 'locft-delta-1'"):
        EditDelta.load(tmp_path / "foreign.safetensors")


def test_a_file_may_be_read_by_whom_other_files_may(tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    delta = EditDelta("1.mlp_down", "tiny", {"weight": torch.ones(2, 3)})
    file = delta.save(tmp_path)
    assert file.stat().st_mode == plain.stat().st_mode
    assert delta.scaled(2.0).save(tmp_path) == file
    assert EditDelta.load(file).tensors["weight"].sum() == 12
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name, "plain"]


def test_a_delta_that_cannot_be_written_leaves_nothing(tmp_path, monkeypatch):
    delta = EditDelta("1.mlp_down", "f" * 16, {"weight": torch.ones(2)})

    def full(_, file, **__):
        file.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("locft.model.checkpoint.save_file", full)
        with pytest.raises(InputError, match="cannot write .*No space left on device"):
            delta.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(InputError, match="cannot write"):
        delta.save(tmp_path / "taken" / "inside")
