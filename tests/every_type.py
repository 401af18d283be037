"""Every decoder-only type of the installed transformers, with a configuration small enough to compute in milliseconds.

The default configuration of a type is shrunk by the names of its settings; a few types need a word more. What is known
of types that lack something stands here, the tests hold it to be true, and `python -m tests.every_type` prints it for
docs/architectures.md.
"""

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    PretrainedConfig,
    PreTrainedModel,
)

from locft.model.models import model_class
from tests.tiny import randomize

VOCABULARY = 400
LAYERS = 4
HIDDEN = 32

SIZES: tuple[tuple[str, int], ...] = (
    (r".*vocab_size.*", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*_positions|context_length|model_max_length", 256),
    (r"moe_intermediate_size|expert_ffn_hidden_size|.*shared.*intermediate_size", 24),
    (
        r".*intermediate_size.*|(.*_)?ffn_dim|ffn_hidden_size|n_inner|d_inner|d_ff|dff|dim_ff|feed_forward_size|mlp_dim",
        48,
    ),
    (r"hidden_size_per_layer_input|ple_embed_dim", 16),
    (r"(.*_)?hidden_size(_global)?|d_model|n_embd|emb_dim|.*embed(ding)?_(dim|size)|word_embed_proj_dim", HIDDEN),
    (r"lru_width|mamba_d_ssm|.*_output_dim|projector_.*_dim|adapter_(in_dim|out_dim|input_size)", HIDDEN),
    (r".*num_layers|n_layers?|.*_layers|depth|num_blocks|num_layers_per_stack", LAYERS),
    (r".*(num_key_value_heads|num_kv_heads|num_query_groups|kv_n_heads|linear_num_key_heads)", 2),
    (r".*num_attention_heads|num_heads|n_heads?|.*attention_heads|index_n_heads|linear_num_(value_)?heads", 4),
    (r"(n_)?mamba_(n_|num_)?heads", 4),
    (r".*head_?dim|d_head|d_kv|dim_head|kv_channels|attention_head_size|mamba_d_head", 8),
    (r".*_rank|hc_lowrank|d_rel", 8),
    (r"rotary_dim", 4),
    (r"(.*_)?(num|n|num_local|num_routed|n_routed)_experts|zero_expert_num", 4),
    (r"(num|moe_num|n)_shared_experts|n_groups?|num_expert_group|topk_group|mamba_n_?groups|o_groups", 1),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k|top_?k.*", 2),
    (r"(mamba_)?chunk_size|.*state_size|mamba_d_state|block_size", 8),
    (r"index_topk", 4),
    (r"sliding_window(_size)?|window_size|local_attention|attention_window_size", 6),
)
"""Settings, matched whole, and the most that they may be."""
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_QSA = dict(
    pad_token_id=0,
    eos_token_id=1,
    ple_layer_ids=[1, 3],
    indexer_n_heads=2,
    indexer_kv_heads=1,
    indexer_head_dim=8,
    indexer_budget=8,
    indexer_compress_ratio=2,
    ngram_vocab_size_base=50,
    split_ngram_parts=1,
)
_HEAD_DIM = dict(head_dim=8)
_MORE: Mapping[str, dict[str, Any]] = {
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8, attn_layer_indices=[1]),
    "blt": dict(encoder_hash_byte_group_vocab=VOCABULARY),
    "cohere_compass_text": dict(rope_parameters={"full_attention": _ROPE, "sliding_attention": _ROPE}),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "dots3_note": dict(text_config=dict(num_key_value_heads=4)),
    "gemma3n_text": dict(num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], num_layers=4),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8, layer_types=["linear_attention", "full_attention"] * 2),
    "hunyuan_v1_dense": _HEAD_DIM,
    "hunyuan_v1_moe": _HEAD_DIM | dict(num_experts=4, moe_topk=2),
    "inkling2_text": dict(n_layers_per_attn_res_block=2),
    "jamba": dict(attn_layer_period=2, attn_layer_offset=1),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2),
    "longcat_flash": _HEAD_DIM | dict(qk_head_dim=16),
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": _HEAD_DIM,
    "nemotron": _HEAD_DIM | dict(num_key_value_heads=2),
    "qwen4_exp": dict(text_config=_QSA),
    "qwen4_exp_text": _QSA,
    "zamba": dict(
        attention_hidden_size=64, attention_head_dim=16, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]
    ),
}
"""What shrinking does not tell: sizes that must fit each other, settings without a default."""

NO_DECODERS: Mapping[str, str] = {
    "bert-generation": "half of an encoder-decoder model",
    "gemma4_assistant": "drafts for another model",
    "gemma4_unified_assistant": "drafts for another model",
    "musicgen": "half of an encoder-decoder model",
    "musicgen_melody": "half of an encoder-decoder model",
    "trocr": "half of an encoder-decoder model",
}
"""Types that are no language model by themselves, beside those that `decoder_only_types` tells by their configuration."""
NO_TINY_MODEL: Mapping[str, str] = {"gemma3n": "its vision tower needs the package timm"}
NO_BLOCKS: Mapping[str, str] = {
    "blt": "four lists of blocks, of bytes and of patches",
    "hrm_text": "two lists of blocks, each run several times",
    "xlm": "attention and MLP in lists of their own",
}
NO_ENGINE: Mapping[str, str] = {
    "cpmant": "its blocks do not take one state per token",
    "gemma3n_text": "its upper layers attend to keys and values of lower layers",
    "hy_v4": "its layers need more than the hidden states of the layers below them",
    "inkling2_text": "running this inkling2_text model from a layer upwards does not give what its full forward pass gives",
    "mllama": "a forward pass over text skips its layers",
    "xlnet": "its blocks do not take one state per token",
    "zaya": "its layers need more than the hidden states of the layers below them",
}
"""Types that are computed whole in every step -> how the reason that is given begins."""


def decoder_only_types() -> tuple[str, ...]:
    """Causal-LM types without encoders, halves of encoder-decoder models and draft models."""
    kinds = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}
    masked = {kind.model_type for kind in MODEL_FOR_MASKED_LM_MAPPING} - {"xlm"}
    return tuple(
        name
        for name, kind in sorted(kinds.items())
        if name not in NO_DECODERS and name not in masked and not getattr(kind, "is_encoder_decoder", False)
    )


def tiny_config(model_type: str) -> PretrainedConfig:
    """A configuration of the type with few layers of each kind and small sizes."""
    kind, more = CONFIG_MAPPING[model_type], _MORE.get(model_type, {})
    return kind(**_merged(_shrunk(kind()), more))


def tiny_model_of(model_type: str) -> PreTrainedModel:
    """A random model of the type, made as a real one is loaded, in float32 and evaluation mode."""
    config = tiny_config(model_type)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config).from_config(config, dtype=torch.float32)
        randomize(model)
    return model.eval().requires_grad_(False)


def _shrunk(config: PretrainedConfig) -> dict[str, Any]:
    fields = set(type(config).__dataclass_fields__) - set(PretrainedConfig.__dataclass_fields__)
    stored = {name: type(config).attribute_map.get(name, name) for name in sorted(fields)}
    own = {name: vars(config)[key] for name, key in stored.items() if key in vars(config)}
    depth = next((own[name] for name in _DEPTHS if isinstance(own.get(name), int)), 0)
    lists = {name: value for name, value in own.items() if isinstance(value, list | tuple) and len(value) == depth > 1}
    chosen = _of_each_kind([str(kinds) for kinds in zip(*lists.values(), strict=True)])
    settings: dict[str, Any] = {}
    for name, value in own.items():
        if isinstance(value, PretrainedConfig):
            settings[name] = _shrunk(value)
        elif name in lists:
            settings[name] = [_small(name, value[layer]) for layer in chosen]
        elif name in _DEPTHS and chosen:
            settings[name] = len(chosen)
        elif isinstance(value, int) and not isinstance(value, bool):
            settings[name] = _small(name, value)
    if "kv_lora_rank" in own:  # latent attention has a key for each query
        settings["num_key_value_heads"] = own["num_attention_heads"] and 4
    special = {name: 0 for name in ("pad_token_id", "eos_token_id", "bos_token_id") if getattr(config, name, None)}
    return settings | special


def _small(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    if name.endswith(("token_id", "token_index")):
        return VOCABULARY - 1
    return next((min(value, most) for pattern, most in SIZES if re.fullmatch(pattern, name)), value)


def _of_each_kind(kinds: Sequence[str]) -> list[int]:
    """Layers, at most `LAYERS`: the first of each kind, and more of the upper ones."""
    first = list({kind: layer for layer, kind in reversed(list(enumerate(kinds)))}.values())
    more = [layer for layer in reversed(range(len(kinds))) if layer not in first]
    return sorted([*sorted(first), *more][:LAYERS])


def _merged(settings: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    both = dict(settings)
    for name, value in more.items():
        inner = isinstance(value, dict) and isinstance(both.get(name), dict)
        both[name] = _merged(both[name], value) if inner else value
    return both


def section() -> str:
    """What works with which type, as docs/architectures.md says it."""
    types = decoder_only_types()
    fast = [name for name in types if name not in {**NO_TINY_MODEL, **NO_BLOCKS, **NO_ENGINE}]
    lines = [
        f"Of the {len(types)} decoder-only types of transformers {transformers.__version__}, as `python -m tests.every_type` lists them:",
        "",
        f"- **Positions and engine** ({len(fast)}): {', '.join(fast)}.",
        f"- **Positions; each step computes the whole model** ({len(NO_ENGINE)}): {_with_reasons(NO_ENGINE)}.",
        f"- **Nothing, since the list of blocks is not plain to see** ({len(NO_BLOCKS)}): {_with_reasons(NO_BLOCKS)}.",
        f"- **Not tested** ({len(NO_TINY_MODEL)}): {_with_reasons(NO_TINY_MODEL)}.",
    ]
    return "\n".join(line for text in lines for line in textwrap.wrap(text, 130, subsequent_indent="  ") or [""])


def _with_reasons(reasons: Mapping[str, str]) -> str:
    return "; ".join(f"{name} ({reason})" for name, reason in sorted(reasons.items()))


if __name__ == "__main__":
    print(section())
