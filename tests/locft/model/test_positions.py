"""Positions resolve to exactly the right parameters, on every architecture."""

from functools import lru_cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from locft.errors import InputError
from locft.model.families import FAMILIES, MODULES, STANDS_IN
from locft.model.positions import (
    TuningPosition,
    decoder_layers,
    has_parts,
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


ATTENTION = dict(
    attn="self_attn",
    attn_q="self_attn.q_proj",
    attn_k="self_attn.k_proj",
    attn_v="self_attn.v_proj",
    attn_o="self_attn.o_proj",
)
GATED = dict(mlp="mlp", mlp_down="mlp.down_proj", mlp_up="mlp.up_proj", mlp_gate="mlp.gate_proj")
FUSED = dict(mlp="mlp", mlp_down="mlp.down_proj", mlp_gate_up="mlp.gate_up_proj")
PLAIN = dict(mlp="mlp", mlp_down="mlp.c_proj", mlp_up="mlp.c_fc")
H_TO_4H = dict(mlp="mlp", mlp_down="mlp.dense_4h_to_h", mlp_up="mlp.dense_h_to_4h")
SPARSE = GATED | dict(
    router="mlp.gate mlp.router",
    experts_down="mlp.experts.down_proj mlp.experts.down_proj_bias",
    experts_gate_up="mlp.experts.gate_up_proj mlp.experts.gate_up_proj_bias",
)
MAMBA = dict(mixer="mixer", mixer_in="mixer.in_proj", mixer_out="mixer.out_proj")


def shared(path: str) -> dict[str, str]:
    return {f"shared_{name}": f"{path}.{name}_proj" for name in ("down", "up", "gate")}


# What the modules consist of, listed by hand: paths inside a block, which some of its layers may lack.
LISTED: dict[str, dict[str, str]] = {
    "llama mistral ministral qwen2 qwen3 gemma gemma2 gemma3_text olmo olmo2 olmo3 cohere cohere2 smollm3 stablelm seed_oss "
    "exaone4 helium granite ernie4_5 hunyuan_v1_dense": ATTENTION | GATED,
    "arcee nemotron": ATTENTION | dict(mlp="mlp", mlp_down="mlp.down_proj", mlp_up="mlp.up_proj"),
    "glm glm4": ATTENTION | FUSED,
    "phi3": dict(attn="self_attn", attn_qkv="self_attn.qkv_proj", attn_o="self_attn.o_proj") | FUSED,
    "phi": ATTENTION | dict(attn_o="self_attn.dense", mlp="mlp", mlp_down="mlp.fc2", mlp_up="mlp.fc1"),
    "starcoder2": ATTENTION | PLAIN,
    "mixtral qwen2_moe qwen3_moe olmoe gpt_oss": ATTENTION | SPARSE | shared("mlp.shared_expert"),
    # Latent attention: low-rank pairs of matrices for the queries, and for keys and values together.
    "deepseek_v3": dict(
        attn="self_attn",
        attn_q="self_attn.q_a_proj self_attn.q_b_proj",
        attn_kv="self_attn.kv_a_proj_with_mqa self_attn.kv_b_proj",
        attn_o="self_attn.o_proj",
    )
    | SPARSE
    | shared("mlp.shared_experts"),
    "qwen3_next": ATTENTION
    | SPARSE
    | shared("mlp.shared_expert")
    | dict(
        mixer="linear_attn",
        mixer_in="linear_attn.in_proj_qkvz linear_attn.in_proj_ba",
        mixer_out="linear_attn.out_proj",
    ),
    "lfm2": ATTENTION
    | dict(attn_o="self_attn.out_proj", mixer="conv", mixer_in="conv.in_proj", mixer_out="conv.out_proj")
    | dict(mlp="feed_forward", mlp_down="feed_forward.w2", mlp_up="feed_forward.w3", mlp_gate="feed_forward.w1"),
    "gpt2 gpt_bigcode": dict(attn="attn", attn_qkv="attn.c_attn", attn_o="attn.c_proj") | PLAIN,
    "gpt_neo": {name: path.replace("self_attn", "attn.attention") for name, path in ATTENTION.items()}
    | dict(attn="attn", attn_o="attn.attention.out_proj")
    | PLAIN,
    "gptj": {name: path.replace("self_attn", "attn") for name, path in ATTENTION.items()}
    | dict(attn_o="attn.out_proj", mlp="mlp", mlp_down="mlp.fc_out", mlp_up="mlp.fc_in"),
    "gpt_neox": dict(attn="attention", attn_qkv="attention.query_key_value", attn_o="attention.dense") | H_TO_4H,
    "bloom falcon": dict(
        attn="self_attention", attn_qkv="self_attention.query_key_value", attn_o="self_attention.dense"
    )
    | H_TO_4H,
    # The MLP is no submodule: its two matrices lie directly in the block.
    "opt": ATTENTION | dict(attn_o="self_attn.out_proj", mlp="fc1 fc2", mlp_down="fc2", mlp_up="fc1"),
    "mamba mamba2 falcon_mamba": MAMBA,
    # Time mixing stands for attention, where receptance asks as a query does; channel mixing for the MLP, which it gates.
    "rwkv": dict(
        attn="attention",
        attn_q="attention.receptance",
        attn_k="attention.key",
        attn_v="attention.value",
        attn_o="attention.output",
        mlp="feed_forward",
        mlp_down="feed_forward.value",
        mlp_up="feed_forward.key",
        mlp_gate="feed_forward.receptance",
    ),
}
EXPECTED = {name: paths for types, paths in LISTED.items() for name in types.split()}


def test_every_type_is_listed():
    assert set(EVERY) == set(EXPECTED) >= set(FAMILIES)
    assert all(set(paths) <= set(MODULES) for paths in EXPECTED.values())
    assert set(STANDS_IN) | {near for nears in STANDS_IN.values() for near in nears} <= set(MODULES)


@pytest.mark.parametrize("architecture", EVERY)
def test_positions_are_the_listed_ones(architecture):
    model = meta_model(architecture)
    infos = {info.position: info.names for info in list_positions(model)}
    for layer, block in enumerate(decoder_layers(model)):
        prefix, own = layer_prefix(model, layer), [name for name, _ in block.named_parameters()]
        listed = {
            module: tuple(
                f"{prefix}.{name}" for name in own if any(f"{name}.".startswith(f"{path}.") for path in paths.split())
            )
            for module, paths in EXPECTED[architecture].items()
        } | {"layer": tuple(f"{prefix}.{name}" for name in own)}
        found = {position.module: names for position, names in infos.items() if position.layer == layer}
        assert found == {module: names for module, names in listed.items() if names}


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


def test_unknown_parts_leave_whole_layers_and_show_how_to_list_them():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama"))
        for index in range(3):
            model.model.layers[index] = nn.Sequential(nn.Linear(32, 48), nn.Linear(48, 16))
    assert [str(info.position) for info in list_positions(model)] == ["0.layer", "1.layer", "2.layer"]
    assert not has_parts(model) and len(parameter_names(model, TuningPosition(1, "layer"))) == 4
    with pytest.raises(InputError) as error:
        parameter_names(model, TuningPosition(1, "mlp_down"))
    text = str(error.value)
    assert "'llama'" in text and "model.layers (3 of them)" in text and "0.weight (48, 32)" in text
    assert "locft/model/families.py" in text and '"llama": {"mlp_down"' in text


def test_blocks_that_are_not_plain_to_see():
    config = AutoConfig.for_model("xlm", n_layers=2, emb_dim=32, n_heads=4, vocab_size=64)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(InputError, match="structure of 'xlm'"):  # a list of attentions, and another of MLPs
        list_positions(model)


def test_a_parameter_that_blocks_share_belongs_to_the_first():
    model = tiny_model("llama")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    assert parameter_names(model, TuningPosition(1, "mlp_down")) == ("model.layers.1.mlp.down_proj.weight",)
    with pytest.raises(InputError, match="layer 2 .* has no 'mlp_down'.* exists in layers 0-1"):
        parameter_names(model, TuningPosition(2, "mlp_down"))
