"""Where a model can be tuned: a layer and a module in it, resolved to exact parameter names.

A position trains the parameters of exactly the named part: weight and bias of a projection, everything inside the
attention or MLP block, or the whole layer with its norms. Names are built from the table in `families.py` and the
layer's own path, so "1.mlp_down" never touches layers 10 to 19, as a substring test would.

Everything here reads names and shapes only and works on models on the meta device.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from difflib import get_close_matches
from math import prod
from typing import cast

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from locft.errors import InputError
from locft.model.families import BY_MODEL_TYPE, MODULES, STANDS_IN, TEXT_HALVES, Family


@dataclass(frozen=True, order=True)
class TuningPosition:
    """A place to tune, written "22.mlp_down"."""

    layer: int
    """0 is the first."""
    module: str
    """One of `families.MODULES`."""

    @classmethod
    def parse(cls, text: str) -> "TuningPosition":
        """From "22.mlp_down". Raises InputError if the text has another form or names no known module."""
        match = re.fullmatch(r"\s*(\d+)\.([a-z_]+)\s*", text)
        if not match:
            raise InputError(f"position {text!r} is not of the form LAYER.MODULE, such as 22.mlp_down")
        layer, module = int(match[1]), match[2]
        if module not in MODULES:
            known = ", ".join(MODULES)
            raise InputError(
                f"position {text!r}: there is no module {module!r}{_nearest(module, MODULES)}; modules are {known}"
            )
        return cls(layer, module)

    def __str__(self) -> str:
        return f"{self.layer}.{self.module}"


@dataclass(frozen=True)
class PositionInfo:
    """A position of a model and what it trains."""

    position: TuningPosition
    names: tuple[str, ...]
    """Parameter names as in `model.named_parameters()`, in that order."""
    shapes: tuple[tuple[int, ...], ...]
    """Of each parameter."""

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(map(prod, self.shapes))


def family_of(model: PreTrainedModel) -> Family:
    """The table's row for this model, with the path of its blocks; of a vision-language model the row of its text half.

    An architecture without one gets a row with whole layers only if its list of blocks is plain to see, otherwise an
    InputError that says what a row needs.
    """
    if model.config.model_type in BY_MODEL_TYPE:
        return BY_MODEL_TYPE[model.config.model_type]
    text, half = model.config.get_text_config(), _text_half(model)
    row = BY_MODEL_TYPE.get(_row_of(text.model_type))
    if row and half:
        return replace(row, layers=f"{half}.{row.layers.partition('.')[2]}")
    count = getattr(text, "num_hidden_layers", None)
    paths = [path for size, path in _block_lists(model) if size == count and path.startswith(half)]
    if len(paths) != 1:
        raise InputError(no_row(model))
    return Family((model.config.model_type,), paths[0], {})


def is_known(model: PreTrainedModel) -> bool:
    """Whether the table of architectures has a row for this model, or for its text half."""
    types = (model.config.model_type, _row_of(model.config.get_text_config().model_type))
    return any(name in BY_MODEL_TYPE for name in types)


def _row_of(model_type: str) -> str:
    return TEXT_HALVES.get(model_type, model_type)


def _text_half(model: PreTrainedModel) -> str:
    """Path of the part of a vision-language model that is a language model; empty where the whole is one."""
    if model.config.get_text_config() is model.config:
        return ""
    decoder = model.get_decoder()
    return next((path for path, part in model.named_modules() if part is decoder), "")


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, in order."""
    return cast(nn.ModuleList, model.get_submodule(family_of(model).layers))


def n_layers(model: PreTrainedModel) -> int:
    """Number of blocks."""
    return len(decoder_layers(model))


def layer_prefix(model: PreTrainedModel, layer: int) -> str:
    """Path of a block, such as "model.layers.7". Raises InputError if the model has no such layer."""
    count = n_layers(model)
    if not 0 <= layer < count:
        raise InputError(f"layer {layer} is out of range: {_label(model)} has {count} layers, 0 to {count - 1}")
    return f"{family_of(model).layers}.{layer}"


def parameter_names(model: PreTrainedModel, position: TuningPosition) -> tuple[str, ...]:
    """What a position trains: parameter names in the order of `model.named_parameters()`.

    Raises InputError if the layer is out of range or has no such module (naming those it has).
    """
    prefix = layer_prefix(model, position.layer)
    modules = _modules_of_layer(model, position.layer)
    if position.module not in modules:
        raise InputError(_no_module(model, position, modules) if is_known(model) else no_row(model))
    return tuple(f"{prefix}.{name}" for name in modules[position.module])


def is_input_first(model: PreTrainedModel, name: str) -> bool:
    """Whether a matrix is stored (in, out) and its product is `input @ matrix`, as in GPT-2 and the experts of gpt-oss."""
    owner = model.get_submodule(name.rpartition(".")[0])
    return isinstance(owner, Conv1D) or bool(getattr(owner, "is_transposed", False))


def list_positions(model: PreTrainedModel) -> tuple[PositionInfo, ...]:
    """Every position of a model, by layer and then by module in canonical order."""
    infos = []
    for layer, block in enumerate(decoder_layers(model)):
        shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        prefix = layer_prefix(model, layer)
        for module, names in _modules_of_layer(model, layer).items():
            full_names = tuple(f"{prefix}.{name}" for name in names)
            infos.append(PositionInfo(TuningPosition(layer, module), full_names, tuple(shapes[name] for name in names)))
    return tuple(infos)


def modules_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules that some layer of this model has, in canonical order."""
    found = {module for layer in range(n_layers(model)) for module in _modules_of_layer(model, layer)}
    return tuple(module for module in MODULES if module in found)


def no_row(model: PreTrainedModel) -> str:
    """What is needed to write a row for this model: where the blocks are, what is in one, and how a row looks."""
    size, path = max(_block_lists(model), default=(0, ""))
    model_type = model.config.model_type
    lines = [f"architecture {model_type!r} ({type(model).__name__}) has no row in the table of architectures"]
    if size:
        block = cast(nn.ModuleList, model.get_submodule(path))[size - 1]
        lines.append(f"its blocks seem to be {path} ({size} of them); the last one has these parameters:")
        lines += [f"  {name} {tuple(parameter.shape)}" for name, parameter in block.named_parameters()]
    lines += [
        "add a row to FAMILIES in locft/model/families.py, with paths inside the block, for example:",
        f'  Family(("{model_type}",), "{path or "model.layers"}", {{"mlp_down": ("mlp.down_proj",), "mlp": ("mlp",)}})',
        f"known architectures: {', '.join(sorted(BY_MODEL_TYPE))}",
    ]
    return "\n".join(lines)


def _modules_of_layer(model: PreTrainedModel, layer: int) -> dict[str, tuple[str, ...]]:
    """Module -> parameter names inside the block, for the modules that this layer has, in canonical order."""
    paths = family_of(model).modules
    names = [name for name, _ in decoder_layers(model)[layer].named_parameters()]
    found = {
        module: tuple(
            name for name in names if any(f"{name}.".startswith(f"{path}.") for path in paths.get(module, ()))
        )
        for module in MODULES
    }
    return {module: own for module, own in (found | {"layer": tuple(names)}).items() if own}


def _no_module(model: PreTrainedModel, position: TuningPosition, has: Collection[str]) -> str:
    module, listed, near = position.module, ", ".join(has), _nearest(position.module, has)
    layers = [layer for layer in range(n_layers(model)) if module in _modules_of_layer(model, layer)]
    if layers:
        return (
            f"layer {position.layer} of {_label(model)} has no {module!r}{near}; it has {listed}; "
            f"{module} exists in layers {_ranges(layers)}"
        )
    return f"{_label(model)} has no module {module!r}{near}; it has {listed}"


def _nearest(module: str, choices: Collection[str]) -> str:
    stand_ins = [name for name in STANDS_IN.get(module, ()) if name in choices]
    near = stand_ins or get_close_matches(module, choices, n=1)
    return f" (nearest: {near[0]})" if near else ""


def _label(model: PreTrainedModel) -> str:
    return f"this {model.config.model_type} model"


def _ranges(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _block_lists(model: PreTrainedModel) -> list[tuple[int, str]]:
    """Length and path of every list of modules that is not empty."""
    return [(len(part), path) for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
