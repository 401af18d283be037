"""An adapter is what PEFT makes of the edit: the same logits as the truncated delta, and at full rank as the edit itself."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from locft.errors import InputError
from locft.model.adapter import LowRank, base_address
from locft.model.delta import EditDelta, applied
from locft.model.models import load_model, load_structure
from tests.locft.model.test_merge import TEXT, delta_at, saved
from tests.tiny import tiny_model

IDS = torch.tensor([[5, 17, 42, 99, 7, 3]])
SIZES_OF_EYE = dict(hidden_size=32, intermediate_size=48, num_heads=4, depth=2)
POSITIONS = [
    ("llama", "1.mlp_down", 12),
    ("llama", "1.mlp", 12),
    ("gpt2", "1.mlp_up", 12),
    ("gpt2", "2.attn_o", 3),
    ("qwen2", "0.attn", 3),
    ("opt", "1.mlp_down", 3),
    ("gpt_neox", "1.attn_qkv", 3),
]


@torch.no_grad()
def through_peft(base, folder) -> torch.Tensor:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
    return model.eval()(input_ids=IDS).logits


@torch.no_grad()
def edited(loaded, delta: EditDelta) -> torch.Tensor:
    with applied(loaded, delta):
        return loaded.model(input_ids=IDS).logits


@pytest.mark.parametrize("architecture, position, layers", POSITIONS)
def test_peft_loads_what_was_measured(architecture, position, layers, tmp_path):
    base = saved(tmp_path / "base", tiny_model(architecture, layers=layers))
    loaded, delta = load_model(str(base), device="cpu"), delta_at(base, position, size=0.3)
    low_rank = LowRank.of(loaded.model, delta)
    cut = edited(loaded, low_rank.at(3))
    low_rank.save(3, tmp_path / "three", base_address(str(base)))
    assert torch.allclose(through_peft(base, tmp_path / "three"), cut, atol=1e-4)
    matrices = {f"{matrix.path}.weight" for matrix in low_rank.matrices}
    whole = EditDelta(position, delta.base_fingerprint, {name: delta.tensors[name] for name in matrices})
    low_rank.save(low_rank.full_rank, tmp_path / "full", base_address(str(base)))
    assert torch.allclose(through_peft(base, tmp_path / "full"), edited(loaded, whole), atol=1e-4)
    assert not torch.allclose(cut, edited(loaded, whole), atol=1e-2), "the truncation shows"
    about = json.loads((tmp_path / "three" / "adapter_config.json").read_text())
    modes = {file.stat().st_mode for file in (tmp_path / "three").iterdir()}
    assert len(modes) == 1, "whoever may read the configuration may read the weights"
    assert about["base_model_name_or_path"] == str(base) and about["r"] == about["lora_alpha"] == 3
    assert about["fan_in_fan_out"] == (architecture == "gpt2")


def test_the_text_half_of_a_vision_language_model(tmp_path):
    eye = SIZES_OF_EYE | dict(out_hidden_size=32, deepstack_visual_indexes=[0])
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=TEXT, vision_config=eye))
    base = saved(tmp_path / "base", model)
    loaded, delta = load_model(str(base), device="cpu"), delta_at(base, "1.mlp", size=0.3)
    low_rank = LowRank.of(loaded.model, delta)
    low_rank.save(low_rank.full_rank, tmp_path / "adapter", base_address(str(base)))
    with torch.no_grad():
        whole = PeftModel.from_pretrained(Qwen3VLForConditionalGeneration.from_pretrained(base), tmp_path / "adapter")
        assert torch.allclose(whole.eval()(input_ids=IDS).logits, edited(loaded, delta), atol=1e-4)


def test_layer_1_is_not_layer_10(tmp_path):
    base = saved(tmp_path / "base", tiny_model(layers=12))
    LowRank.of(load_structure(str(base)), delta_at(base, "1.mlp_down")).save(4, tmp_path / "adapter", str(base))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter")
    layers = {name.partition(".lora_")[0] for name, _ in model.named_parameters() if ".lora_" in name}
    assert layers == {"base_model.model.model.layers.1.mlp.down_proj"}


def test_the_share_that_is_kept(tmp_path):
    base = saved(tmp_path / "base", tiny_model())
    name = "model.layers.1.mlp.down_proj.weight"
    change = torch.zeros(32, 48)
    change[0, 0], change[1, 1] = 4.0, 3.0
    low_rank = LowRank.of(load_structure(str(base)), EditDelta("1.mlp_down", "", {name: change}))
    assert low_rank.kept(1) == pytest.approx(4 / 5) and low_rank.kept(2) == pytest.approx(1)
    assert torch.allclose(low_rank.at(1).tensors[name][0, 0], torch.tensor(4.0)) and low_rank.at(1).norm < 4.001
    assert torch.allclose(low_rank.at(2).tensors[name], change, atol=1e-5)
    assert low_rank.size(2) == 2 * (32 + 48) and not list(low_rank.sentences())


def test_matrices_of_different_rank_at_full_rank():
    """Keys of grouped attention have fewer outputs than queries: their factors are filled up."""
    model = tiny_model()
    names = ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight")
    delta = EditDelta("0.attn", "", {name: torch.randn(model.get_parameter(name).shape) for name in names})
    low_rank = LowRank.of(model, delta)
    assert {matrix.up.shape[1] for matrix in low_rank.matrices} == {16, 32} and low_rank.full_rank == 32
    assert all(torch.allclose(low_rank.at(32).tensors[name], delta.tensors[name], atol=1e-4) for name in names)


def test_norms_and_biases_are_left_out_and_said(tmp_path):
    base = saved(tmp_path / "base", tiny_model("gpt2"))
    delta = delta_at(base, "1.mlp")
    low_rank = LowRank.of(load_structure(str(base)), delta)
    assert low_rank.left_out == ("transformer.h.1.mlp.c_fc.bias", "transformer.h.1.mlp.c_proj.bias")
    assert low_rank.kept(low_rank.full_rank) < 1
    (said,) = low_rank.sentences()
    assert "transformer.h.1.mlp.c_fc.bias" in said and "% of the change's norm" in said
    still = {name: change * (change.dim() > 1) for name, change in delta.tensors.items()}
    assert not LowRank.of(load_structure(str(base)), EditDelta("1.mlp", "", still)).left_out, (
        "unchanged ones are no loss"
    )


def test_what_no_adapter_holds_is_named(tmp_path):
    base = saved(tmp_path / "base", tiny_model("mixtral"))
    structure = load_structure(str(base))
    with pytest.raises(InputError, match=r"experts\.down_proj \(4, .*stacked experts"):
        LowRank.of(structure, delta_at(base, "1.mlp"))
    norm = "model.layers.1.input_layernorm.weight"
    with pytest.raises(InputError, match="input_layernorm"):
        LowRank.of(structure, EditDelta("1.layer", "", {norm: torch.ones(32)}))
    with pytest.raises(InputError, match="changes nothing"):
        LowRank.of(structure, EditDelta("1.layer", "", {norm: torch.zeros(32)}))
