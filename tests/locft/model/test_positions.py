"""Positions resolve to exactly the right parameters, on every architecture."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from locft.errors import InputError
from locft.model.families import BY_MODEL_TYPE, FAMILIES, MODULES, STANDS_IN
from locft.model.positions import (
    TuningPosition,
    decoder_layers,
    layer_prefix,
    list_positions,
    modules_of,
    n_layers,
    parameter_names,
)
from tests.tiny import ARCHITECTURES, RELATED, tiny_config, tiny_model

EVERY = ARCHITECTURES + RELATED


@lru_cache
def meta_model(architecture: str, layers: int = 3):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(tiny_config(architecture, layers))


def names(architecture: str, position: str, layers: int = 3) -> tuple[str, ...]:
    return parameter_names(meta_model(architecture, layers), TuningPosition.parse(position))


# What two typical modules of layer 1 train, written out by hand from the models' own parameter names.
LLAMA_LIKE = {
    "mlp_down": ("model.layers.1.mlp.down_proj.weight",),
    "attn_o": ("model.layers.1.self_attn.o_proj.weight",),
}
EXPECTED = {
    **{
        name: LLAMA_LIKE
        for name in (
            "llama",
            "mistral",
            "qwen2",
            "qwen3",
            "gemma2",
            "gemma3_text",
            "phi3",
            "olmo2",
            "cohere",
            "granite",
            "gemma",
            "olmo",
            "olmo3",
            "cohere2",
            "smollm3",
            "stablelm",
            "seed_oss",
            "exaone4",
            "helium",
            "arcee",
            "nemotron",
            "ernie4_5",
            "hunyuan_v1_dense",
            "glm",
            "glm4",
            "ministral",
        )
    },
    "gpt2": {
        "mlp_down": ("transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"),
        "attn_qkv": ("transformer.h.1.attn.c_attn.weight", "transformer.h.1.attn.c_attn.bias"),
    },
    "gpt_bigcode": {
        "mlp_up": ("transformer.h.1.mlp.c_fc.weight", "transformer.h.1.mlp.c_fc.bias"),
        "attn_o": ("transformer.h.1.attn.c_proj.weight", "transformer.h.1.attn.c_proj.bias"),
    },
    "gpt_neo": {
        "mlp_down": ("transformer.h.1.mlp.c_proj.weight", "transformer.h.1.mlp.c_proj.bias"),
        "attn_v": ("transformer.h.1.attn.attention.v_proj.weight",),
    },
    "gptj": {
        "mlp_down": ("transformer.h.1.mlp.fc_out.weight", "transformer.h.1.mlp.fc_out.bias"),
        "attn_o": ("transformer.h.1.attn.out_proj.weight",),
    },
    "gpt_neox": {
        "mlp_down": ("gpt_neox.layers.1.mlp.dense_4h_to_h.weight", "gpt_neox.layers.1.mlp.dense_4h_to_h.bias"),
        "attn_o": ("gpt_neox.layers.1.attention.dense.weight", "gpt_neox.layers.1.attention.dense.bias"),
    },
    "bloom": {
        "mlp_up": ("transformer.h.1.mlp.dense_h_to_4h.weight", "transformer.h.1.mlp.dense_h_to_4h.bias"),
        "attn_o": ("transformer.h.1.self_attention.dense.weight", "transformer.h.1.self_attention.dense.bias"),
    },
    "falcon": {
        "mlp_down": ("transformer.h.1.mlp.dense_4h_to_h.weight",),
        "attn_qkv": ("transformer.h.1.self_attention.query_key_value.weight",),
    },
    "opt": {
        "mlp_down": ("model.decoder.layers.1.fc2.weight", "model.decoder.layers.1.fc2.bias"),
        "mlp": (
            "model.decoder.layers.1.fc1.weight",
            "model.decoder.layers.1.fc1.bias",
            "model.decoder.layers.1.fc2.weight",
            "model.decoder.layers.1.fc2.bias",
        ),
    },
    "phi": {
        "mlp_down": ("model.layers.1.mlp.fc2.weight", "model.layers.1.mlp.fc2.bias"),
        "attn_o": ("model.layers.1.self_attn.dense.weight", "model.layers.1.self_attn.dense.bias"),
    },
    "starcoder2": {
        "mlp_down": ("model.layers.1.mlp.c_proj.weight", "model.layers.1.mlp.c_proj.bias"),
        "attn_o": ("model.layers.1.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.bias"),
    },
    "qwen2_moe": {
        "shared_down": ("model.layers.1.mlp.shared_expert.down_proj.weight",),
        "experts_down": ("model.layers.1.mlp.experts.down_proj",),
        "router": ("model.layers.1.mlp.gate.weight",),
    },
    "mixtral": {
        "experts_down": ("model.layers.1.mlp.experts.down_proj",),
        "experts_gate_up": ("model.layers.1.mlp.experts.gate_up_proj",),
        "router": ("model.layers.1.mlp.gate.weight",),
    },
    "qwen3_moe": {"experts_down": ("model.layers.1.mlp.experts.down_proj",)},
    "olmoe": {"experts_down": ("model.layers.1.mlp.experts.down_proj",)},
    "gpt_oss": {
        "experts_down": ("model.layers.1.mlp.experts.down_proj", "model.layers.1.mlp.experts.down_proj_bias"),
        "router": ("model.layers.1.mlp.router.weight", "model.layers.1.mlp.router.bias"),
    },
    "deepseek_v3": {
        "shared_down": ("model.layers.1.mlp.shared_experts.down_proj.weight",),
        "attn_kv": (
            "model.layers.1.self_attn.kv_a_proj_with_mqa.weight",
            "model.layers.1.self_attn.kv_b_proj.weight",
        ),
    },
    "qwen3_next": {
        "shared_up": ("model.layers.1.mlp.shared_expert.up_proj.weight",),
        "attn_o": ("model.layers.1.self_attn.o_proj.weight",),
    },
    "lfm2": {
        "mlp_down": ("model.layers.1.feed_forward.w2.weight",),
        "attn_o": ("model.layers.1.self_attn.out_proj.weight",),
    },
    "mamba": {
        "mixer_in": ("backbone.layers.1.mixer.in_proj.weight",),
        "mixer_out": ("backbone.layers.1.mixer.out_proj.weight",),
    },
    "mamba2": {"mixer_out": ("backbone.layers.1.mixer.out_proj.weight",)},
    "falcon_mamba": {"mixer_out": ("backbone.layers.1.mixer.out_proj.weight",)},
    "rwkv": {
        "mlp_down": ("rwkv.blocks.1.feed_forward.value.weight",),
        "attn_q": ("rwkv.blocks.1.attention.receptance.weight",),
        "attn_o": ("rwkv.blocks.1.attention.output.weight",),
    },
}


def test_every_row_of_the_table_is_tested():
    assert set(BY_MODEL_TYPE) == set(EVERY) == set(EXPECTED)
    assert len(BY_MODEL_TYPE) == sum(len(family.model_types) for family in FAMILIES), "a model type is in two rows"
    assert all(set(family.modules) <= set(MODULES) for family in FAMILIES)
    assert set(STANDS_IN) | {near for nears in STANDS_IN.values() for near in nears} <= set(MODULES)


@pytest.mark.parametrize("architecture", EVERY)
def test_a_module_is_exactly_its_parameters(architecture):
    for module, expected in EXPECTED[architecture].items():
        assert set(names(architecture, f"1.{module}")) == set(expected)


@pytest.mark.parametrize("architecture", EVERY)
def test_layer_1_of_20_never_reaches_layers_10_to_19(architecture):
    model = meta_model(architecture, 20)
    assert n_layers(model) == 20
    for info in list_positions(model):
        prefix = layer_prefix(model, info.position.layer) + "."
        assert info.names and all(name.startswith(prefix) for name in info.names)
    of_layers = [set(parameter_names(model, TuningPosition(i, "layer"))) for i in range(20)]
    assert sum(len(part) for part in of_layers) == len(set().union(*of_layers))


@pytest.mark.parametrize("architecture", EVERY)
def test_positions_of_a_model(architecture):
    model = meta_model(architecture)
    parameters = dict(model.named_parameters())
    order = list(parameters)
    infos = list_positions(model)
    assert [info.position for info in infos] == sorted(
        (info.position for info in infos), key=lambda position: (position.layer, MODULES.index(position.module))
    )
    for info in infos:
        assert list(info.names) == sorted(info.names, key=order.index)
        assert info.shapes == tuple(tuple(parameters[name].shape) for name in info.names)
        assert info.size == sum(parameters[name].numel() for name in info.names)
        assert info.names == parameter_names(model, info.position)
        assert TuningPosition.parse(str(info.position)) == info.position
    for layer in range(n_layers(model)):
        whole = {info.position.module: set(info.names) for info in infos if info.position.layer == layer}
        prefix = layer_prefix(model, layer) + "."
        assert whole["layer"] == {name for name in order if name.startswith(prefix)}
        assert all(part <= whole["layer"] for part in whole.values())
        parts = [module for module in whole if module not in ("mlp", "attn", "mixer", "layer")]
        assert sum(len(whole[module]) for module in parts) == len(set().union(*(whole[module] for module in parts)))
        wholes = [module for module in ("mlp", "attn", "mixer") if module in whole]
        assert sum(len(whole[module]) for module in wholes) == len(set().union(*(whole[module] for module in wholes)))
        for module in parts:
            block = {"attn": "attn", "mixer": "mixer"}.get(module.split("_")[0], "mlp")
            assert whole[module] <= whole[block]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2_moe", "mamba"])
def test_meta_and_real_models_agree(architecture):
    real = tiny_model(architecture)
    assert list_positions(real) == list_positions(meta_model(architecture))
    parameters = dict(real.named_parameters())
    assert all(name in parameters for info in list_positions(real) for name in info.names)


def test_modules_in_canonical_order():
    canonical = ("mlp_down", "mlp_up", "mlp_gate", "mlp", "attn_q", "attn_k", "attn_v", "attn_o", "attn", "layer")
    assert modules_of(meta_model("llama")) == canonical
    assert modules_of(meta_model("phi3")) == ("mlp_down", "mlp_gate_up", "mlp", "attn_qkv", "attn_o", "attn", "layer")
    assert modules_of(meta_model("mamba")) == ("mixer_in", "mixer_out", "mixer", "layer")
    assert len(decoder_layers(meta_model("opt"))) == 3


def test_biases_belong_to_their_projection_and_norms_to_their_block():
    assert names("qwen2", "1.attn_q") == (
        "model.layers.1.self_attn.q_proj.weight",
        "model.layers.1.self_attn.q_proj.bias",
    )
    norm = "model.layers.1.self_attn.q_norm.weight"
    assert norm in names("qwen3", "1.attn") and norm not in names("qwen3", "1.attn_q")
    norm = "model.layers.1.input_layernorm.weight"
    assert norm in names("llama", "1.layer") and norm not in names("llama", "1.attn")


def test_layers_of_one_model_may_differ():
    """The tiny qwen2_moe has a dense layer 0 and sparse layers behind it."""
    model = meta_model("qwen2_moe")
    assert parameter_names(model, TuningPosition(0, "mlp_gate")) == ("model.layers.0.mlp.gate_proj.weight",)
    mlp = parameter_names(model, TuningPosition(1, "mlp"))
    assert "model.layers.1.mlp.shared_expert_gate.weight" in mlp and "model.layers.1.mlp.gate.weight" in mlp
    with pytest.raises(InputError, match=r"layer 1 .*no 'mlp_down' \(nearest: shared_down\).*exists in layers 0$"):
        parameter_names(model, TuningPosition(1, "mlp_down"))
    with pytest.raises(InputError, match=r"layer 0 .*no 'router'.*exists in layers 1-2$"):
        parameter_names(model, TuningPosition(0, "router"))


@pytest.mark.parametrize(
    ("architecture", "module", "nearest"),
    [
        ("phi3", "attn_k", "attn_qkv"),
        ("phi3", "mlp_up", "mlp_gate_up"),
        ("gpt2", "mlp_gate", "mlp_up"),
        ("mixtral", "mlp_down", "experts_down"),
        ("mamba", "mlp_down", "mixer_out"),
        ("llama", "mixer_out", "attn_o"),
    ],
)
def test_a_module_the_architecture_lacks(architecture, module, nearest):
    with pytest.raises(InputError) as error:
        names(architecture, f"1.{module}")
    text = str(error.value)
    assert f"no module '{module}' (nearest: {nearest})" in text and architecture in text
    assert ", ".join(modules_of(meta_model(architecture))) in text


@pytest.mark.parametrize("layer", [3, 99])
def test_layer_out_of_range(layer):
    with pytest.raises(InputError, match=f"layer {layer} is out of range: this llama model has 3 layers, 0 to 2"):
        names("llama", f"{layer}.mlp_down")
    with pytest.raises(InputError, match="layer -1 is out of range"):
        parameter_names(meta_model("llama"), TuningPosition(-1, "mlp_down"))


@pytest.mark.parametrize("text", ["", "22", "mlp_down", "22.", ".mlp", "-1.mlp", "1.5.mlp", "22:mlp_down", "a.mlp"])
def test_malformed_position(text):
    with pytest.raises(InputError, match=r"LAYER\.MODULE, such as 22\.mlp_down"):
        TuningPosition.parse(text)


def test_unknown_module_in_a_position():
    with pytest.raises(InputError, match=r"no module 'mlp_dwon' \(nearest: mlp_down\); modules are mlp_down, "):
        TuningPosition.parse("3.mlp_dwon")


@given(st.integers(0, 10_000), st.sampled_from(MODULES))
def test_parse_inverts_str(layer, module):
    position = TuningPosition(layer, module)
    assert TuningPosition.parse(str(position)) == position


def test_unknown_architecture_has_whole_layers_and_shows_how_to_add_it():
    config = AutoConfig.for_model("xglm", num_layers=2, d_model=32, attention_heads=4, ffn_dim=48, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert [str(info.position) for info in list_positions(model)] == ["0.layer", "1.layer"]
    block = [name for name, _ in model.named_parameters() if name.startswith("model.layers.1.")]
    assert parameter_names(model, TuningPosition(1, "layer")) == tuple(block) and "model.layers.1.fc2.weight" in block
    with pytest.raises(InputError) as error:
        parameter_names(model, TuningPosition(1, "mlp_down"))
    shows_how_to_add_it(str(error.value))
    model.config.num_layers = 5  # where the list of blocks is not plain to see, there is no position at all
    with pytest.raises(InputError) as error:
        list_positions(model)
    shows_how_to_add_it(str(error.value))


def shows_how_to_add_it(text: str) -> None:
    assert "'xglm'" in text and "model.layers (2 of them)" in text
    assert "self_attn.q_proj.weight (32, 32)" in text and "fc2.weight (32, 48)" in text
    assert "locft/model/families.py" in text and 'Family(("xglm",), "model.layers"' in text
