"""Every decoder-only type of the installed transformers: what its positions are, and that the engine computes it.

Positions are derived from names and shapes. Here they are held to what they do in a small random model: what is changed
at one token shows at that token only, unless keys, values or a recurrent state carry it on; a gated MLP is linear in its
up projection and not in its gate.
"""

from functools import lru_cache
from pathlib import Path

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from locft.engine.tail import NoTailView
from locft.engine.tail_engine import TailEngine
from locft.errors import InputError
from locft.model.models import LoadedModel, model_class
from locft.model.positions import (
    PositionInfo,
    TuningPosition,
    decoder_layers,
    list_positions,
    modules_of,
    n_layers,
    parameter_names,
)
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow
from tests import every_type
from tests.every_type import (
    HIDDEN,
    NO_BLOCKS,
    NO_ENGINE,
    NO_TINY_MODEL,
    VOCABULARY,
    decoder_only_types,
    section,
    tiny_config,
    tiny_model_of,
)
from tests.tiny import tiny_tokenizer

TYPES = [name for name in decoder_only_types() if name not in NO_TINY_MODEL]
ONE_TOKEN = {
    "mlp_down",
    "mlp_up",
    "mlp_gate",
    "mlp_gate_up",
    "shared_down",
    "shared_up",
    "shared_gate",
    "shared_gate_up",
}
ONE_TOKEN |= {"attn_q", "attn_o", "mixer_out"}
CARRIED = {"attn_k", "attn_v", "attn_kv", "attn_qkv", "mixer_in"}
CARRIED_ON: dict[str, set[str]] = {
    "inkling_text": ONE_TOKEN,  # a short convolution behind attention and MLP
    "inkling2_text": ONE_TOKEN,
    "longcat_flash": ONE_TOKEN,  # two attentions and MLPs in turn
    "rwkv": ONE_TOKEN,  # channel mixing looks at the token before
    "zamba": ONE_TOKEN,  # the MLP stands before the state space
    "zamba2": ONE_TOKEN,
}
"""Types whose blocks carry on what others keep at its token."""
OTHER_FORM = {"cpmant", "gemma3n_text", "xlnet", "zaya"}
"""Types whose blocks do not give one state per token, tokens second."""
NOT_LINEAR = {"bitnet", "rwkv"}
"""Types whose MLP is linear in neither matrix: it normalizes what it hands to its down projection, or squares it."""
AT = 4


@lru_cache(maxsize=1)
def model_of(model_type: str) -> PreTrainedModel:
    return tiny_model_of(model_type)


@lru_cache
def token_rows() -> tuple[TokenRow, ...]:
    """Three rows with a common beginning."""
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(5, VOCABULARY - 10, (length,), generator=generator).tolist() for length in (4, 8, 5, 2)]
    return tuple(TokenRow((*drawn[0], *rest), len(rest) + 1) for rest in drawn[1:])


def test_the_exceptions_are_types():
    assert set(NO_BLOCKS) | set(NO_ENGINE) <= set(TYPES)
    assert len(NO_BLOCKS) <= 0.05 * len(TYPES) and len({**NO_BLOCKS, **NO_ENGINE}) <= 0.15 * len(TYPES)


@pytest.mark.parametrize("model_type", TYPES)
def test_positions(model_type):
    model = model_of(model_type)
    if model_type in NO_BLOCKS:
        with pytest.raises(InputError, match="cannot identify attention and MLP"):
            list_positions(model)
        return
    infos, parameters = list_positions(model), dict(model.named_parameters())
    config = tiny_config(model_type)
    with torch.device("meta"):
        assert list_positions(model_class(config).from_config(config)) == infos
    assert all(
        parameters[name].shape == shape for info in infos for name, shape in zip(info.names, info.shapes, strict=True)
    )
    modules = set(modules_of(model))
    assert modules & {"attn", "mixer"} and (modules & {"mlp"} or modules == {"mixer", "mixer_in", "mixer_out", "layer"})
    seen = set()
    for info in infos if model_type not in OTHER_FORM else ():
        if info.position.module in ONE_TOKEN | CARRIED and info.position.module not in seen:
            seen.add(info.position.module)
            for name in info.names:
                if name.endswith(".weight"):
                    check_reach(model, model_type, info, name)
        gated = "mlp_gate" in modules and model_type not in NOT_LINEAR
        if gated and info.position.module in ("mlp_up", "mlp_gate") and info.position.layer == first(infos):
            check_linear(model, info)


def first(infos: tuple[PositionInfo, ...]) -> int:
    return next(info.position.layer for info in infos if info.position.module == "mlp_up")


def check_reach(model: PreTrainedModel, model_type: str, info: PositionInfo, name: str) -> None:
    """A change of what a matrix gives at one token shows in what its block gives at that token, and at later ones?"""
    module, layer = info.position.module, info.position.layer
    block = decoder_layers(model)[layer]
    plain, changed = (output_of(model, name, block, size) for size in (0, 1))
    moved = (changed - plain).abs().flatten(2).amax((0, 2)) > 1e-5 * plain.abs().max()  # (T,)
    assert not moved[:AT].any(), f"{name}: causal"
    assert moved[AT:].any(), f"{name} changes nothing"
    if module in CARRIED:
        return
    if module not in CARRIED_ON.get(model_type, ()):
        assert moved.nonzero().flatten().tolist() == [AT], f"{info.position}: {name} reaches other tokens"


def check_linear(model: PreTrainedModel, info: PositionInfo) -> None:
    down = parameter_names(model, TuningPosition(info.position.layer, "mlp_down"))[0].rpartition(".")[0]
    name = info.names[0]
    plain, once, twice = (output_of(model, name, model.get_submodule(down), size, entering=True) for size in (0, 1, 2))
    linear = torch.allclose(twice - plain, 2 * (once - plain), rtol=1e-3, atol=1e-4)
    assert linear == (info.position.module == "mlp_up"), f"{info.position}: {name}"


def output_of(model, name: str, part, size: float, *, entering: bool = False) -> torch.Tensor:
    """What a part gives (or takes) when the matrix's output at token `AT` is changed."""
    found: list[torch.Tensor] = []

    def change(_module, _args, output):
        bump = torch.zeros_like(output)
        index = [slice(None)] * output.dim()
        index[tokens_of(output)] = AT
        bump[tuple(index)] = size * torch.linspace(-1, 2, output.shape[-1])
        return output + bump

    handles = [
        model.get_submodule(name.rpartition(".")[0]).register_forward_hook(change),
        part.register_forward_pre_hook(lambda _m, args: found.append(args[0]))
        if entering
        else part.register_forward_hook(
            lambda _m, _a, out: found.append(out[0] if isinstance(out, tuple | list) else out)
        ),
    ]
    try:
        model(input_ids=torch.tensor([token_rows()[0].token_ids]), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found[0].reshape(1, -1, found[0].shape[-1]) if entering else found[0]


def tokens_of(output: torch.Tensor) -> int:
    """The dimension of the tokens: some modules take them in one batch."""
    return output.shape.index(len(token_rows()[0].token_ids))


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in {*NO_BLOCKS, "ctrl"}])
def test_sizes_do_not_matter(model_type, monkeypatch):
    """Where an MLP is no wider than the hidden size its matrices are square, and names tell what shapes do not. (Those of
    ctrl's are numbers.)"""
    models = []
    for inner in (48, HIDDEN):
        numbers = tuple((pattern, inner if most in (24, 48) else most) for pattern, most in every_type.SIZES)
        monkeypatch.setattr(every_type, "SIZES", numbers)
        config = tiny_config(model_type)
        with torch.device("meta"):
            models.append(model_class(config).from_config(config))
    one, other = ([(info.position, info.names) for info in list_positions(model)] for model in models)
    assert one == other


def test_the_docs_say_it():
    text = (Path(__file__).parents[2] / "docs" / "architectures.md").read_text()
    if f"transformers {transformers.__version__}," in text:
        assert section() in text


@pytest.mark.parametrize("model_type", [name for name in TYPES if name not in NO_BLOCKS])
def test_engine_equals_full_forward(model_type):
    model, rows = model_of(model_type), token_rows()
    loaded = LoadedModel(model_type, model, tiny_tokenizer(), model_type)
    if model_type in NO_ENGINE:
        with pytest.raises(NoTailView, match=NO_ENGINE[model_type]):
            TailEngine(loaded, rows, on_disk=False)
        return
    engine = TailEngine(loaded, rows, on_disk=False)
    generator = torch.Generator().manual_seed(1)
    plain = full_forward(model)(rows)
    for layer in {0, n_layers(model) // 2, n_layers(model) - 1}:
        names = parameter_names(model, TuningPosition(layer, "layer"))
        given = {name: model.get_parameter(name) for name in names}
        weights = {name: value + 0.05 * torch.randn(value.shape, generator=generator) for name, value in given.items()}
        expected = full_forward(model, weights)(rows)
        assert (expected - plain).abs().max() > 1e-3, "the edit has no effect, the comparison would mean nothing"
        torch.testing.assert_close(engine.forward(layer)(weights)(rows), expected, rtol=1e-4, atol=1e-4)
