"""What is known about architectures, as one declarative table: where the blocks are and what their parts are called.

A row covers the model types that share parameter names. A part is a path inside the block, a submodule
("mlp.down_proj": its weight and, where it has one, its bias) or a parameter ("mlp.experts.down_proj"). Paths are
compared whole, component by component; nothing is ever matched as a substring. Layers of one model may differ (dense
and sparse, attention and convolution): a part that a layer lacks is a module that this layer does not have.

To add an architecture: print the parameter names of one block (the error for an unknown one does it), add a row here,
and add its model type with a tiny configuration to `tests/tiny.py`; the tests of positions and of the tail view then
cover it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

MODULES: tuple[str, ...] = (
    "mlp_down",
    "mlp_up",
    "mlp_gate",
    "mlp_gate_up",
    "mlp",
    "shared_down",
    "shared_up",
    "shared_gate",
    "experts_down",
    "experts_gate_up",
    "router",
    "attn_q",
    "attn_k",
    "attn_v",
    "attn_kv",
    "attn_qkv",
    "attn_o",
    "attn",
    "mixer_in",
    "mixer_out",
    "mixer",
    "layer",
)
"""Every module name in canonical order.

mlp_down, mlp_up, mlp_gate   the matrices of a dense MLP: back to the hidden size, to the inner size, and its gate
mlp_gate_up                  gate and up in one matrix (phi3, glm)
shared_*                     the same matrices of a shared expert;  experts_*: of all routed experts of the layer
router                       the matrix that chooses experts
mlp                          everything in the MLP or mixture-of-experts block, router and experts included
attn_q, attn_k, attn_v       the projections; attn_qkv where they are one matrix, attn_kv where key and value share one
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
    """What the model does between the embedding and its first block, as attributes of the block list's owner and the
    value that switches each off: ZERO for a module whose output is added, IDENTITY for one that maps the hidden states,
    else the value itself. A view of the model from a layer upwards needs it, for there it must not happen again."""


ZERO = "module that returns zero"
IDENTITY = "module that returns its input"

_ATTENTION = {
    "attn_q": ("self_attn.q_proj",),
    "attn_k": ("self_attn.k_proj",),
    "attn_v": ("self_attn.v_proj",),
    "attn_o": ("self_attn.o_proj",),
    "attn": ("self_attn",),
}
_GATED_MLP = {
    "mlp_down": ("mlp.down_proj",),
    "mlp_up": ("mlp.up_proj",),
    "mlp_gate": ("mlp.gate_proj",),
    "mlp": ("mlp",),
}
_FUSED_MLP = {"mlp_down": ("mlp.down_proj",), "mlp_gate_up": ("mlp.gate_up_proj",), "mlp": ("mlp",)}
# transformers stacks the matrices of all routed experts into one 3-dimensional parameter.
_EXPERTS = {
    "experts_down": ("mlp.experts.down_proj", "mlp.experts.down_proj_bias"),
    "experts_gate_up": ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj_bias"),
    "router": ("mlp.gate", "mlp.router"),
    "mlp": ("mlp",),
}


def _shared(expert: str) -> dict[str, tuple[str, ...]]:
    return {
        "shared_down": (f"mlp.{expert}.down_proj",),
        "shared_up": (f"mlp.{expert}.up_proj",),
        "shared_gate": (f"mlp.{expert}.gate_proj",),
    }


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
    Family(
        ("phi3",),
        "model.layers",
        {"attn_qkv": ("self_attn.qkv_proj",), "attn_o": ("self_attn.o_proj",), "attn": ("self_attn",)} | _FUSED_MLP,
    ),
    Family(
        ("phi",),
        "model.layers",
        _ATTENTION
        | {"attn_o": ("self_attn.dense",), "mlp_down": ("mlp.fc2",), "mlp_up": ("mlp.fc1",), "mlp": ("mlp",)},
    ),
    Family(
        ("starcoder2",),
        "model.layers",
        _ATTENTION | {"mlp_down": ("mlp.c_proj",), "mlp_up": ("mlp.c_fc",), "mlp": ("mlp",)},
    ),
    # Sparse layers have experts, and some models keep dense layers between them: one row knows both.
    Family(
        ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"),
        "model.layers",
        _ATTENTION | _GATED_MLP | _EXPERTS | _shared("shared_expert"),
    ),
    Family(
        ("deepseek_v3",),
        "model.layers",
        _GATED_MLP
        | _EXPERTS
        | _shared("shared_experts")
        | {
            # Latent attention: low-rank pairs of matrices for the queries, and for keys and values together.
            "attn_q": ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.q_b_proj"),
            "attn_kv": ("self_attn.kv_a_proj_with_mqa", "self_attn.kv_b_proj"),
            "attn_o": ("self_attn.o_proj",),
            "attn": ("self_attn",),
        },
    ),
    Family(
        ("qwen3_next",),
        "model.layers",
        _ATTENTION
        | _GATED_MLP
        | _EXPERTS
        | _shared("shared_expert")
        | {
            "mixer_in": ("linear_attn.in_proj_qkvz", "linear_attn.in_proj_ba"),
            "mixer_out": ("linear_attn.out_proj",),
            "mixer": ("linear_attn",),
        },
    ),
    Family(
        ("lfm2",),
        "model.layers",
        _ATTENTION
        | {
            "attn_o": ("self_attn.out_proj",),
            "mlp_down": ("feed_forward.w2",),
            "mlp_up": ("feed_forward.w3",),
            "mlp_gate": ("feed_forward.w1",),
            "mlp": ("feed_forward",),
            "mixer_in": ("conv.in_proj",),
            "mixer_out": ("conv.out_proj",),
            "mixer": ("conv",),
        },
    ),
    Family(
        ("gpt2", "gpt_bigcode"),
        "transformer.h",
        {
            "mlp_down": ("mlp.c_proj",),
            "mlp_up": ("mlp.c_fc",),
            "mlp": ("mlp",),
            "attn_qkv": ("attn.c_attn",),
            "attn_o": ("attn.c_proj",),
            "attn": ("attn",),
        },
        entry={"wpe": ZERO},
    ),
    Family(
        ("gpt_neo",),
        "transformer.h",
        {
            "mlp_down": ("mlp.c_proj",),
            "mlp_up": ("mlp.c_fc",),
            "mlp": ("mlp",),
            "attn_q": ("attn.attention.q_proj",),
            "attn_k": ("attn.attention.k_proj",),
            "attn_v": ("attn.attention.v_proj",),
            "attn_o": ("attn.attention.out_proj",),
            "attn": ("attn",),
        },
        entry={"wpe": ZERO},
    ),
    Family(
        ("gptj",),
        "transformer.h",
        {
            "mlp_down": ("mlp.fc_out",),
            "mlp_up": ("mlp.fc_in",),
            "mlp": ("mlp",),
            "attn_q": ("attn.q_proj",),
            "attn_k": ("attn.k_proj",),
            "attn_v": ("attn.v_proj",),
            "attn_o": ("attn.out_proj",),
            "attn": ("attn",),
        },
    ),
    Family(
        ("gpt_neox",),
        "gpt_neox.layers",
        {
            "mlp_down": ("mlp.dense_4h_to_h",),
            "mlp_up": ("mlp.dense_h_to_4h",),
            "mlp": ("mlp",),
            "attn_qkv": ("attention.query_key_value",),
            "attn_o": ("attention.dense",),
            "attn": ("attention",),
        },
    ),
    Family(
        ("bloom", "falcon"),
        "transformer.h",
        {
            "mlp_down": ("mlp.dense_4h_to_h",),
            "mlp_up": ("mlp.dense_h_to_4h",),
            "mlp": ("mlp",),
            "attn_qkv": ("self_attention.query_key_value",),
            "attn_o": ("self_attention.dense",),
            "attn": ("self_attention",),
        },
        entry={"word_embeddings_layernorm": IDENTITY},  # bloom's; falcon has none
    ),
    Family(
        ("opt",),
        "model.decoder.layers",
        # The MLP is no submodule here: its two matrices lie directly in the block.
        _ATTENTION
        | {"attn_o": ("self_attn.out_proj",), "mlp_down": ("fc2",), "mlp_up": ("fc1",), "mlp": ("fc1", "fc2")},
        entry={"embed_positions": ZERO, "project_in": None},
    ),
    Family(
        ("mamba", "mamba2", "falcon_mamba"),
        "backbone.layers",
        {"mixer_in": ("mixer.in_proj",), "mixer_out": ("mixer.out_proj",), "mixer": ("mixer",)},
    ),
    Family(
        ("rwkv",),
        "rwkv.blocks",
        # Time mixing stands for attention: receptance asks as a query does. Channel mixing stands for the MLP:
        # receptance gates its output, key leads to the inner size and value back.
        {
            "mlp_down": ("feed_forward.value",),
            "mlp_up": ("feed_forward.key",),
            "mlp_gate": ("feed_forward.receptance",),
            "mlp": ("feed_forward",),
            "attn_q": ("attention.receptance",),
            "attn_k": ("attention.key",),
            "attn_v": ("attention.value",),
            "attn_o": ("attention.output",),
            "attn": ("attention",),
        },
    ),
)

BY_MODEL_TYPE: Mapping[str, Family] = {name: family for family in FAMILIES for name in family.model_types}
