"""The view of a model from a layer upwards, its head alone, and the hidden states that enter a layer.

Legend: B rows, T tokens, D hidden, K supervised tokens, V vocabulary.

Only one position is trained, so all layers below it give the same hidden states in every step of every trial. A trial
then needs three things. Each runs the model's own Hugging Face code and needs no knowledge of attention, experts or
state spaces:

    boundary = capture_boundary(model, layer, input_ids, attention_mask)[layer]     once
    hidden = tail_hidden(tail_view(model, layer), boundary, attention_mask, weights={...}, input_ids=input_ids)
    logits = head_view(model)(hidden[rows, columns])      only where a token is supervised

A view is a copy of the module tree but not of the weights: every module object is new, every parameter and buffer is
the model's own. So nothing done to a view (substituted weights, hooks, fewer layers) reaches the model.

Side by side with the hidden states, some models hand their layers more that they make of the tokens (an embedding per
layer, the first hidden states). So a tail is given the tokens, too, and computes all that the model computes before its
first block; only the hidden states that enter the block are exchanged for the boundary.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch.func import functional_call
from transformers import PreTrainedModel

from locft.errors import InputError
from locft.model.positions import blocks_path, decoder_layers, layer_prefix, n_layers, same_blocks

Module = TypeVar("Module", bound=nn.Module)


class NoTailView(ValueError):
    """A model has no view from a layer upwards and can only be computed whole; the message says why."""


def supports_tail(model: PreTrainedModel) -> str | None:
    """None if the views of this model are sound, otherwise the reason why not, in words for the user.

    A cheap look at architecture and state. The tests check that the views of every architecture equal its full forward.
    """
    try:
        n_layers(model)
    except InputError as error:
        return str(error).splitlines()[0]
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        return "its upper layers attend to keys and values of lower layers (num_kv_shared_layers)"
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
    count = n_layers(model)
    if layer != count:
        layer_prefix(model, layer)
        return _view(model, layer, count if stop is None else stop)
    view = _view(model, count - 1, count)
    layers = decoder_layers(view)
    layers[0] = _Unchanged(layers[0])
    return view


def tail_parameter_name(model: PreTrainedModel, layer: int, name: str) -> str:
    """Name in `tail_view(model, layer)` of the model's parameter `name`: "model.layers.22.x" -> "model.layers.0.x".

    Raises ValueError for a parameter of a layer below, which the tail does not have.
    """
    prefix = blocks_path(model) + "."
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
    input_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final hidden states (B, T, D), after the final norm: what the head takes.

    boundary: (B, T, D) from `capture_boundary`. attention_mask: (B, T), or another form that the model takes.
    position_ids: (B, T), by default the model's own; ignored by architectures without positions (bloom, state spaces).
    weights: tail parameter name -> tensor of the parameter's shape and dtype that stands in for it; gradients flow to
    them. input_ids: (B, T), for models whose layers see more of the tokens than the boundary holds.
    """
    base = tail.base_model
    prefix = tail.base_model_prefix + "."
    substitutes = {name.removeprefix(prefix): value for name, value in (weights or {}).items()}
    if input_ids is None:
        input_ids = torch.zeros(boundary.shape[:2], dtype=torch.long, device=boundary.device)
    inputs = _inputs(base, attention_mask, position_ids) | {"input_ids": input_ids}

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return ((boundary, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": boundary})

    entrance = decoder_layers(tail)[0].register_forward_pre_hook(enter, with_kwargs=True)
    try:
        return functional_call(base, substitutes, kwargs=inputs).last_hidden_state
    finally:
        entrance.remove()


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
    owner_path = _owner_path(model)
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
    the model adds to the embeddings. input_ids, attention_mask: (B, T). Raises InputError if there is no such layer,
    NoTailView if what enters a layer is not one state per token.
    """
    wanted = {layers} if isinstance(layers, int) else set(layers)
    for layer in wanted:
        layer_prefix(model, layer)
    view = _view(model, 0, max(wanted) + 1)
    captured: dict[int, torch.Tensor] = {}
    for layer in wanted:

        def keep(_module: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            if layer in captured:
                raise NoTailView("it runs its blocks several times in a forward pass")
            if states.shape[:-1] != input_ids.shape:
                raise NoTailView(
                    f"between its blocks {tuple(input_ids.shape)} tokens have hidden states of shape {tuple(states.shape)}"
                )
            captured[layer] = states.detach()

        decoder_layers(view)[layer].register_forward_pre_hook(keep, with_kwargs=True)  # the view's: the model has none
    view.base_model(input_ids=input_ids, **_inputs(view.base_model, attention_mask, position_ids))
    return {layer: captured[layer] for layer in sorted(captured)}


def _owner_path(model: PreTrainedModel) -> str:
    """Path of the module that owns the list of blocks: "model" for "model.layers"."""
    return blocks_path(model).rpartition(".")[0]


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
    same_blocks(view, model)
    configs: dict[int, Any] = {}
    part = view
    for name in ("", *_owner_path(model).split(".")):
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


class _Unchanged(nn.Module):
    """Stands in for a layer: returns the hidden states that enter it, in the form in which the layer returns its own."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self._layer = [layer]  # no submodule: the view has none of its parameters
        self._tuple: bool | None = None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self._tuple is None:
            with torch.no_grad():
                self._tuple = isinstance(self._layer[0](*args, **kwargs), tuple)
        states = args[0] if args else kwargs["hidden_states"]
        return (states,) if self._tuple else states


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
