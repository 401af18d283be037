"""Where a model can be tuned: a layer and a module in it, resolved to exact parameter names.

A position trains the parameters of exactly the named part: weight and bias of a projection, everything inside the
attention or MLP block, or the whole layer with its norms. Names are built from the parts that `structure.py` finds, or a
row of `families.py` lists, and the layer's own path, so "1.mlp_down" never touches layers 10 to 19, as a substring test would.

Everything here reads names and shapes only and works on models on the meta device.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import groupby
from math import prod
from typing import cast
from weakref import WeakKeyDictionary

from torch import nn
from transformers import PreTrainedModel

from locft.errors import InputError
from locft.model.families import FAMILIES, MODULES, STANDS_IN
from locft.model.structure import parts_of

_DEPTHS = ("num_hidden_layers", "num_layers", "decoder_layers")
"""What configurations call the number of blocks."""
_BY_FAR = 1.25
"""Limit on the weights of all candidate lists together, as a multiple of the largest, which is taken as the list of blocks."""


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
    """Shape of each parameter."""

    @property
    def size(self) -> int:
        """Number of trained values."""
        return sum(map(prod, self.shapes))


_BLOCKS: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()
"""The path of each model's list of blocks, which every forward pass of a tail asks for."""


def blocks_path(model: PreTrainedModel) -> str:
    """Path of the model's list of blocks, "model.layers"; of a vision-language model, that of its text half.

    Raises InputError if it cannot be determined.
    """
    if model not in _BLOCKS:
        _BLOCKS[model] = _find_blocks(model)
    return _BLOCKS[model]


def same_blocks(view: PreTrainedModel, model: PreTrainedModel) -> None:
    """Record that a view has its blocks under the same path as its model, however few are left."""
    _BLOCKS[view] = blocks_path(model)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, in order."""
    return cast(nn.ModuleList, model.get_submodule(blocks_path(model)))


def n_layers(model: PreTrainedModel) -> int:
    """Number of blocks."""
    return len(decoder_layers(model))


def layer_prefix(model: PreTrainedModel, layer: int) -> str:
    """Path of a block, such as "model.layers.7". Raises InputError if the model has no such layer."""
    count = n_layers(model)
    if not 0 <= layer < count:
        raise InputError(f"layer {layer} is out of range: {_label(model)} has {count} layers, 0 to {count - 1}")
    return f"{blocks_path(model)}.{layer}"


def parameter_names(model: PreTrainedModel, position: TuningPosition) -> tuple[str, ...]:
    """What a position trains: parameter names in the order of `model.named_parameters()`.

    Raises InputError if the layer is out of range or has no such module (naming those it has).
    """
    modules = _modules_of_layer(model, position.layer)
    if position.module not in modules:
        raise InputError(_no_module(model, position, modules) if has_parts(model) else no_row(model))
    return modules[position.module]


def list_positions(model: PreTrainedModel) -> tuple[PositionInfo, ...]:
    """Every position of a model, by layer and then by module in canonical order."""
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    return tuple(
        PositionInfo(TuningPosition(layer, module), names, tuple(shapes[name] for name in names))
        for layer in range(n_layers(model))
        for module, names in _modules_of_layer(model, layer).items()
    )


def modules_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules that some layer of this model has, in canonical order."""
    found = {module for layer in range(n_layers(model)) for module in _modules_of_layer(model, layer)}
    return tuple(module for module in MODULES if module in found)


def has_parts(model: PreTrainedModel) -> bool:
    """Whether anything smaller than a whole layer is known of this model."""
    return modules_of(model) != ("layer",)


def no_row(model: PreTrainedModel) -> str:
    """Why no parts are known, and what is needed to write a row for this model: the contents of a block, an example of a row."""
    size, path = max(_block_lists(model), default=(0, ""))
    model_type = model.config.get_text_config().model_type
    lines = [f"cannot identify attention and MLP from the structure of {model_type!r} ({type(model).__name__})"]
    if size:
        block = cast(nn.ModuleList, model.get_submodule(path))[size - 1]
        lines.append(f"its blocks seem to be {path} ({size} of them); the last one has these parameters:")
        lines += [f"  {name} {tuple(parameter.shape)}" for name, parameter in block.named_parameters()]
    lines += [
        "add a row to FAMILIES in locft/model/families.py, with paths inside the block, for example:",
        f'  "{model_type}": {{"mlp_down": ("mlp.down_proj",), "mlp": ("mlp",)}},',
    ]
    return "\n".join(lines)


def _modules_of_layer(model: PreTrainedModel, layer: int) -> dict[str, tuple[str, ...]]:
    """Module -> parameter names, for the modules that this layer has, in canonical order. Raises InputError if there is no such
    layer.

    A parameter that blocks share (zamba's attention) belongs to the first of them: `named_parameters` gives it once.
    """
    prefix = f"{layer_prefix(model, layer)}."
    names = [name for name, _ in model.named_parameters() if name.startswith(prefix)]
    paths = _parts(model, layer)
    found = {
        module: tuple(name for name in names if any(_belongs(name, prefix + part) for part in paths.get(module, ())))
        for module in MODULES
    }
    return {module: own for module, own in (found | {"layer": tuple(names)}).items() if own}


def _belongs(name: str, part: str) -> bool:
    """Whether a parameter is this part, lies in it, or is its bias ("experts.down_proj_bias")."""
    return f"{name}.".startswith(f"{part}.") or name == f"{part}_bias"


def _parts(model: PreTrainedModel, layer: int) -> Mapping[str, tuple[str, ...]]:
    config = model.config.get_text_config()
    for model_type in (model.config.model_type, config.model_type):
        if model_type in FAMILIES:
            return FAMILIES[model_type]
    types = getattr(config, "layer_types", None) or ()
    hidden = getattr(config, "hidden_size", None) or model.get_input_embeddings().weight.shape[1]
    return parts_of(decoder_layers(model)[layer], hidden, types[layer] if len(types) == n_layers(model) else "")


def _owner_type(model: PreTrainedModel, path: str) -> str | None:
    """Model type in the configuration of the module that owns a list of modules."""
    return getattr(getattr(model.get_submodule(path.rpartition(".")[0]), "config", None), "model_type", None)


def _find_blocks(model: PreTrainedModel) -> str:
    """The list of modules in the text half that is highest in the tree and holds by far the most weights.

    Lists of the length that the configuration gives are preferred; others are considered only if there are none.
    """
    text = model.config.get_text_config()
    lists = {path: size for size, path in _block_lists(model)}
    counts = {getattr(text, name, None) for name in _DEPTHS}
    if text is not model.config:  # of a vision-language model
        owned = {path for path in lists if _owner_type(model, path) == text.model_type}
        lists = {path: size for path, size in lists.items() if path in owned} or lists
    lists = {path: size for path, size in lists.items() if size in counts} or lists
    highest = min((path.count(".") for path in lists), default=0)
    weights = {
        path: sum(parameter.numel() for parameter in model.get_submodule(path).parameters())
        for path in lists
        if path.count(".") == highest
    }
    largest = max(weights, key=weights.__getitem__, default="")
    if not largest or sum(weights.values()) > _BY_FAR * weights[largest]:
        raise InputError(no_row(model))
    return largest


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
    grouped = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])  # in a run, number and place grow alike
    runs = [[number for _, number in run] for _, run in grouped]
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _block_lists(model: PreTrainedModel) -> list[tuple[int, str]]:
    """Length and path of every list of modules that is not empty."""
    return [(len(part), path) for path, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
