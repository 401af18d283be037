"""The view of a model from a layer upwards, its head alone, and the hidden states that enter a layer.

Legend: B rows, T tokens, D hidden, K supervised tokens, V vocabulary.

Only one position is trained, so all layers below it give the same hidden states in every step of every trial. A trial
then needs three things. Each runs the model's own Hugging Face code and needs no knowledge of attention, experts or
state spaces:

    boundary = capture_boundary(model, layer, input_ids, attention_mask)[layer]     once
    hidden = tail_hidden(tail_view(model, layer), boundary, attention_mask, weights={tail name: tensor})
    logits = head_view(model)(hidden[rows, columns])      only where a token is supervised

A view is a copy of the module tree but not of the weights: every module object is new, every parameter and buffer is
the model's own. So nothing done to a view (substituted weights, hooks, fewer layers) reaches the model.

A view must not repeat what the model does between its embedding and its first block: the `entry` of the table in
`families.py` (position embeddings of gpt2 and opt, bloom's norm, granite's multiplier).
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from locft.model.families import IDENTITY, ZERO, Family
from locft.model.positions import decoder_layers, family_of, is_known, layer_prefix, n_layers

Module = TypeVar("Module", bound=nn.Module)


class NoTailView(ValueError):
    """A model has no view from a layer upwards and can only be computed whole; the message says why."""


def supports_tail(model: PreTrainedModel) -> str | None:
    """None if the views of this model are sound, otherwise the reason why not, in words for the user.

    A cheap look at architecture and state. The tests check that the views of every architecture equal its full forward.
    """
    if not is_known(model):
        return f"architecture {model.config.model_type!r} has no row in the table of architectures (locft/model/families.py)"
    rescale_every = getattr(model.config, "rescale_every", 0)
    if rescale_every and n_layers(model) >= rescale_every:
        return (
            f"the model rescales its own weights in place (rescale_every is {rescale_every}); "
            "set config.rescale_every to 0 before its first forward pass"
        )
    for name, module in model.named_modules():
        if "forward" in module.__dict__:
            return f"forward of {name or 'the model'} is replaced on the object, as accelerate's device map does"
    return None


def tail_view(model: PreTrainedModel, layer: int, stop: int | None = None) -> PreTrainedModel:
    """The causal LM from `layer` upwards; it takes the hidden states entering that layer as `inputs_embeds`.

    It shares every parameter with `model`, and its layer 0 is the model's layer `layer`. If `layer` is the number of
    layers, only the final norm and the head are left. stop: the layer it ends before; None goes on to the last.

    Raises InputError if there is no such layer or the architecture is unknown.
    """
    if layer != n_layers(model):
        layer_prefix(model, layer)
    view = _view(model, layer, n_layers(model) if stop is None else stop)
    owner = view.get_submodule(_owner_path(family_of(model)))
    for name, value in family_of(model).entry.items():
        if not hasattr(owner, name):
            continue
        if value in (ZERO, IDENTITY):
            value = _ZeroEmbedding() if value == ZERO else nn.Identity()
        setattr(owner, name, value)
    return view


def tail_parameter_name(model: PreTrainedModel, layer: int, name: str) -> str:
    """Name in `tail_view(model, layer)` of the model's parameter `name`: "model.layers.22.x" -> "model.layers.0.x".

    Raises ValueError for a parameter of a layer below, which the tail does not have.
    """
    prefix = family_of(model).layers + "."
    if not name.startswith(prefix):
        return name
    index, rest = name.removeprefix(prefix).split(".", 1)
    if int(index) < layer:
        raise ValueError(f"{name} lies below layer {layer}, where the tail begins")
    return f"{prefix}{int(index) - layer}.{rest}"


def tail_hidden(
    tail: PreTrainedModel,
    boundary: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Final hidden states (B, T, D), after the final norm: what the head takes.

    boundary: (B, T, D) from `capture_boundary`. attention_mask: (B, T), or another form that the model takes.
    position_ids: (B, T), by default the model's own; ignored by architectures without positions (bloom, state spaces).
    weights: tail parameter name -> tensor of the parameter's shape and dtype that stands in for it; gradients flow to
    them.
    """
    base = tail.base_model
    prefix = tail.base_model_prefix + "."
    substitutes = {name.removeprefix(prefix): value for name, value in (weights or {}).items()}
    inputs = _inputs(base, attention_mask, position_ids) | {"inputs_embeds": boundary}
    return functional_call(base, substitutes, kwargs=inputs).last_hidden_state


def reconfigure(view: PreTrainedModel, **settings: Any) -> None:
    """Give a view a configuration of its own with these settings; the model keeps its own."""
    configs: dict[int, Any] = {}
    module: Any
    for module in view.modules():
        if (config := getattr(module, "config", None)) is not None:
            module.config = configs.setdefault(id(config), copy.copy(config))
            for name, value in settings.items():
                setattr(module.config, name, value)


def head_view(model: PreTrainedModel) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function from hidden states (K, D), as `tail_hidden` gives them, to float32 logits (K, V).

    It runs the model's own head code, not just its matrix: soft-capping (gemma2), logit scales (cohere, granite),
    biases.
    """
    view = _copied(model, {})
    owner_path = _owner_path(family_of(model))
    parent, _, name = owner_path.rpartition(".")
    setattr(view.get_submodule(parent), name, _GivenStates())

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        return view(inputs_embeds=hidden[None], use_cache=False).logits[0].float()

    return logits


@torch.no_grad()
def capture_boundary(
    model: PreTrainedModel,
    layers: int | Iterable[int],
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> dict[int, torch.Tensor]:
    """Hidden states entering the given layers, layer -> (B, T, D), from one forward of the unedited model.

    The forward ends after the highest of them. For layer 0 it is the input of the first block, which includes whatever
    the model adds to the embeddings. input_ids, attention_mask: (B, T). Raises InputError if there is no such layer.
    """
    wanted = {layers} if isinstance(layers, int) else set(layers)
    for layer in wanted:
        layer_prefix(model, layer)
    view = _view(model, 0, max(wanted) + 1)
    captured: dict[int, torch.Tensor] = {}
    for layer in wanted:

        def keep(_module: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
            captured[layer] = (args[0] if args else kwargs["hidden_states"]).detach()

        decoder_layers(view)[layer].register_forward_pre_hook(keep, with_kwargs=True)  # the view's: the model has none
    view.base_model(input_ids=input_ids, **_inputs(view.base_model, attention_mask, position_ids))
    return {layer: captured[layer] for layer in sorted(captured)}


def _owner_path(family: Family) -> str:
    """Path of the module that owns the list of blocks: "model" for "model.layers"."""
    return family.layers.rpartition(".")[0]


def _inputs(base: nn.Module, attention_mask: torch.Tensor, position_ids: torch.Tensor | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None and "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = position_ids
    return inputs


def _view(model: PreTrainedModel, start: int, stop: int) -> PreTrainedModel:
    """The causal LM with layers `start` to `stop - 1` only, and a configuration that says so."""
    layers = decoder_layers(model)
    memo: dict[int, nn.Module] = {}
    memo[id(layers)] = nn.ModuleList(_copied(layers[index], memo) for index in range(start, stop))
    view = _copied(model, memo)
    configs: dict[int, Any] = {}
    part = view
    for name in ("", *_owner_path(family_of(model)).split(".")):
        part = getattr(part, name) if name else part
        # Only the modules that loop over the layers need it. A layer keeps the model's, which knows its index.
        if (config := getattr(part, "config", None)) is not None:
            part.config = configs.setdefault(id(config), _sliced_config(config, start, stop, len(layers)))
    return view


def _sliced_config(config: Any, start: int, stop: int, layers: int) -> Any:
    """A copy of a configuration that describes layers `start` to `stop - 1` of `layers`.

    Values bypass the setters, which would check half-changed settings against each other. Only stored lists are cut:
    where `layer_types` is a property (mamba) it follows the number of layers by itself.
    """
    part = copy.copy(config)
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == layers:
            vars(part)[name] = value[start:stop]
    depth = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    if depth in vars(config):
        vars(part)[depth] = stop - start
    return part


def _copied(module: Module, memo: dict[int, nn.Module]) -> Module:
    """A copy of a module tree: new module objects, the same parameters and buffers. `memo`: id of original -> copy."""
    if id(module) in memo:
        return cast(Module, memo[id(module)])
    twin: Module = object.__new__(type(module))
    memo[id(module)] = twin
    for key, value in vars(module).items():
        if key == "_modules":
            value = {name: child if child is None else _copied(child, memo) for name, child in value.items()}
        elif isinstance(value, dict | set):
            value = copy.copy(value)  # parameters, buffers, hooks: the containers are the copy's own
        elif inspect.ismethod(value) and isinstance(value.__self__, nn.Module):
            value = value.__func__.__get__(_copied(value.__self__, memo))
        twin.__dict__[key] = value
    return twin


class _ZeroEmbedding(nn.Module):
    """Stands in for position embeddings that the boundary already includes: adds nothing."""

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros((), device=next((arg.device for arg in args if isinstance(arg, torch.Tensor)), None))


class _GivenStates(nn.Module):
    """Stands in for a base model: its final hidden states are the given ones."""

    def forward(self, *args: Any, inputs_embeds: torch.Tensor, **kwargs: Any) -> "_StatesOutput":
        return _StatesOutput((inputs_embeds,))


class _StatesOutput(tuple):
    """Stands in for the output class of any base model: hidden states first, everything else absent."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
