"""Where a model can be tuned: a layer and a module in it, resolved to exact parameter names.

A position trains the parameters of exactly the named part: weight and bias of a projection, everything inside the
attention or MLP block, or the whole layer with its norms. Names are built from the table in `families.py` and the
layer's own path, so "1.mlp_down" never touches layers 10 to 19, as a substring test would.

Everything here reads names and shapes only and works on models on the meta device.
"""

import difflib
import re
from dataclasses import dataclass
from math import prod

from torch import nn
from transformers import PreTrainedModel

from locft.errors import InputError
from locft.model.families import BY_MODEL_TYPE, MODULES, STANDS_IN, Family


@dataclass(frozen=True, order=True)
class TuningPosition:
    """A place to tune, written "22.mlp_down"."""

    layer: int
    """0 is the first."""
    module: str
    """One of `families.MODULES`."""

    @classmethod
    def parse(cls, text: str) -> "TuningPosition":
        """From "22.mlp_down". InputError when it is not of that form or the module is no known one."""
        match = re.fullmatch(r"\s*(\d+)\.([a-z_]+)\s*", text)
        if not match:
            raise InputError(f"position {text!r} is not of the form LAYER.MODULE, such as 22.mlp_down")
        layer, module = int(match[1]), match[2]
        if module not in MODULES:
            near = _did_you_mean(module, MODULES)
            known = ", ".join(MODULES)
            raise InputError(f"position {text!r}: there is no module {module!r}{near}; modules are {known}")
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
    size: int
    """Trained numbers altogether."""


def family_of(model: PreTrainedModel) -> Family:
    """The table's row for this model. For an architecture without one, a row of the whole layers alone, where its list of
    blocks is plain to see; else InputError, with what a row needs."""
    family = BY_MODEL_TYPE.get(model.config.model_type)
    if family is None:
        count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
        paths = [path for size, path in _block_lists(model) if size == count]
        if len(paths) != 1:
            raise InputError(no_row(model))
        family = Family((model.config.model_type,), paths[0], {})
    return family


def is_known(model: PreTrainedModel) -> bool:
    """Whether the table of architectures has a row for this model."""
    return model.config.model_type in BY_MODEL_TYPE


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's blocks, in order."""
    return model.get_submodule(family_of(model).layers)


def n_layers(model: PreTrainedModel) -> int:
    """Number of blocks."""
    return len(decoder_layers(model))


def layer_prefix(model: PreTrainedModel, layer: int) -> str:
    """Path of a block, such as "model.layers.7". InputError when the model has no such layer."""
    count = n_layers(model)
    if not 0 <= layer < count:
        raise InputError(f"layer {layer} is out of range: {_label(model)} has {count} layers, 0 to {count - 1}")
    return f"{family_of(model).layers}.{layer}"


def parameter_names(model: PreTrainedModel, position: TuningPosition) -> tuple[str, ...]:
    """What a position trains: parameter names in the order of `model.named_parameters()`.

    InputError when the layer is out of range, or the module is not one that this layer has (naming those it has).
    """
    prefix = layer_prefix(model, position.layer)
    parts = _parts(model, position.layer)
    if position.module not in parts:
        raise InputError(_no_module(model, position, tuple(parts)) if is_known(model) else no_row(model))
    return tuple(f"{prefix}.{name}" for name in parts[position.module])


def list_positions(model: PreTrainedModel) -> tuple[PositionInfo, ...]:
    """Every position of a model, by layer and then by module in canonical order."""
    infos = []
    for layer, block in enumerate(decoder_layers(model)):
        prefix = layer_prefix(model, layer)
        shapes = {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}
        for module, names in _parts(model, layer).items():
            own = tuple(shapes[name] for name in names)
            infos.append(
                PositionInfo(
                    TuningPosition(layer, module),
                    tuple(f"{prefix}.{name}" for name in names),
                    own,
                    sum(prod(shape) for shape in own),
                )
            )
    return tuple(infos)


def modules_of(model: PreTrainedModel) -> tuple[str, ...]:
    """The modules that some layer of this model has, in canonical order."""
    found = {module for layer in range(n_layers(model)) for module in _parts(model, layer)}
    return tuple(module for module in MODULES if module in found)


def _parts(model: PreTrainedModel, layer: int) -> dict[str, tuple[str, ...]]:
    """Module -> parameter names inside the block, for the modules that this layer has, in canonical order."""
    family = family_of(model)
    names = [name for name, _ in decoder_layers(model)[layer].named_parameters()]
    parts = {}
    for module in MODULES:
        if module == "layer":
            parts[module] = tuple(names)
            continue
        paths = family.modules.get(module, ())
        if own := tuple(name for name in names if any(name == path or name.startswith(path + ".") for path in paths)):
            parts[module] = own
    return parts


def _label(model: PreTrainedModel) -> str:
    return f"this {model.config.model_type} model"


def _did_you_mean(got: str, choices: tuple[str, ...]) -> str:
    near = [name for name in STANDS_IN.get(got, ()) if name in choices] or difflib.get_close_matches(got, choices, n=1)
    return f" (nearest: {near[0]})" if near else ""


def _no_module(model: PreTrainedModel, position: TuningPosition, has: tuple[str, ...]) -> str:
    module, listed = position.module, ", ".join(has)
    near = _did_you_mean(module, has)
    layers = [layer for layer in range(n_layers(model)) if module in _parts(model, layer)]
    if layers:
        return (
            f"layer {position.layer} of {_label(model)} has no {module!r}{near}; it has {listed}; "
            f"{module} exists in layers {_ranges(layers)}"
        )
    return f"{_label(model)} has no module {module!r}{near}; it has {listed}"


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


def no_row(model: PreTrainedModel) -> str:
    """What somebody needs to write a row for this model: where the blocks are, what is in one, and how a row looks."""
    size, path = max(_block_lists(model), default=(0, ""))
    model_type = model.config.model_type
    lines = [f"architecture {model_type!r} ({type(model).__name__}) has no row in the table of architectures"]
    if size:
        block = model.get_submodule(path)[size - 1]
        lines.append(f"its blocks seem to be {path} ({size} of them); the last one has these parameters:")
        lines += [f"  {name} {tuple(parameter.shape)}" for name, parameter in block.named_parameters()]
    lines += [
        "add a row to FAMILIES in locft/model/families.py, with paths inside the block, for example:",
        f'  Family(("{model_type}",), "{path or "model.layers"}", {{"mlp_down": ("mlp.down_proj",), "mlp": ("mlp",)}})',
        f"known architectures: {', '.join(sorted(BY_MODEL_TYPE))}",
    ]
    return "\n".join(lines)
