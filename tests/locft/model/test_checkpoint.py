"""What cannot be edited is refused by its name, from the configuration and the headers, before weights are read."""

import json

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from locft.errors import InputError
from locft.model.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from locft.model.delta import EditDelta
from locft.model.models import folder_fingerprint, load_model, load_structure, load_tokenizer, model_folder
from tests.tiny import tiny_model, tiny_tokenizer

LORA = "base_model.model.model.layers.1.mlp.down_proj.lora_"


@pytest.fixture
def folder(tmp_path):
    """A model that nothing has read before."""
    place = tmp_path / "model"
    tiny_model(layers=2).save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    return place


@pytest.fixture
def adapter(tmp_path, folder):
    place = tmp_path / "adapter"
    place.mkdir()
    tensors = {f"{LORA}A.weight": torch.ones(4, 48), f"{LORA}B.weight": torch.ones(32, 4)}
    save_file(tensors, place / ADAPTER_WEIGHTS, metadata={"format": "pt"})
    about = {"peft_type": "LORA", "base_model_name_or_path": "some/base", "r": 4}
    (place / ADAPTER_CONFIG).write_text(json.dumps(about))
    return place


def configure(folder, **changes):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(call, *arguments, **options) -> str:
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    (problem,) = caught.value.problems
    return problem


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}},
            "(fp8, e4m3",
        ),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}}, "(gptq, 4 bits)"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "(awq, 4 bits)"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "(bitsandbytes)"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "(mxfp4)"),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}}, "pack-quantized"),
        ({"compression_config": {"format": "float-quantized"}}, "(compression, float-quantized"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "4 bits"),
        ({"text_config": {"model_type": "llama", "quantization_config": {"quant_method": "awq"}}}, "(awq)"),
    ],
    ids=str,
)
def test_quantized_configurations_are_refused_by_whatever_reads_a_model(folder, changes, named):
    configure(folder, **changes)
    (folder / "model.safetensors").write_bytes(b"never read")
    for call in (load_model, load_structure, load_tokenizer, model_folder):
        problem = refused(call, str(folder))
        assert named in problem and "quantized" in problem and "give the dense checkpoint" in problem


def test_a_dense_model_may_say_that_it_is_not_quantized(folder):
    configure(folder, quantization_config=None)
    assert load_model(str(folder), device="cpu").fingerprint


@pytest.mark.parametrize("file", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantization_told_by_a_file_of_its_own(folder, file):
    (folder / file).write_text("{}")
    assert file in refused(load_structure, str(folder))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.1.mlp.down_proj.weight", torch.zeros(32, 48, dtype=torch.float8_e4m3fn)),
        ("model.layers.1.mlp.down_proj.weight", torch.zeros(32, 48, dtype=torch.int8)),
        ("model.layers.1.mlp.down_proj.qweight", torch.zeros(4, 48, dtype=torch.int32)),
        ("model.layers.1.mlp.down_proj.weight_packed", torch.zeros(4, 48, dtype=torch.int32)),
        ("model.layers.1.mlp.experts.down_proj_blocks", torch.zeros(4, 48, dtype=torch.uint8)),
    ],
    ids=lambda value: str(getattr(value, "dtype", value)),
)
def test_codes_in_the_weights_are_found_whatever_the_configuration_says(folder, name, tensor):
    weights = load_file(folder / "model.safetensors") | {name: tensor}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for call in (folder_fingerprint, lambda place: load_model(str(place), device="cpu")):
        problem = refused(call, folder)
        assert name in problem and "quantized" in problem


def test_masks_positions_and_float64_are_no_codes(folder):
    masks = {
        "model.layers.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "model.layers.0.attn.masked_bias": torch.tensor(True),
        "model.position_ids": torch.arange(4),
        "model.layers.0.attn.rotary.weight": torch.ones(4, dtype=torch.float64),
    }
    weights = load_file(folder / "model.safetensors") | masks
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert folder_fingerprint(folder)


def test_a_quantized_model_of_the_hub_is_refused_before_its_weights_are_fetched(folder, monkeypatch):
    asked = []

    def download(name, allow_patterns, ignore_patterns):
        asked.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    configure(folder, quantization_config={"quant_method": "fp8"})
    for call in (load_model, load_structure):
        assert "fp8" in refused(call, "owner/name-FP8")
    assert all("*.safetensors" not in patterns for patterns in asked)


def test_an_adapter_is_no_model_and_no_delta(folder, adapter):
    for call in (load_model, load_structure, load_tokenizer):
        for name in (adapter, adapter / ADAPTER_WEIGHTS):
            problem = refused(call, str(name))
            assert "PEFT adapter (LORA) for some/base" in problem and "merge_and_unload" in problem
    for path in (adapter, adapter / ADAPTER_WEIGHTS):
        problem = refused(EditDelta.load, path)
        assert "PEFT adapter (LORA) for some/base" in problem and "delta.safetensors" in problem
    renamed = adapter.parent / "mine.safetensors"
    (adapter / ADAPTER_WEIGHTS).rename(renamed)
    assert "PEFT adapter for an unnamed base model" in refused(EditDelta.load, renamed)


def test_an_adapter_beside_the_weights_is_refused(folder, adapter):
    (adapter / ADAPTER_CONFIG).rename(folder / ADAPTER_CONFIG)
    assert "is in the same folder as the model's weights" in refused(load_model, str(folder))


def test_models_and_deltas_are_told_apart(folder, tmp_path):
    delta = EditDelta("1.mlp_down", "0" * 16, {"model.layers.1.mlp.down_proj.weight": torch.zeros(32, 48)})
    file = delta.save(tmp_path / "edit")
    for name in (file.parent, file):
        assert "this is the delta of an edit" in refused(load_model, str(name))
    assert "this is a whole model, expected a delta.safetensors" in refused(EditDelta.load, folder)
    assert "this is a whole model or a part of one" in refused(EditDelta.load, folder / "model.safetensors")
