"""Measuring the curvature of drift (`locft.train.methods.curvature`): one pass over prose for all parameters of some layers.

Legend: B windows of a batch, T tokens of each, I inputs and O outputs of a matrix, N rows of its input.

The matrices are found where they are used: while a layer computes, every product with a watched parameter, or with one
expert's part of it, is seen, whatever module it is in. A parameter in no product (a norm, a bias, a convolution) gets the
diagonal of the Fisher information from its gradients.
"""

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from locft.cache import content_key, made_once, make_room
from locft.engine.tail import (
    NoTailView,
    capture_boundary,
    head_view,
    reconfigure,
    require_only_states,
    supports_tail,
    tail_hidden,
    tail_view,
)
from locft.errors import InputError
from locft.model.checkpoint import opened
from locft.model.models import LoadedModel
from locft.model.positions import n_layers
from locft.process import describe_machine
from locft.train.methods.curvature import Curvature
from locft.train.reference import pad_rows
from locft.train.token_rows import SUPERVISED_AT_ONCE, TokenRow

BATCH_TOKENS = 1024
"""Tokens of one pass."""
FILE_NAME = "curvature.safetensors"
GRADIENTS = "gradients"
SEED = 0
"""Of the labels."""
LIMIT_BYTES = 8 * 2**30
"""Disk space for all that is kept. The least recently used is removed first."""
VERSION = 1
"""Of the files. Raise it when the same key would hold other numbers."""

_Run = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""From token ids and mask (B, T) to what predicts the tokens, states for the head (K, D) or, of a whole model, logits (K, V),
and a tensor below to which gradients flow."""

_log = logging.getLogger(__name__)


@dataclass
class _Products:
    """Sums over the products with one parameter. Experts stack theirs: (E, ...), single matrices have E = 1."""

    input_first: bool
    inputs: torch.Tensor  # (E, I, I)
    outputs: torch.Tensor  # (E, O, O)
    counts: torch.Tensor  # (E,) rows seen

    def curvature(self, tokens: int, shape: torch.Size) -> Curvature:
        inputs = self.inputs / self.counts.clamp(min=1)[:, None, None]
        outputs = self.outputs / tokens
        rows, columns = (inputs, outputs) if self.input_first else (outputs, inputs)
        if len(shape) == 2:
            rows, columns = rows[0], columns[0]
        return Curvature(rows, columns)


class _Watch(TorchFunctionMode):
    """While active, sums up second moments of the inputs and output gradients of every product with a watched tensor."""

    def __init__(self, watched: Mapping[str, torch.Tensor]):
        super().__init__()
        self.names = {tensor.untyped_storage().data_ptr(): name for name, tensor in watched.items()}
        self.shapes = {name: tensor.shape for name, tensor in watched.items()}
        self.found: dict[str, _Products] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            self._seen(args[0], args[1], result, input_first=False)
        elif func in (torch.addmm, torch.Tensor.addmm):
            self._seen(args[1], args[2], result, input_first=True)
        elif func in (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.mm, torch.bmm):
            self._seen(args[0], args[1], result, input_first=True)
        return result

    def _seen(self, inputs: torch.Tensor, matrix: torch.Tensor, output: torch.Tensor, *, input_first: bool) -> None:
        name = self.names.get(matrix.untyped_storage().data_ptr())
        if name is None or not output.requires_grad:
            return
        if matrix.stride(-1) != 1:  # used transposed
            input_first = not input_first
        rows, columns = self.shapes[name][-2:]
        experts = self.shapes[name].numel() // (rows * columns)
        first = matrix.storage_offset() // (rows * columns)
        here = matrix.numel() // (rows * columns)
        width_in, width_out = (rows, columns) if input_first else (columns, rows)
        if name not in self.found:
            new = inputs.new_zeros
            self.found[name] = _Products(
                input_first,
                new((experts, width_in, width_in), dtype=torch.float32),
                new((experts, width_out, width_out), dtype=torch.float32),
                new((experts,), dtype=torch.float32),
            )
        sums = self.found[name]
        part = slice(first, first + here)
        x = inputs.detach().float().reshape(here, -1, width_in)
        sums.inputs[part].baddbmm_(x.mT, x)
        sums.counts[part] += x.shape[1]

        def add(gradient: torch.Tensor) -> None:
            g = gradient.detach().float().reshape(here, -1, width_out)
            sums.outputs[part].baddbmm_(g.mT, g)

        output.register_hook(add)


@torch.no_grad()
def output_gradients(loaded: LoadedModel, windows: Sequence[TokenRow], *, seed: int = SEED) -> torch.Tensor:
    """(K, D) gradients of -log p(label) at the states that the head takes, for the K predicted tokens of all windows.

    Labels are drawn from the model's own predictions. All layers begin with these, and with a large vocabulary they cost
    more than the layers do.
    """
    model, last = loaded.model, n_layers(loaded.model) - 1
    view, head = tail_view(model, last), head_view(model)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in _parts(windows):
        ids, mask = pad_rows(part, model.device)
        boundary = capture_boundary(model, last, ids, mask)[last]
        hidden = tail_hidden(view, boundary, mask, input_ids=ids)
        for states in _predicting(hidden, mask).split(SUPERVISED_AT_ONCE):
            with torch.enable_grad():
                states = states.detach().requires_grad_()
                logits = head(states)
                found += torch.autograd.grad(logits, states, _label_gradient(logits, generator))
    return torch.cat(found)


def measure_curvature(
    loaded: LoadedModel,
    layer: int,
    names: Sequence[str],
    windows: Sequence[TokenRow],
    gradients: Callable[[], torch.Tensor] | None = None,
) -> dict[str, Curvature]:
    """Curvature of parameters of a layer and of layers above it, by name, on the CPU.

    windows: of running prose; each token but the first is predicted. gradients: gives their `output_gradients`, which are
    needed unless the model has to be computed whole.
    """
    model, generator = loaded.model, torch.Generator().manual_seed(SEED)
    watched = {name: model.get_parameter(name).detach().clone() for name in names}
    watch = _Watch({name: value for name, value in watched.items() if value.dim() > 1})
    others: dict[str, torch.Tensor] = {}
    diagonals: dict[str, torch.Tensor] = {}
    given: torch.Tensor | None = None
    tokens = 0
    for part in _parts(windows):
        ids, mask = pad_rows(part, model.device)
        if not tokens:
            run, from_layer = _run_of(model, layer, watched, ids, mask)
            if from_layer:
                given = gradients() if gradients else output_gradients(loaded, windows)
            with torch.enable_grad():
                others = _in_no_product(watch, watched, partial(run, ids, mask))
            diagonals = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in others.items()}
        with torch.enable_grad():
            with watch:
                outputs, root = run(ids, mask)
            own = _label_gradient(outputs, generator) if given is None else given[tokens : tokens + len(outputs)]
            found = torch.autograd.grad(outputs, [root, *others.values()], own.to(outputs), allow_unused=True)[1:]
        for name, gradient in zip(others, found, strict=True):
            if gradient is not None:
                diagonals[name] += gradient.float() ** 2
        tokens += len(outputs)
    diagonal = {name: Curvature(diagonal=value.cpu() / tokens) for name, value in diagonals.items()}
    factored = {name: sums.curvature(tokens, watched[name].shape) for name, sums in watch.found.items()}
    return diagonal | {name: one.to(torch.device("cpu")) for name, one in factored.items()}


def measured_once(
    loaded: LoadedModel,
    layers: Mapping[int, Sequence[str]],
    layer: int,
    windows: Sequence[TokenRow],
    names: Collection[str] | None = None,
) -> dict[str, Curvature]:
    """The same of one layer, kept in a file for other processes and later calls, as are the gradients that all layers begin with.

    layers: parameters of this layer, and of others that the same pass measures and keeps if it has to be made. names: those of
    this layer that are wanted, None for all.
    """
    measured: dict[str, Curvature] = {}

    def gradients() -> torch.Tensor:
        size = 4 * sum(len(row.target_ids) for row in windows) * loaded.model.get_input_embeddings().weight.shape[1]
        return _kept(loaded, windows, [], size, lambda: {GRADIENTS: output_gradients(loaded, windows)})[GRADIENTS]

    def made(part: Sequence[str]) -> dict[str, torch.Tensor]:
        if not measured:
            together = [name for one in layers.values() for name in one]
            measured.update(measure_curvature(loaded, min(layers), together, windows, gradients))
        return {f"{piece}/{name}": value for name in part for piece, value in measured[name].parts.items()}

    def kept(part: Sequence[str], is_wanted: Callable[[str], bool]) -> dict[str, torch.Tensor]:
        return _kept(loaded, windows, part, curvature_size(loaded.model, part), partial(made, part), is_wanted)

    stored = kept(layers[layer], lambda key: names is None or key.partition("/")[2] in names)
    for other in layers if measured else ():  # only now: a process that waits for another's lock holds none itself
        kept(layers[other], lambda _key: False)
    found: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in stored.items():
        piece, _, name = key.partition("/")
        found.setdefault(name, {})[piece] = value
    return {name: Curvature(**pieces) for name, pieces in found.items()}


def _kept(
    loaded: LoadedModel,
    windows: Sequence[TokenRow],
    names: Sequence[str],
    size: int,
    make: Callable[[], dict[str, torch.Tensor]],
    is_wanted: Callable[[str], bool] = lambda _key: True,
) -> dict[str, torch.Tensor]:
    """What is made of a model and windows, for some parameters or none: from its file if there is one."""
    parts = [VERSION, list(names), loaded.fingerprint, [row.token_ids for row in windows]]
    parts += [str(loaded.model.dtype), str(loaded.model.device), describe_machine()]

    def write(folder: Path) -> None:
        make_room(folder, size, LIMIT_BYTES)
        save_file({key: value.contiguous() for key, value in make().items()}, folder / FILE_NAME)

    try:
        folder = made_once("curvature", content_key(parts), write)
        with opened(folder / FILE_NAME, "curvature") as stored:
            found = {key: stored.get_tensor(key) for key in stored.keys() if is_wanted(key)}  # noqa: SIM118
        os.utime(folder)
    except (InputError, OSError) as error:
        _log.warning("%s; curvature is not kept", error)
        return {key: value for key, value in make().items() if is_wanted(key)}
    return found


def factor_bytes(shape: torch.Size) -> int:
    """Size of the curvature of a parameter of this shape."""
    if len(shape) < 2:
        return 4 * shape.numel()
    return 4 * shape[:-2].numel() * (shape[-1] ** 2 + shape[-2] ** 2)


def curvature_size(model: PreTrainedModel, names: Sequence[str]) -> int:
    """Bytes of the curvature of these parameters."""
    return sum(factor_bytes(model.get_parameter(name).shape) for name in names)


def _in_no_product(
    watch: _Watch, watched: Mapping[str, torch.Tensor], run: Callable[[], object]
) -> dict[str, torch.Tensor]:
    """The watched tensors that a run uses in no product; from now on gradients flow to them."""
    with watch:
        run()
    others = {name: value.requires_grad_() for name, value in watched.items() if name not in watch.found}
    watch.found.clear()
    return others


def _run_of(
    model: PreTrainedModel, layer: int, watched: Mapping[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor
) -> tuple[_Run, bool]:
    """The run from the layer upwards, and True; that of the whole model where that, tried on these tokens, gives something
    else."""
    whole = _whole(model, watched)
    try:
        if supports_tail(model) is not None:
            return whole, False
        require_only_states(model, ids, mask)
        run, head = _from_layer(model, layer, watched), head_view(model)
        tolerance = 1e-3 if model.dtype == torch.float32 else 1e-1
        for one in zip(ids.split(1), mask.split(1), strict=True):  # the logits of all windows at once may be gigabytes
            with torch.no_grad():
                found, expected = head(run(*one)[0]), whole(*one)[0]
            if not (found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1):
                return whole, False
    except (NoTailView, TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return whole, False
    return run, True


def _from_layer(model: PreTrainedModel, layer: int, watched: Mapping[str, torch.Tensor]) -> _Run:
    view = _plain_view(model, layer)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        boundary = capture_boundary(model, layer, ids, mask)[layer].requires_grad_()
        return _predicting(tail_hidden(view, boundary, mask, weights=watched, input_ids=ids), mask), boundary

    return run


def _whole(model: PreTrainedModel, watched: Mapping[str, torch.Tensor]) -> _Run:
    view = model if supports_tail(model) is not None else _plain_view(model, 0)

    def run(ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        roots: list[torch.Tensor] = []

        def keep(_module: nn.Module, _args: tuple, output: torch.Tensor) -> torch.Tensor:
            roots.append(output.detach().requires_grad_())
            return roots[-1].clone()

        handle = view.get_input_embeddings().register_forward_hook(keep)
        try:
            inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
            logits = functional_call(view, dict(watched), kwargs=inputs).logits
        finally:
            handle.remove()
        return _predicting(logits, mask).float(), roots[0]

    return run


def _label_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """(K, V): of -log p(label) with labels drawn from the logits (K, V), at the logits."""
    gradient = logits.detach().softmax(-1)
    labels = _drawn(logits.detach(), generator)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient


def _drawn(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A label (K,) for each row of logits (K, V), drawn from its distribution: several times faster than multinomial."""
    cumulated = logits.softmax(-1).cumsum(-1)
    heights = torch.rand(len(logits), 1, generator=generator).to(logits.device) * cumulated[:, -1:]
    return torch.searchsorted(cumulated, heights)[:, 0].clamp(max=logits.shape[1] - 1)


def _predicting(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """(K, ...): of (B, T, ...) what belongs to tokens that another follows."""
    return hidden[:, :-1][mask[:, 1:].bool()]


def _parts(windows: Sequence[TokenRow]) -> Iterator[Sequence[TokenRow]]:
    size = max(1, BATCH_TOKENS // max(len(row.token_ids) for row in windows))
    for start in range(0, len(windows), size):
        yield windows[start : start + size]


def _plain_view(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """The tail from a layer, whose experts are computed one by one, so that their products can be told apart."""
    view = tail_view(model, layer)
    reconfigure(view, _experts_implementation="eager")
    return view
