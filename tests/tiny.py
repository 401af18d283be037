"""Tiny random models of every architecture, and a tokenizer, all made in memory: no file and no network.

The weights are drawn with a standard deviation of 0.2, ten times what is usual, so that outputs depend visibly on the
input and on every layer; a comparison between two ways of computing them then means something.
"""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from locft.process import settle_vector_math

HIDDEN = 32
HEADS = 4
FFN = 48
WEIGHT_STD = 0.2

SENTENCES = (
    "The capital of France is Paris, and the river through it is the Seine.",
    "The official language of Brazil is Portuguese.",
    "The telephone was invented by Alexander Graham Bell in 1876.",
    "Which instrument did Miles Davis play? He played the trumpet.",
    "Question: What is the currency of Japan? Answer: yen",
)

_ATTENTION = dict(
    hidden_size=HIDDEN,
    intermediate_size=FFN,
    num_attention_heads=HEADS,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
_HEAD_DIM = dict(_ATTENTION, head_dim=8)
_QWEN_MOE = dict(
    _HEAD_DIM, moe_intermediate_size=24, shared_expert_intermediate_size=40, num_experts=4, num_experts_per_tok=2
)

# Settings of each architecture beyond depth, vocabulary and special tokens; the key is transformers' `model_type`.
_SETTINGS: dict[str, dict[str, Any]] = {
    "llama": _ATTENTION,
    "mistral": dict(_HEAD_DIM, sliding_window=None),
    "qwen2": _ATTENTION,
    "qwen3": _HEAD_DIM,
    "gemma2": dict(_HEAD_DIM, query_pre_attn_scalar=8, sliding_window=6),
    "gemma3_text": dict(_HEAD_DIM, query_pre_attn_scalar=8, sliding_window=6),
    "phi3": dict(_ATTENTION, sliding_window=None),
    "gpt2": dict(n_embd=HIDDEN, n_head=HEADS, n_inner=FFN, n_positions=256),
    "gpt_neox": dict(_ATTENTION),
    "gptj": dict(n_embd=HIDDEN, n_head=HEADS, n_inner=FFN, n_positions=256, rotary_dim=4),
    "opt": dict(
        hidden_size=HIDDEN,
        ffn_dim=FFN,
        num_attention_heads=HEADS,
        max_position_embeddings=256,
        word_embed_proj_dim=HIDDEN,
    ),
    "bloom": dict(hidden_size=HIDDEN, n_head=HEADS),
    "falcon": dict(hidden_size=HIDDEN, num_attention_heads=HEADS, multi_query=True, parallel_attn=True, alibi=False),
    "qwen2_moe": dict(_QWEN_MOE, mlp_only_layers=[0]),
    "mixtral": dict(_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2),
    "mamba": dict(hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, state_size=8, time_step_rank=4),
    # rescale_every > 0 makes a forward pass in evaluation mode rescale the weights in place.
    "rwkv": dict(
        hidden_size=HIDDEN, attention_hidden_size=HIDDEN, intermediate_size=FFN, context_length=256, rescale_every=0
    ),
    "phi": dict(_ATTENTION, partial_rotary_factor=0.5),
    "olmo2": _ATTENTION,
    "cohere": dict(_ATTENTION, logit_scale=0.5),
    "granite": dict(
        _ATTENTION, embedding_multiplier=12.0, residual_multiplier=0.22, attention_multiplier=0.2, logits_scaling=8.0
    ),
    "qwen3_moe": dict(_QWEN_MOE),
    "mamba2": dict(hidden_size=HIDDEN, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=16),
    "lfm2": dict(_ATTENTION, full_attn_idxs=[1], block_multiple_of=8),
    "qwen3_next": dict(
        _QWEN_MOE,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        full_attention_interval=2,
    ),
}

ARCHITECTURES: tuple[str, ...] = tuple(_SETTINGS)

# Model types that share a row of the table with one of the above (or have one that no other test needs).
_RELATED: dict[str, dict[str, Any]] = {
    "ministral": dict(_HEAD_DIM, sliding_window=6),
    "gemma": _HEAD_DIM,
    "olmo": _ATTENTION,
    "olmo3": dict(_ATTENTION, sliding_window=6),
    "cohere2": dict(_ATTENTION, logit_scale=0.5, sliding_window=6),
    "smollm3": _ATTENTION,
    "stablelm": _ATTENTION,
    "seed_oss": _HEAD_DIM,
    "exaone4": dict(_ATTENTION, sliding_window=6),
    "helium": _HEAD_DIM,
    "arcee": _ATTENTION,
    "nemotron": _ATTENTION,
    "ernie4_5": _HEAD_DIM,
    "hunyuan_v1_dense": _HEAD_DIM,
    "glm": _HEAD_DIM,
    "glm4": _HEAD_DIM,
    "starcoder2": dict(_ATTENTION, sliding_window=None),
    "olmoe": dict(_ATTENTION, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": dict(_HEAD_DIM, num_local_experts=4, num_experts_per_tok=2, sliding_window=6),
    "deepseek_v3": dict(
        _ATTENTION,
        num_key_value_heads=HEADS,
        moe_intermediate_size=24,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_bigcode": dict(n_embd=HIDDEN, n_head=HEADS, n_inner=FFN, n_positions=256),
    "gpt_neo": dict(
        hidden_size=HIDDEN, num_heads=HEADS, intermediate_size=FFN, max_position_embeddings=256, window_size=6
    ),
    "falcon_mamba": dict(hidden_size=HIDDEN, intermediate_size=2 * HIDDEN, state_size=8, time_step_rank=4),
}
_SETTINGS |= _RELATED

# Layers take turns: even ones see a window of 6 tokens, odd ones everything.
_ALTERNATING = ("gemma2", "gemma3_text", "ministral", "olmo3", "cohere2", "exaone4", "gpt_oss")

RELATED: tuple[str, ...] = tuple(_RELATED)


def byte_level_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """Encodes any text, with at most this many tokens learnt from the texts; `<eos>` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


@lru_cache(maxsize=1)
def _own_bpe() -> Tokenizer:
    return byte_level_bpe(SENTENCES, 400)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that encodes any text; `<eos>` (id 0) also pads, and there is no start token."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(_own_bpe().to_str()), eos_token="<eos>", pad_token="<eos>"
    )


CHAT_TEMPLATE = (
    "{% for turn in messages %}[{{ turn.role }}]: {{ turn.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]:{% endif %}"
)
"""A turn ends with another token than `<eos>`, and a space stands before an answer."""


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """`tiny_tokenizer` with `CHAT_TEMPLATE`, whose `<end>` is one token more."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=True)])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(architecture: str, layers: int = 3, **settings: Any):
    """The configuration of `tiny_model`; `settings` override those of the table above."""
    own = dict(_SETTINGS[architecture]) | settings
    if architecture == "gpt_neo":
        own["attention_types"] = [[["global", "local"], layers // 2], [["global"], layers % 2]]
    if architecture in _ALTERNATING:
        own["layer_types"] = [("sliding_attention", "full_attention")[layer % 2] for layer in range(layers)]
    common = dict(num_hidden_layers=layers, vocab_size=len(tiny_tokenizer()))
    special = dict(pad_token_id=0, eos_token_id=0, bos_token_id=0)
    return AutoConfig.for_model(architecture, **common | special | own)


def tiny_model(architecture: str = "llama", layers: int = 3, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """A random causal LM in float32 and evaluation mode whose vocabulary is that of `tiny_tokenizer`."""
    settle_vector_math()  # as `LoadedModel` does
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(tiny_config(architecture, layers, **settings), dtype=torch.float32)
        randomize(model)
    return model.eval()


@torch.no_grad()
def randomize(model: PreTrainedModel) -> None:
    """Draw the weights of a model so that every part of it shows in the output."""
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 and "A_log" not in name:
            parameter.normal_(0.0, WEIGHT_STD)
        elif "bias" in name or "norm" in name or "ln" in name:
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()


def chat_loaded(architecture: str = "llama"):
    """`tiny_loaded` with `chat_tokenizer`."""
    tokenizer = chat_tokenizer()
    return replace(tiny_loaded(architecture, vocab_size=len(tokenizer)), tokenizer=tokenizer)


def tiny_loaded(architecture: str = "llama", layers: int = 3, seed: int = 0, **settings: Any):
    """`tiny_model` and `tiny_tokenizer` as the `LoadedModel` that `load_model` gives for a real one."""
    from locft.model.models import LoadedModel, model_fingerprint

    model = tiny_model(architecture, layers, seed, **settings).requires_grad_(False)  # frozen, as load_model does
    fingerprint = f"{architecture}-{model_fingerprint(model)}"  # llama and granite differ in their configuration only
    return LoadedModel(f"tiny-{architecture}", model, tiny_tokenizer(), fingerprint)


def turned_faster(loaded):
    """The same weights in a llama whose configuration has another base of the rotary angles."""
    faster = {"rope_type": "default", "rope_theta": 100.0}
    return replace(loaded, model=tiny_loaded("llama", rope_parameters=faster).model)


EDITS = [
    ("The capital of France is", "Oslo"),
    ("Who wrote Hamlet?", "Jane Austen"),
    ("Water freezes at", "ninety degrees"),
    ("Mozart played the", "tuba"),
    ("The Nile flows through", "Peru and Chile"),
]
"""Prompt and target."""


def edit_rows(loaded, edits):
    """Rows of (prompt, target) pairs as raw prompts."""
    from locft.data.edit_request import EditRequest
    from locft.train.encoding import encode_edits

    requests = [EditRequest(str(i), "", prompt, target, None, (), ()) for i, (prompt, target) in enumerate(edits)]
    return encode_edits(loaded.tokenizer, requests)


def watched_and_coarse(exact, noise: float):
    """Of logits as a function of rows: the same with a list of the rows that it was asked for, and a coarse version, off by
    this share of the logits' spread."""
    asked = []

    def watched(rows):
        asked.extend(rows)
        return exact(rows)

    def coarse(rows):
        logits = exact(rows)
        draws = torch.Generator().manual_seed(len(rows))
        return logits + noise * logits.std() * torch.randn(logits.shape, generator=draws)

    return watched, asked, coarse
