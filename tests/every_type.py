"""Every causal-LM type of the installed transformers with a configuration small enough to build in milliseconds."""

import re
from typing import Any

from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

from locft.model.models import _loader

VOCABULARY = 400
LAYERS = 4

_SMALL: tuple[tuple[str, int], ...] = (
    (r".*(token_id|token_index|_index|_index_.*|mask_token)", -1),
    (r"vocab_size.*|.*_vocab_size|.*vocab_size_per_layer_input", VOCABULARY),
    (r"max_position_embeddings|n_positions|n_ctx|max_seq_len|.*_positions|context_length|model_max_length", 256),
    (r"moe_intermediate_size|expert_ffn_hidden_size|.*shared.*intermediate_size", 24),
    (r".*intermediate_size.*|ffn_dim|.*_ffn_dim|ffn_hidden_size|n_inner|d_inner|d_ff|dff|dim_ff|feed_forward_size|mlp_dim", 48),
    (r"hidden_size_per_layer_input|ple_embed_dim", 16),
    (r"(.*_)?hidden_size(_global)?|d_model|n_embd|emb_dim|embedding_dim|.*embed(ding)?_(dim|size)|word_embed_proj_dim|lru_width|mamba_d_ssm|dim_model|.*_output_dim|projector_.*_dim|out_hidden_size", 32),
    (r".*num_layers|num_hidden_layers|n_layers?|.*_layers|depth|num_blocks|num_layers_per_stack|num_global_layers", LAYERS),
    (r".*(num_key_value_heads|n_kv_heads|num_kv_heads|num_query_groups|kv_n_heads|linear_num_key_heads)", 2),
    (r".*num_attention_heads|num_heads|n_heads?|.*attention_heads|index_n_heads|linear_num_(value_)?heads|(n_)?mamba_(n_|num_)?heads", 4),
    (r".*head_?dim|d_head|d_kv|dim_head|kv_channels|attention_head_size|mamba_d_head|qk_nope_head_dim", 8),
    (r".*(q|kv|o|v|k)_lora_rank|.*_rank|hc_lowrank|d_rel", 8),
    (r"rotary_dim", 4),
    (r"(.*_)?(num|n|num_local|num_routed|moe_num|n_routed)_experts|zero_expert_num", 4),
    (r"(num|moe_num|n)_shared_experts", 1),
    (r"n_groups?|num_expert_group|topk_group|mamba_n_?groups|o_groups|n_group", 1),
    (r".*experts_per_tok(en)?|moe_top_?k|moe_k|top_?k.*", 2),
    (r"(mamba_)?chunk_size|.*state_size|mamba_d_state|block_size", 8),
    (r"index_topk", 4),
    (r"sliding_window(_size)?|window_size|local_attention|attention_window_size", 6),
)


def tiny(model_type: str) -> PreTrainedModel:
    config = tiny_config(model_type)
    return _loader(config).from_config(config)

ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_GEMMA3N = dict(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 2)
_QSA = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2, ngram_vocab_size_base=50, split_ngram_parts=1)
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": dict(mamba_n_heads=8, mamba_d_head=8),
    "granitemoehybrid": dict(mamba_n_heads=8, mamba_d_head=8),
    "mamba2": dict(num_heads=8, head_dim=8),
    "dots3_note_text": dict(num_key_value_heads=4),
    "cohere_compass_text": dict(rope_parameters={"full_attention": ROPE, "sliding_attention": ROPE}),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2),
    "longcat_flash": dict(qk_head_dim=16, head_dim=8),
    "dbrx": dict(attn_config=dict(rope_theta=10000.0, kv_n_heads=2, clip_qkv=8.0)),
    "gpt_neo": dict(attention_types=[[["global", "local"], 2]], num_layers=4),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(layer_types=["conv", "full_attention"] * 2, num_hidden_layers=4),
    "ministral": dict(head_dim=8),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "reformer": dict(is_decoder=True, axial_pos_embds=False),
    "gemma3n_text": _GEMMA3N,
    "gemma3n": dict(text_config=_GEMMA3N),
    "zamba": dict(attention_hidden_size=64, attention_head_dim=16, num_hidden_layers=4, layers_block_type=["mamba", "hybrid", "mamba", "hybrid"]),
    "qwen4_exp_text": _QSA,
    "qwen4_exp": dict(text_config=_QSA),
    "dots3_note": dict(text_config=dict(num_key_value_heads=4), audio_config=dict(adapter_out_dim=32, adapter_in_dim=32), vision_config=dict(adapter_out_dim=32, adapter_in_dim=32, adapter_input_size=32)),
}
def tiny_config(model_type: str) -> PretrainedConfig:
    kind = CONFIG_MAPPING[model_type]
    base = OVERRIDES.get(model_type, {})
    try:
        start = kind()
    except Exception:
        start = kind(**base)
    return kind(**merged(shrunk(start), base))


def merged(one, two):
    both = dict(one)
    for k, v in two.items():
        both[k] = merged(one[k], v) if isinstance(v, dict) and isinstance(one.get(k), dict) else v
    return both


def shrunk(config: PretrainedConfig, path: str = "") -> dict[str, Any]:
    settings: dict[str, Any] = {}
    known = set(type(config).__dataclass_fields__)
    own = {name: value for name, value in vars(config).items() if name in known and name not in PretrainedConfig.__dataclass_fields__}
    depth = next((own[n] for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks") if isinstance(own.get(n), int)), 0)
    lists = {n: v for n, v in own.items() if isinstance(v, list | tuple) and depth > 1 and len(v) == depth}
    chosen = picks(list(zip(*lists.values())), depth) if lists else []
    for name, value in own.items():
        if isinstance(value, PretrainedConfig):
            settings[name] = shrunk(value)
        elif name in lists:
            settings[name] = [small(name, value[i]) for i in chosen]
        elif isinstance(value, int) and not isinstance(value, bool):
            settings[name] = small(name, value)
    if chosen:
        for n in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"):
            if n in own:
                settings[n] = len(chosen)
    for n in own:
        if n.endswith(("token_id", "token_index")) and isinstance(own[n], int):
            settings[n] = 0 if n in ("pad_token_id", "eos_token_id", "bos_token_id", "sep_token_id") else VOCABULARY - 1
    for n in ("pad_token_id", "eos_token_id", "bos_token_id"):
        if getattr(config, n, None) is not None:
            settings[n] = 0
    if "kv_lora_rank" in own:  # latent attention has a key per query
        settings["num_key_value_heads"] = 4
    if "is_decoder" in known:
        settings["is_decoder"] = True
    return settings


def picks(signatures, depth):
    signatures = [str(s) for s in signatures]
    first = sorted({s: i for i, s in reversed(list(enumerate(signatures)))}.values())[:LAYERS]
    extra = [i for i in range(depth) if i not in first]
    while len(first) < min(LAYERS, depth) and extra:
        first.append(extra.pop())
    return sorted(first)


def small(name, value):
    if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
        return value
    for pattern, number in _SMALL:
        if re.fullmatch(pattern, name):
            return value if number < 0 else min(value, number)
    return value
