"""The parts of blocks that nobody listed: told by shapes and names, or left out."""

import pytest
import torch
from torch import nn

from locft.model.structure import parts_of

D, F = 32, 48


def block(**shapes: tuple[int, ...]) -> nn.Module:
    """A block with a linear module of shape (out, in) at each path; "__" stands for a dot. Three numbers are a stack."""
    root = nn.Module()
    for path, shape in shapes.items():
        *parents, name = path.split("__")
        owner = root
        for parent in parents:
            if not hasattr(owner, parent):
                owner.add_module(parent, nn.Module())
            owner = owner.get_submodule(parent)
        if len(shape) == 2:
            owner.add_module(name, nn.Linear(shape[1], shape[0], bias=False, device="meta"))
        else:
            owner.register_parameter(name, nn.Parameter(torch.empty(*shape, device="meta")))
    return root


def found(**shapes: tuple[int, ...]) -> dict[str, str]:
    return {module: " ".join(paths) for module, paths in parts_of(block(**shapes), D).items()}


MLP = dict(mlp__up_proj=(F, D), mlp__down_proj=(D, F))
MLP_FOUND = dict(mlp="mlp", mlp_up="mlp.up_proj", mlp_down="mlp.down_proj")


@pytest.mark.parametrize("inner", [F, D, 2 * D])
@pytest.mark.parametrize("keys", [16, D])
def test_the_names_of_the_first_llama(inner, keys):
    """Whatever the sizes: where all matrices are square, names tell."""
    shapes = dict(
        attention__wq=(D, D), attention__wk=(keys, D), attention__wv=(keys, D), attention__wo=(D, D),
        feed_forward__w1=(inner, D), feed_forward__w2=(D, inner), feed_forward__w3=(inner, D),
    )  # fmt: skip
    assert found(**shapes) == dict(
        attn="attention", attn_q="attention.wq", attn_k="attention.wk", attn_v="attention.wv", attn_o="attention.wo",
        mlp="feed_forward", mlp_gate="feed_forward.w1", mlp_down="feed_forward.w2", mlp_up="feed_forward.w3",
    )  # fmt: skip


def test_other_conventions():
    assert found(attn__to_q=(D, D), attn__to_kv=(2 * D, D), attn__to_out__0=(D, D), ff__net__0=(F, D), ff__net__2=(D, F)) == dict(
        attn="attn", attn_q="attn.to_q", attn_kv="attn.to_kv", attn_o="attn.to_out.0",
        mlp="ff", mlp_up="ff.net.0", mlp_down="ff.net.2",
    )  # fmt: skip
    assert found(attn__in_proj=(3 * D, D), attn__proj=(D, D), fc1=(F, D), fc2=(D, F)) == dict(
        attn="attn", attn_qkv="attn.in_proj", attn_o="attn.proj", mlp="fc2 fc1", mlp_up="fc1", mlp_down="fc2"
    )
    inline = found(q_proj=(D, D), k_proj=(16, D), v_proj=(16, D), out_proj=(D, D), **MLP)
    assert (
        inline["attn_o"] == "out_proj" and inline["attn"] == "q_proj k_proj v_proj out_proj" and inline["mlp"] == "mlp"
    )


def test_experts_in_a_list_beside_a_shared_one():
    expert = {
        f"moe__experts__{i}__{name}": shape
        for i in (0, 1)
        for name, shape in (("w1", (24, D)), ("w2", (D, 24)), ("w3", (24, D)))
    }
    assert found(moe__router=(2, D), moe__shared_expert__w1=(F, D), moe__shared_expert__w2=(D, F), **expert) == dict(
        mlp="moe", router="moe.router", shared_up="moe.shared_expert.w1", shared_down="moe.shared_expert.w2",
        experts_down="moe.experts.0.w2 moe.experts.1.w2",
        experts_gate_up="moe.experts.0.w1 moe.experts.0.w3 moe.experts.1.w1 moe.experts.1.w3",
    )  # fmt: skip


def test_experts_in_the_block_itself():
    parts = found(
        **MLP,
        input_gate=(16, D),
        router__proj=(4, D),
        experts__gate_up_proj=(4, 2 * F, D),
        experts__down_proj=(4, D, F),
    )
    assert parts == MLP_FOUND | dict(
        mlp="mlp experts router", router="router",
        experts_down="experts.down_proj", experts_gate_up="experts.gate_up_proj",
    )  # fmt: skip


def test_linear_attention_is_a_mixer():
    shapes = dict(
        self_attn__q_proj=(D, D), self_attn__k_proj=(D, D), self_attn__v_proj=(D, D), self_attn__o_proj=(D, D)
    )
    linear = parts_of(block(**shapes), D, "linear_attention")
    assert linear["mixer_out"] == ("self_attn.o_proj",) and len(linear["mixer_in"]) == 3 and "attn" not in linear
    assert parts_of(block(**shapes), D, "sliding_attention")["attn_k"] == ("self_attn.k_proj",)
    assert found(mamba__in_proj=(4 * D, D), mamba__out_proj=(D, 2 * D)) == dict(
        mixer="mamba", mixer_in="mamba.in_proj", mixer_out="mamba.out_proj"
    )


def test_what_only_looks_like_a_part():
    """An MLP in a norm, adapters, low-rank residuals, attention to another model, an indexer with its own projections."""
    assert found(**MLP, norm__mlp__fc1=(8, D), norm__mlp__fc2=(D, 8)) == MLP_FOUND
    assert found(**MLP, adapter__down=(8, D), adapter__up=(D, 8)) == MLP_FOUND
    assert found(**MLP, laurel__left=(8, D), laurel__right=(D, 8), gate=(16, D), projection=(D, 16)) == MLP_FOUND
    cross = {f"cross_attn__{name}_proj": (D, D) for name in "qkvo"}
    assert found(**MLP, **cross) == MLP_FOUND
    assert found(**MLP, attention_input__in_proj=(8, D), attention_input__out_proj=(D, 8)) == MLP_FOUND
    own = {f"attn__{name}_proj": (D, D) for name in "qkvo"}
    indexed = found(**own, attn__indexer__wq=(8, D), attn__indexer__wk=(8, D))
    assert indexed["attn_q"] == "attn.q_proj" and indexed["attn_k"] == "attn.k_proj"


@pytest.mark.parametrize(
    "shapes",
    [
        dict(a=(D, D), b=(D, D)),  # square: which leads back?
        dict(a__x=(F, D), a__y=(16, D), a__z=(16, D), a__u=(D, F)),  # attention or an MLP?
        dict(a__keys=(F, D), a__values=(F, D)),
        dict(a__x=(F, D), a__y=(D, 16)),
        dict(a__x=(F, D), a__y=(D, F), b__x=(F, D), b__y=(D, F)),  # two, and no name
        dict(embedding=(7, 5)),
    ],
)
def test_in_doubt_nothing(shapes):
    assert found(**shapes) == {}


def test_a_gate_that_nothing_names_is_left_out():
    assert found(mlp__a=(F, D), mlp__b=(F, D), mlp__c=(D, F)) == dict(mlp="mlp", mlp_down="mlp.c")
