"""The table of architectures: where the blocks of a model are and what their parts are called.

A row covers the model types that share parameter names. A part is a path inside the block: a submodule
("mlp.down_proj": its weight and, if it has one, its bias) or a parameter ("mlp.experts.down_proj"). Paths are compared
whole, component by component; nothing is ever matched as a substring. Layers of one model may differ (dense and sparse,
attention and convolution): a part that a layer lacks is a module that this layer does not have.

To add an architecture: print the parameter names of one block (the error for an unknown one does it), add a row here,
and add its model type with a tiny configuration to `tests/tiny.py`; the tests of positions and of the tail view then
cover it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# fmt: off
MODULES: tuple[str, ...] = (
    "mlp_down", "mlp_up", "mlp_gate", "mlp_gate_up", "mlp", "shared_down", "shared_up", "shared_gate",
    "experts_down", "experts_gate_up", "router", "attn_q", "attn_k", "attn_v", "attn_kv", "attn_qkv", "attn_o", "attn",
    "mixer_in", "mixer_out", "mixer", "layer",
)
# fmt: on
"""Every module name in canonical order.

mlp_down, mlp_up, mlp_gate   the matrices of a dense MLP: back to the hidden size, to the inner size, and its gate
mlp_gate_up                  gate and up in one matrix (phi3, glm)
shared_*                     the same matrices of a shared expert;  experts_*: of all routed experts of the layer
router                       the matrix that chooses experts
mlp                          everything in the MLP or mixture-of-experts block, router and experts included
attn_q, attn_k, attn_v       the projections; attn_qkv if they are one matrix, attn_kv if key and value share one
attn_o                       the output projection;  attn: everything in the attention block, its norms included
mixer_in, mixer_out, mixer   projections and whole of a state-space, linear-attention or convolution block
layer                        every parameter of the block, norms included
"""

STANDS_IN: Mapping[str, tuple[str, ...]] = {
    "mlp_down": ("shared_down", "experts_down", "mixer_out"),
    "mlp_up": ("mlp_gate_up", "shared_up", "experts_gate_up", "mixer_in"),
    "mlp_gate": ("mlp_gate_up", "shared_gate", "experts_gate_up", "mlp_up", "mixer_in"),
    "mlp_gate_up": ("mlp_up", "experts_gate_up", "mixer_in"),
    "mlp": ("mixer",),
    "shared_down": ("mlp_down", "experts_down"),
    "shared_up": ("mlp_up", "mlp_gate_up", "experts_gate_up"),
    "shared_gate": ("mlp_gate", "mlp_gate_up", "experts_gate_up"),
    "experts_down": ("mlp_down",),
    "experts_gate_up": ("mlp_gate_up", "mlp_up"),
    "attn_q": ("attn_qkv", "mixer_in"),
    "attn_k": ("attn_kv", "attn_qkv", "mixer_in"),
    "attn_v": ("attn_kv", "attn_qkv", "mixer_in"),
    "attn_kv": ("attn_k", "attn_qkv"),
    "attn_qkv": ("attn_q", "mixer_in"),
    "attn_o": ("mixer_out",),
    "attn": ("mixer",),
    "mixer_in": ("attn_qkv", "attn_q"),
    "mixer_out": ("attn_o",),
    "mixer": ("attn",),
}
"""What to offer to somebody who asks for a module that an architecture does not have, nearest first."""


ZERO = "module that returns zero"
IDENTITY = "module that returns its input"


@dataclass(frozen=True)
class Family:
    """One row: the architectures that share these names."""

    model_types: tuple[str, ...]
    """`config.model_type` of each."""
    layers: str
    """Path of the list of blocks inside the causal LM, such as "model.layers"."""
    modules: Mapping[str, tuple[str, ...]]
    """Module name -> paths inside a block whose parameters it consists of. "layer" is always there and not listed."""
    entry: Mapping[str, Any] = field(default_factory=dict)
    """What the model does between the embedding and its first block: attributes of the block list's owner, and what
    switches each off. ZERO is for a module whose output is added, IDENTITY for one that maps the hidden states;
    anything else is the value itself. A view of the model from some layer upwards must not do it again."""


def _matrices(kind: str, path: str, **names: str) -> dict[str, tuple[str, ...]]:
    """Modules kind_key -> paths of the submodules (or parameters) of `path` with these names, separated by spaces."""
    return {f"{kind}_{key}": tuple(f"{path}.{name}" for name in value.split()) for key, value in names.items()}


def _block(kind: str, path: str, **names: str) -> dict[str, tuple[str, ...]]:
    """The matrices of an MLP, attention or mixer block, and the whole of it."""
    return _matrices(kind, path, **names) | {kind: (path,)}


_ATTENTION = _block("attn", "self_attn", q="q_proj", k="k_proj", v="v_proj", o="o_proj")
_GATED_MLP = _block("mlp", "mlp", down="down_proj", up="up_proj", gate="gate_proj")
_FUSED_MLP = _block("mlp", "mlp", down="down_proj", gate_up="gate_up_proj")
# transformers stacks the matrices of all routed experts into one 3-dimensional parameter.
_EXPERTS = {"router": ("mlp.gate", "mlp.router")} | _matrices(
    "experts", "mlp.experts", down="down_proj down_proj_bias", gate_up="gate_up_proj gate_up_proj_bias"
)
# Sparse layers have experts, and some models keep dense layers between them: a row knows both.
_SPARSE_MLP = _GATED_MLP | _EXPERTS


def _shared(path: str) -> dict[str, tuple[str, ...]]:
    return _matrices("shared", path, down="down_proj", up="up_proj", gate="gate_proj")


FAMILIES: tuple[Family, ...] = (
    Family(
        (
            "llama",
            "mistral",
            "ministral",
            "qwen2",
            "qwen3",
            "gemma",
            "gemma2",
            "gemma3_text",
            "olmo",
            "olmo2",
            "olmo3",
            "cohere",
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
        ),
        "model.layers",
        _ATTENTION | _GATED_MLP,
    ),
    Family(("granite",), "model.layers", _ATTENTION | _GATED_MLP, entry={"embedding_multiplier": 1.0}),
    Family(("glm", "glm4"), "model.layers", _ATTENTION | _FUSED_MLP),
    Family(("phi3",), "model.layers", _block("attn", "self_attn", qkv="qkv_proj", o="o_proj") | _FUSED_MLP),
    Family(
        ("phi",),
        "model.layers",
        _block("attn", "self_attn", q="q_proj", k="k_proj", v="v_proj", o="dense")
        | _block("mlp", "mlp", down="fc2", up="fc1"),
    ),
    Family(("starcoder2",), "model.layers", _ATTENTION | _block("mlp", "mlp", down="c_proj", up="c_fc")),
    Family(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"),
        "model.layers",
        _ATTENTION | _SPARSE_MLP | _shared("mlp.shared_expert"),
    ),
    Family(
        ("deepseek_v3",),
        "model.layers",
        # Latent attention: low-rank pairs of matrices for the queries, and for keys and values together.
        _block("attn", "self_attn", q="q_proj q_a_proj q_b_proj", kv="kv_a_proj_with_mqa kv_b_proj", o="o_proj")
        | _SPARSE_MLP
        | _shared("mlp.shared_experts"),
    ),
    Family(
        ("qwen3_next",),
        "model.layers",
        _ATTENTION
        | _SPARSE_MLP
        | _shared("mlp.shared_expert")
        | _block("mixer", "linear_attn", **{"in": "in_proj_qkvz in_proj_ba", "out": "out_proj"}),
    ),
    Family(
        ("lfm2",),
        "model.layers",
        _block("attn", "self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        | _block("mlp", "feed_forward", down="w2", up="w3", gate="w1")
        | _block("mixer", "conv", **{"in": "in_proj", "out": "out_proj"}),
    ),
    Family(
        ("gpt2", "gpt_bigcode"),
        "transformer.h",
        _block("mlp", "mlp", down="c_proj", up="c_fc") | _block("attn", "attn", qkv="c_attn", o="c_proj"),
        entry={"wpe": ZERO},
    ),
    Family(
        ("gpt_neo",),
        "transformer.h",
        _block("mlp", "mlp", down="c_proj", up="c_fc")
        | _matrices("attn", "attn.attention", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        | {"attn": ("attn",)},
        entry={"wpe": ZERO},
    ),
    Family(
        ("gptj",),
        "transformer.h",
        _block("mlp", "mlp", down="fc_out", up="fc_in")
        | _block("attn", "attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj"),
    ),
    Family(
        ("gpt_neox",),
        "gpt_neox.layers",
        _block("mlp", "mlp", down="dense_4h_to_h", up="dense_h_to_4h")
        | _block("attn", "attention", qkv="query_key_value", o="dense"),
    ),
    Family(
        ("bloom", "falcon"),
        "transformer.h",
        _block("mlp", "mlp", down="dense_4h_to_h", up="dense_h_to_4h")
        | _block("attn", "self_attention", qkv="query_key_value", o="dense"),
        entry={"word_embeddings_layernorm": IDENTITY},  # bloom's; falcon has none
    ),
    Family(
        ("opt",),
        "model.decoder.layers",
        # The MLP is no submodule: its two matrices lie directly in the block.
        _block("attn", "self_attn", q="q_proj", k="k_proj", v="v_proj", o="out_proj")
        | {"mlp_down": ("fc2",), "mlp_up": ("fc1",), "mlp": ("fc1", "fc2")},
        entry={"embed_positions": ZERO, "project_in": None},
    ),
    Family(
        ("mamba", "mamba2", "falcon_mamba"),
        "backbone.layers",
        _block("mixer", "mixer", **{"in": "in_proj", "out": "out_proj"}),
    ),
    Family(
        ("rwkv",),
        "rwkv.blocks",
        # Time mixing stands for attention: receptance asks as a query does. Channel mixing stands for the MLP:
        # receptance gates its output, key leads to the inner size and value back.
        _block("mlp", "feed_forward", down="value", up="key", gate="receptance")
        | _block("attn", "attention", q="receptance", k="key", v="value", o="output"),
    ),
)

BY_MODEL_TYPE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.model_types}

TEXT_HALVES: Mapping[str, str] = {"qwen2_vl_text": "qwen2", "qwen2_5_vl_text": "qwen2", "qwen3_vl_text": "qwen3"}
"""Model types that exist only as the text half of a vision-language model -> the one whose row is theirs."""
