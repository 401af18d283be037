"""Models whose greedy answers are known: in the most exact type, or by a script.

Padded and unpadded batches round differently, so a near-tie between two tokens may rightly go either way. Models that are
compared with another way of computing them are therefore float64, where it would take a tie to 1e-15. Some architectures
have no float64 in transformers; they run in float32, and the test makes sure that its own answers come near no tie.
"""

import torch
from transformers import AutoModelForCausalLM

from locft.model.models import LoadedModel
from tests.tiny import tiny_config, tiny_loaded, tiny_tokenizer

EOS = 0
PROMPTS = [
    "The capital of France is",
    "Who?",
    "Question: What is the currency of Japan, and which river flows through its capital? Answer:",
    "x",
    "Mozart played the",
    "The official language of Brazil is Portuguese. The official language of",
    "Äpfel 🎺",
    "Mozart played thy",
    "y",
]
"""Of several lengths, some of the same."""

SINGLE = {
    "gemma2": "padded float64 rows give NaN: the mask's lowest float64 becomes -inf in a float32 softmax",
    "bloom": "as gemma2",
    "qwen2_moe": "the experts' grouped product knows no float64",
    "qwen3_moe": "as qwen2_moe",
    "qwen3_next": "as qwen2_moe",
    "mixtral": "as qwen2_moe",
}
"""Architectures that cannot run in float64, and why."""


def exact_model(architecture: str, **settings) -> LoadedModel:
    """A tiny model in the most exact type that it runs in."""
    loaded = tiny_loaded(architecture, **settings)
    if architecture not in SINGLE:
        loaded.model.double()
    return loaded


def scripted(*pieces: str | int, eos: int | list[int] = 0, tokenizer=None) -> LoadedModel:
    """A model that says the given texts and tokens behind a prompt of one token, then "~" for ever.

    A GPT-2 with nothing but position embeddings: what it predicts at a position is what the script has there.
    """
    tokenizer, size = tokenizer or tiny_tokenizer(), 160
    tokens = [id_ for piece in pieces for id_ in ([piece] if isinstance(piece, int) else tokenizer(piece)["input_ids"])]
    filler = tokenizer("~")["input_ids"]
    config = tiny_config(
        "gpt2", 1, n_embd=size, n_positions=size, n_inner=8, tie_word_embeddings=False, vocab_size=len(tokenizer)
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "ln_f" not in name:
            parameter.zero_()
    model.transformer.wpe.weight.copy_(torch.eye(size))
    for position in range(size):
        token = tokens[position] if position < len(tokens) else filler[0]
        model.lm_head.weight[token, position] = 1.0
    model.generation_config.eos_token_id = eos
    return LoadedModel("scripted", model, tokenizer, "scripted")
