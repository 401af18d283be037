"""The names of modules, and the architectures whose parts are listed because their structure does not show them.

The parts of a block are derived by `structure.py`. A row here overrides what is derived. A part is a path inside the
block: a submodule ("mlp.down_proj": its weight and, if it has one, its bias) or a parameter ("mlp.experts.down_proj").
Paths are compared whole, component by component; nothing is ever matched as a substring. A part that a layer lacks is a
module that this layer does not have.
"""

from collections.abc import Mapping

# fmt: off
MODULES: tuple[str, ...] = (
    "mlp_down", "mlp_up", "mlp_gate", "mlp_gate_up", "mlp",
    "shared_down", "shared_up", "shared_gate", "shared_gate_up", "experts_down", "experts_gate_up", "router",
    "attn_q", "attn_k", "attn_v", "attn_kv", "attn_qkv", "attn_o", "attn", "mixer_in", "mixer_out", "mixer", "layer",
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
    "shared_up": ("shared_gate_up", "mlp_up", "mlp_gate_up", "experts_gate_up"),
    "shared_gate": ("shared_gate_up", "mlp_gate", "mlp_gate_up", "experts_gate_up"),
    "shared_gate_up": ("shared_up", "mlp_gate_up"),
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
"""Modules to suggest in place of one that an architecture does not have, nearest first."""


FAMILIES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    # Time mixing takes the place of attention, with receptance as the query. Channel mixing takes the place of the MLP:
    # receptance gates its output, key leads to the inner size and value back.
    "rwkv": {
        "mlp": ("feed_forward",),
        "mlp_down": ("feed_forward.value",),
        "mlp_up": ("feed_forward.key",),
        "mlp_gate": ("feed_forward.receptance",),
        "attn": ("attention",),
        "attn_q": ("attention.receptance",),
        "attn_k": ("attention.key",),
        "attn_v": ("attention.value",),
        "attn_o": ("attention.output",),
    },
}
"""`config.model_type` (of the whole model or of its text half) -> module -> paths inside a block whose parameters make it up,
for models whose structure and names do not show their parts, or show them wrongly. "layer" always exists and is not
listed."""
