"""Measuring the curvature of drift (`locft.train.methods.curvature`): one pass over prose for all parameters of some layers.

Legend: B windows of a batch, T tokens of each, I inputs and O outputs of a matrix, N rows of its input.

The matrices are found where they are used: while a layer computes, every product with a watched parameter, or with one
expert's part of it, is intercepted, whichever module it is in. A parameter in no product (a norm, a bias, a convolution) gets the
diagonal of the Fisher information from its gradients.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.nn.functional as F
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from locft.cache import cache_folder, content_key, made_once, make_room
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
from locft.measure.generation import drawn_tokens
from locft.model.checkpoint import opened
from locft.model.models import LoadedModel, computed_with
from locft.process import every_core
from locft.train.methods.curvature import Curvature
from locft.train.reference import pad_rows
from locft.train.token_rows import SUPERVISED_AT_ONCE, TokenRow

BATCH_TOKENS = 1024
"""Tokens per batch."""
FILE_NAME = "curvature.safetensors"
"""Holds tensors under the names "part/parameter", and the label gradients as a part of the parameter ""."""
GRADIENTS = "gradients"
SEED = 0
"""Seed for sampling the labels."""
LIMIT_BYTES = 8 * 2**30
"""Disk space for all kept files. The least recently used are removed first."""
VERSION = 4
"""Version of the files. Raise it when the same key would hold other numbers."""

ROUNDING = 1e-9
"""Share of the squared gradients below which those at first tokens are rounding: a first token's query has no effect."""

_Run = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Maps token ids and mask (B, T) to what predicts the tokens (the states (K, D) that the head takes or, for a whole model, logits
(K, V)), and to a tensor further down that gradients flow back to."""

_log = logging.getLogger(__name__)


@dataclass
class _Products:
    """Sums over the products with one parameter, stacked by expert: (E, ...). A single matrix has E = 1."""

    input_first: bool
    inputs: torch.Tensor  # (E, I, I)
    outputs: torch.Tensor  # (E, O, O)
    weight: torch.Tensor  # (E,) squared output gradients, by which the inputs are weighted
    first: torch.Tensor  # (E, I) sum of the inputs at the first tokens of windows, weighted likewise
    first_weight: torch.Tensor  # (E,)

    def curvature(self, tokens: int, shape: torch.Size) -> Curvature:
        weight = torch.where(self.weight > 0, self.weight, 1)
        inputs, outputs = self.inputs / weight[:, None, None], self.outputs / tokens
        counts = self.first_weight > ROUNDING * weight
        first = self.first / torch.where(counts, self.first_weight, torch.inf)[:, None]
        others = 1 - self.first_weight / weight
        inputs += others[:, None, None] * first[:, :, None] * first[:, None, :]
        rows, columns = (inputs, outputs) if self.input_first else (outputs, inputs)
        if len(shape) == 2:
            rows, columns = rows[0], columns[0]
        return Curvature(rows, columns)


class _Watch(TorchFunctionMode):
    """While active, accumulates second moments of the inputs and output gradients of every product with a watched tensor.

    The inputs of a window are taken together: with X (T, I) and G (T, O) of a window, X'GG'X is summed, so that the trace is
    the sum of the squared norms of the gradients G'X. Where a product's outputs reach several tokens, as keys and values do,
    their gradients agree, and a direction that many inputs share costs far more than these inputs would one by one
    (arXiv 2311.00636 has both extremes). Elsewhere the gradients of different tokens have nothing in common, which leaves the
    sum over single inputs, weighted by their squared gradients. Rows that do not match the batch, such as an expert's, are
    counted one by one.

    What the inputs at the first tokens of all windows have in common counts as if every token had it. Most models keep a huge
    activation there that every later token attends to (arXiv 2402.17762). It has few gradients of its own, so that averages over
    all tokens hide what it costs to disturb it.
    """

    def __init__(self, watched: Mapping[str, torch.Tensor]):
        super().__init__()
        self.batch = (1, 1)
        """Windows in the current batch, and tokens in each."""
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
        expert = matrix.storage_offset() // (rows * columns)
        here = matrix.numel() // (rows * columns)
        width_in, width_out = (rows, columns) if input_first else (columns, rows)
        if name not in self.found:
            new = inputs.new_zeros
            self.found[name] = _Products(
                input_first,
                new((experts, width_in, width_in), dtype=torch.float32),
                new((experts, width_out, width_out), dtype=torch.float32),
                new((experts,), dtype=torch.float32),
                new((experts, width_in), dtype=torch.float32),
                new((experts,), dtype=torch.float32),
            )
        sums = self.found[name]
        part = slice(expert, expert + here)
        given = inputs.detach()  # needed when the gradient arrives; not cast, since float32 takes twice the memory

        def add(gradient: torch.Tensor) -> None:
            x = given.float().reshape(here, -1, width_in)  # (E, N, I)
            windows, tokens = self.batch if here == 1 and x.shape[1] == prod(self.batch) else (x.shape[1], 1)
            g = gradient.detach().float().reshape(here, -1, width_out)  # (E, N, O)
            sums.outputs[part].baddbmm_(g.mT, g)
            sums.weight[part] += g.square().sum((1, 2))
            of_window = g.reshape(here, windows, tokens, width_out)
            together = of_window @ of_window.mT @ x.reshape(here, windows, tokens, width_in)
            sums.inputs[part].baddbmm_(x.mT, together.reshape(x.shape))
            if tokens > 1:
                weight = of_window[:, :, 0].square().sum(-1)  # (E, B)
                sums.first[part] += (weight[:, None] @ x.reshape(here, windows, tokens, width_in)[:, :, 0])[:, 0]
                sums.first_weight[part] += weight.sum(1)

        output.register_hook(add)


def measure_curvature(
    loaded: LoadedModel,
    layer: int,
    names: Sequence[str],
    windows: Sequence[TokenRow],
    begun: torch.Tensor | None = None,
    *,
    seed: int = SEED,
) -> tuple[dict[str, Curvature], torch.Tensor | None]:
    """Curvature of parameters of a layer and of layers above it, by name, on the CPU; and the label gradients that all start from.

    windows: of running prose; each token but the first is predicted, and a label for it is drawn from the model's own
    prediction with `seed`. The label gradients (K, D) are those of -log p(label) at the states that the head takes, for the
    K predicted tokens: with a large vocabulary they cost more than the layers do. None if the model has to
    be computed as a whole. begun: these label gradients, from an earlier call with the same windows.
    """
    model, generator = loaded.model, torch.Generator().manual_seed(seed)
    watched = {name: model.get_parameter(name).detach().clone() for name in names}
    watch = _Watch({name: value for name, value in watched.items() if value.dim() > 1})
    first, mask = pad_rows(_parts(windows)[0], model.device)
    run, from_layer = _run_of(model, layer, watched, first[:1], mask[:1])
    with torch.enable_grad(), watch:
        run(first, mask)  # shows what is in no product
    others = {name: value.requires_grad_() for name, value in watched.items() if name not in watch.found}
    watch.found.clear()
    diagonals = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in others.items()}
    label_gradients = partial(_at_states, head_view(model)) if from_layer else _label_gradient
    drawn, tokens = [], 0
    for part in _parts(windows):
        ids, mask = pad_rows(part, model.device)
        watch.batch = ids.shape
        with torch.enable_grad(), watch:
            outputs, root = run(ids, mask)
        here = slice(tokens, tokens + len(outputs))
        own = label_gradients(outputs.detach(), generator) if begun is None else begun[here].to(outputs)
        if from_layer:  # for a whole model they are as wide as the vocabulary
            drawn.append(own)
        found = torch.autograd.grad(outputs, [root, *others.values()], own, allow_unused=True)[1:]
        for name, gradient in zip(others, found, strict=True):
            if gradient is not None:
                diagonals[name] += gradient.float() ** 2
        tokens = here.stop
    diagonal = {name: Curvature(diagonal=value.cpu() / tokens) for name, value in diagonals.items()}
    factored = {name: sums.curvature(tokens, watched[name].shape) for name, sums in watch.found.items()}
    curvature = diagonal | {name: one.to(torch.device("cpu")) for name, one in factored.items()}
    return curvature, torch.cat(drawn) if from_layer else None


def measured_once(
    loaded: LoadedModel,
    layers: Mapping[int, Sequence[str]],
    layer: int,
    windows: Sequence[TokenRow],
    names: Collection[str] | None = None,
) -> dict[str, Curvature]:
    """`measure_curvature` of one layer, kept in a file for other processes and later calls; so are the label gradients.

    layers: parameters of this layer, and of others that are measured and kept in the same pass if one is needed. names: the
    parameters of this layer that are wanted, None for all. One process of a machine measures, on all cores; the others wait.
    """
    wanted = layers[layer] if names is None else [name for name in layers[layer] if name in names]
    measured: dict[str, Curvature] = {}
    with every_core():
        prose = [row.token_ids for row in windows]
        folder = partial(_folder, content_key([loaded.fingerprint, computed_with(loaded.model), prose]))
        of_layer, begun = folder(layers[layer]), folder(())
        try:
            if not of_layer.is_dir():
                begun.parent.mkdir(parents=True, exist_ok=True)
                with FileLock(f"{begun}.pass.lock"):  # until then another process may have measured it
                    if not of_layer.is_dir():
                        together = [name for own in layers.values() for name in own]
                        given = _read(begun, [""])[""][GRADIENTS] if begun.is_dir() else None
                        measured, gradients = measure_curvature(loaded, min(layers), together, windows, given)
                        if gradients is not None:
                            _keep(begun, {"": {GRADIENTS: gradients}})
                        for own in layers.values():
                            _keep(folder(own), {name: measured[name].parts for name in own})
            return {name: Curvature(**parts) for name, parts in _read(of_layer, wanted).items()}
        except (InputError, OSError) as error:
            _log.warning("%s; curvature is not kept", error)
            if not measured:
                measured, _ = measure_curvature(loaded, layer, wanted, windows)
    return {name: measured[name] for name in wanted}


def _folder(measured_on: str, names: Sequence[str]) -> Path:
    """Where the cache keeps the curvature of some parameters or, for none, the label gradients. measured_on: a key for the model
    and the prose."""
    return cache_folder() / "curvature" / content_key([VERSION, measured_on, list(names)])


def _read(folder: Path, names: Collection[str]) -> dict[str, dict[str, torch.Tensor]]:
    """What is kept in a folder under these names: tensors by name and part."""
    with suppress(OSError):  # the cache may be read-only
        os.utime(folder)
    found: dict[str, dict[str, torch.Tensor]] = {}
    with opened(folder / FILE_NAME, "curvature") as stored:
        for key in stored.keys():  # noqa: SIM118
            part, _, name = key.partition("/")
            if name in names:
                found.setdefault(name, {})[part] = stored.get_tensor(key)
    return found


def _keep(folder: Path, tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> None:
    """Write a folder for `_read`, unless it is there already."""
    flat = {f"{part}/{name}": value.contiguous() for name, own in tensors.items() for part, value in own.items()}

    def write(unfinished: Path) -> None:
        make_room(unfinished, sum(value.nbytes for value in flat.values()), LIMIT_BYTES)
        save_file(flat, unfinished / FILE_NAME)

    made_once("curvature", folder.name, write)


def factor_bytes(shape: torch.Size) -> int:
    """Size of the curvature of a parameter of this shape."""
    if len(shape) < 2:
        return 4 * shape.numel()
    return 4 * shape[:-2].numel() * (shape[-1] ** 2 + shape[-2] ** 2)


def _run_of(
    model: PreTrainedModel, layer: int, watched: Mapping[str, torch.Tensor], ids: torch.Tensor, mask: torch.Tensor
) -> tuple[_Run, bool]:
    """The run from the layer upwards and True; or the run of the whole model and False, if the former is not possible or gives
    something else on these tokens."""
    whole = _whole(model, watched)
    try:
        if supports_tail(model) is not None:
            return whole, False
        require_only_states(model, ids, mask)
        run, head = _from_layer(model, layer, watched), head_view(model)
        tolerance = 1e-3 if model.dtype == torch.float32 else 1e-1
        with torch.no_grad():
            found, expected = head(run(ids, mask)[0]), whole(ids, mask)[0]
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


def _at_states(
    head: Callable[[torch.Tensor], torch.Tensor], states: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Gradients (K, D) of -log p(label) at the states (K, D) that the head takes."""
    found = []
    for part in states.split(SUPERVISED_AT_ONCE):
        with torch.enable_grad():
            part = part.detach().requires_grad_()
            logits = head(part)
            found += torch.autograd.grad(logits, part, _label_gradient(logits, generator))
    return torch.cat(found)


def _label_gradient(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Gradients (K, V) of -log p(label) at the logits (K, V), with labels drawn from these logits."""
    gradient = logits.detach().softmax(-1)
    labels = drawn_tokens(logits.detach(), generator)
    gradient[torch.arange(len(labels), device=labels.device), labels] -= 1
    return gradient


def _predicting(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The entries (K, ...) of (B, T, ...) at tokens that are followed by another."""
    return hidden[:, :-1][mask[:, 1:].bool()]


def _parts(windows: Sequence[TokenRow]) -> list[Sequence[TokenRow]]:
    size = max(1, BATCH_TOKENS // max(len(row.token_ids) for row in windows))
    return [windows[start : start + size] for start in range(0, len(windows), size)]


def _plain_view(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """The tail from a layer, with experts computed one by one, so that their products can be told apart."""
    view = tail_view(model, layer)
    reconfigure(view, _experts_implementation="eager")
    return view
