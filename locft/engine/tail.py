"""The view of a model from a layer upwards, its head alone, and the hidden states that enter a layer.

Legend: B rows, T tokens, D hidden, K supervised tokens, V vocabulary.

Each part runs the model's own Hugging Face code and knows nothing of attention, experts or state spaces:

    boundary = capture_boundary(model, layer, input_ids, attention_mask)[layer]     once
    hidden = tail_hidden(tail_view(model, layer), boundary, attention_mask, weights={...}, input_ids=input_ids)
    logits = head_view(model)(hidden[rows, columns])      only where a token is supervised

A view is a copy of the module tree but not of the weights: every module object is new, every parameter and buffer is
the model's own. So nothing done to a view (substituted weights, hooks, fewer layers) reaches the model.

Besides the hidden states, some models give their layers other inputs derived from the tokens (an embedding per layer, the
first hidden states). So a tail is also given the tokens and computes everything that comes before the first block; only
the hidden states that enter the block are replaced by the boundary.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
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
    """None if the views of this model may be sound, otherwise the reason why not, for the user. Computes nothing."""
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
            return (
                f"the forward method of {name or 'the model'} is replaced on the object, as accelerate's device map "
                "does"
            )
    return None


def tail_view(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """The causal LM in which only `layer` and those above it compute, for `tail_hidden`.

    It shares all their parameters with `model`, under the same names, and has none of the layers below. If `layer` is
    the number of layers, only the final norm and the head are left. Raises InputError if there is no such layer.
    """
    if layer != n_layers(model):
        layer_prefix(model, layer)
    view = _copied(model, {})
    same_blocks(view, model)
    layers, forms = decoder_layers(view), dict[type, int]()
    for index in range(layer):
        layers[index] = _Unchanged(decoder_layers(model)[index], forms)
    return view


def tail_hidden(
    tail: PreTrainedModel,
    boundary: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
    weights: Mapping[str, torch.Tensor] | None = None,
    input_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Final hidden states (B, T, D), after the final norm: what the head takes.

    boundary: from `capture_boundary`, (B, T, D). attention_mask: (B, T), or another form that the model accepts.
    position_ids: (B, T), by default the model's own; ignored by architectures without positions (bloom, state spaces).
    weights: parameter name -> tensor of the parameter's shape and dtype that stands in for it; gradients flow to them.
    input_ids: (B, T), for models whose layers use more of the tokens than the boundary holds.
    """
    path = _base_path(tail)
    base = tail.get_submodule(path)
    substitutes = {name.removeprefix(f"{path}."): value for name, value in (weights or {}).items()}
    if input_ids is None:
        input_ids = torch.zeros(boundary.shape[:2], dtype=torch.long, device=boundary.device)
    inputs = _inputs(base, attention_mask, position_ids) | {"input_ids": input_ids}
    layers = decoder_layers(tail)
    first = next((layer for layer in layers if not isinstance(layer, _Unchanged)), layers[-1])

    def enter(_module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = boundary.reshape(_entering(args, kwargs).shape)  # some models have several states per token
        return ((states, *args[1:]), kwargs) if args else (args, kwargs | {_name_of_states(kwargs): states})

    entrance = first.register_forward_pre_hook(enter, with_kwargs=True)
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
    given: list[torch.Tensor] = []
    base, owner = _base_path(model), blocks_path(model).rpartition(".")[0]
    part: Any
    for path, part in view.named_modules():
        if f"{path}.".startswith(f"{base}.") and f"{owner}.".startswith(f"{path}."):  # whichever the causal LM calls
            part.forward = lambda *_args, **_kwargs: _StatesOutput((given[0],))

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        given[:] = [hidden[None]]
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

    The forward ends at the highest of them. For layer 0 it is the input of the first block, which includes whatever
    the model adds to the embeddings. input_ids, attention_mask: (B, T). If a token has several states, D covers all
    of them. Raises InputError if there is no such layer, NoTailView if what enters a layer has another form.
    """
    wanted = {layers} if isinstance(layers, int) else set(layers)
    for layer in wanted:
        layer_prefix(model, layer)
    view = tail_view(model, 0)
    captured: dict[int, torch.Tensor] = {}
    for layer in wanted:

        def keep(_module: nn.Module, args: tuple, kwargs: dict, layer: int = layer) -> None:
            states = _entering(args, kwargs)
            if states.shape[:2] != input_ids.shape or states.dim() < 3:
                shape = tuple(states.shape)
                raise NoTailView(f"its blocks do not take one state per token but a tensor of shape {shape}")
            captured[layer] = states.detach().flatten(2)
            if layer == max(wanted):
                raise PassEnded

        decoder_layers(view)[layer].register_forward_pre_hook(keep, with_kwargs=True)  # on the view, not on the model
    base = view.get_submodule(_base_path(view))
    with suppress(PassEnded):
        base(input_ids=input_ids, **_inputs(base, attention_mask, position_ids))
    if skipped := sorted(wanted - set(captured)):
        raise NoTailView(f"a forward pass over text skips its layers {', '.join(map(str, skipped))}")
    return {layer: captured[layer] for layer in sorted(captured)}


@torch.no_grad()
def require_only_states(
    model: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    position_ids: torch.Tensor | None = None,
) -> None:
    """Raise NoTailView if a layer takes more than hidden states from the layers below it: a tail would lack the rest.

    That is the case if another of their outputs is among its arguments and affects what it computes, or if they leave
    something in a container that is passed to it. Arguments as for `capture_boundary`.
    """
    view = tail_view(model, 0)
    outputs: list[torch.Tensor] = []  # kept alive, so that no other tensor reuses their ids
    sizes: dict[int, int] = {}

    def entering(module: nn.Module, args: tuple, kwargs: dict) -> None:
        others = [*args[1:], *(value for name, value in kwargs.items() if args or name != _name_of_states(kwargs))]
        taken = {id(value) for value in others if any(value is output for output in outputs)}
        grown = [
            value
            for value in others
            if isinstance(value, dict | list) and sizes.setdefault(id(value), len(value)) != len(value)
        ]
        if grown or (taken and not _ignores(module, args, kwargs, taken)):
            raise NoTailView("its layers need more than the hidden states of the layers below them")

    def leaving(_module: nn.Module, _args: tuple, output: Any) -> None:
        if isinstance(output, tuple | list):
            outputs.extend(part for part in output[1:] if isinstance(part, torch.Tensor))

    for layer in decoder_layers(view):
        layer.register_forward_pre_hook(entering, with_kwargs=True)
        layer.register_forward_hook(leaving)
    base = view.get_submodule(_base_path(view))
    base(input_ids=input_ids, **_inputs(base, attention_mask, position_ids))


def _ignores(module: nn.Module, args: tuple, kwargs: dict, taken: Collection[int]) -> bool:
    """Whether a layer computes the same if the arguments with these ids are replaced by others, or absent."""

    def states(other: Callable[[torch.Tensor], torch.Tensor | None]) -> torch.Tensor:
        swapped = [other(value) if id(value) in taken else value for value in args]
        return output_states(
            module.forward(*swapped, **{n: other(v) if id(v) in taken else v for n, v in kwargs.items()})
        )

    try:
        expected = states(lambda value: value)
        return all(
            torch.equal(states(other), expected) for other in (torch.zeros_like, torch.ones_like, lambda _: None)
        )
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False


class PassEnded(Exception):
    """Ends a forward pass that has computed what it was started for."""


def output_states(output: Any) -> torch.Tensor:
    """The hidden states in what a block returns."""
    return output[0] if isinstance(output, tuple | list) else output


def _entering(args: tuple, kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states among a block's arguments."""
    return args[0] if args else kwargs[_name_of_states(kwargs)]


def _name_of_states(kwargs: Mapping[str, Any]) -> str:
    named = (name for name, value in kwargs.items() if isinstance(value, torch.Tensor))
    return "hidden_states" if "hidden_states" in kwargs else next(named, "hidden_states")


def _base_path(model: PreTrainedModel) -> str:
    """Path of the model without its head: the outermost module around the blocks that is not itself a causal LM."""
    for path in itertools.accumulate(blocks_path(model).split(".")[:-1], "{}.{}".format):
        module = model.get_submodule(path)
        if not isinstance(module, PreTrainedModel) or module.get_output_embeddings() is None:
            return path
    raise NoTailView("it has no module that contains the blocks but not the head")


def _inputs(base: nn.Module, attention_mask: torch.Tensor, position_ids: torch.Tensor | None) -> dict[str, Any]:
    inputs: dict[str, Any] = {"attention_mask": attention_mask, "use_cache": False}
    if position_ids is not None and "position_ids" in inspect.signature(base.forward).parameters:
        inputs["position_ids"] = position_ids
    return inputs


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

    def __init__(self, layer: nn.Module, forms: dict[type, int]):
        """forms: class of layer -> length of the tuple it returns, 0 for a tensor; found by running one layer of each class."""
        super().__init__()
        self._layer = [layer]  # no submodule: the view has none of its parameters
        self._forms = forms

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        layer = self._layer[0]
        if type(layer) not in self._forms:
            with torch.no_grad():
                output = layer(*args, **kwargs)
            self._forms[type(layer)] = len(output) if isinstance(output, tuple | list) else 0
        states, length = _entering(args, kwargs), self._forms[type(layer)]
        return (states, *[None] * (length - 1)) if length else states

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:  # the model may look up what kind of layer this is
            return getattr(self.__dict__["_layer"][0], name)


class _StatesOutput(tuple):
    """Stands in for the output class of any base model: hidden states first, everything else absent."""

    @property
    def last_hidden_state(self) -> torch.Tensor:
        return self[0]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
