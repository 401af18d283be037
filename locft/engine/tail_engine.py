"""The fast forward pass: from the stored states at the trained layer upwards, with logits only where a token is supervised.

It equals `locft.train.reference.full_forward` up to rounding; the tests check this on every architecture, and
`locft bench` measures both side by side.

Legend: U nodes, D hidden, F width of a matrix's input, G sequences of a pack, N tokens of each, K supervised tokens.
"""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from locft.engine.boundary_states import TOKENS_AT_ONCE, BoundaryStates, boundary_states, scratch
from locft.engine.model_views import ModelViews, linear_change
from locft.engine.packing import Pack, PrefixTree, pack_rows
from locft.engine.tail import NoTailView, capture_boundary, require_only_states, supports_tail
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, n_layers, parameter_names
from locft.model.precision import cast_model, training_precision
from locft.process import moved
from locft.train.reference import full_forward
from locft.train.token_rows import Forward, SupervisedLogits, TokenRow, batches

SEQUENCE_TOKENS = 96
"""Tokens per packed sequence: the cost of attention grows with their square, and shorter sequences are padded at the end.
Matrix products take all sequences of a pack together."""
_WINDOWS = (
    "sliding_window", "window_size", "sliding_window_size", "attention_chunk_size", "index_topk", "indexer_budget",
)  # fmt: skip
"""Names that configurations use for the number of earlier tokens that a token attends to."""
_SAMPLE = 4
"""Number of rows on which an engine is checked before it is used."""
Noise = Callable[[torch.Tensor], torch.Tensor]


class TailEngine:
    """Forward passes that begin at a layer, over a fixed set of rows."""

    def __init__(
        self, loaded: LoadedModel, rows: Sequence[TokenRow], layers: Iterable[int] = (), *, on_disk: bool = True
    ):
        """rows: all rows that will ever be computed. layers: where trials will train, to compute their states in one pass;
        others are computed when needed. on_disk: as for `boundary_states`.

        Raises NoTailView for a model that has no tail views, or whose views, tried on some of the rows, do not compute what
        the model does.
        """
        if reason := supports_tail(loaded.model):
            raise NoTailView(reason)
        self.model, self.fingerprint, self.on_disk = loaded.model, loaded.fingerprint, on_disk
        self.tree = PrefixTree(rows)
        self.limit, views = _try_views(loaded.model, rows)
        self._views = {loaded.model.dtype: views}
        self._models: dict[torch.dtype, PreTrainedModel] = {}
        self.layers = tuple(sorted({*layers}))
        """The layers where trials will train, as far as known."""
        self.states = self._states_entering({*self.layers, n_layers(loaded.model) - 1})

    def forward(self, layer: int, dtype: torch.dtype | None = None, noise: Noise | None = None) -> Forward:
        """A forward whose weights may differ from the model's in `layer` and above. dtype: the model's by default. noise:
        as for `training_forward`."""
        start, views = self._start(layer), self.views(dtype or self.model.dtype)
        return self._forward(start, views, views.tail(start), noise)

    def over(self, rows: Sequence[TokenRow]) -> "TailEngine":
        """An engine of the same model over other rows. Raises NoTailView like the constructor if these are longer than a window
        and the model's views do not compute them as the model does."""
        twin = copy.copy(self)
        twin.tree = PrefixTree(rows)
        if self.limit and not _may_be_packed(self.model, rows):
            twin.limit, views = _try_views(self.model, rows)
            twin._views = {self.model.dtype: views}
        twin.states = twin._states_entering(())
        return twin

    def training_forward(
        self, position: TuningPosition, rows: Sequence[TokenRow], dtype: torch.dtype, noise: Noise | None = None
    ) -> Forward:
        """A forward for training one position on these rows. noise: changes the states that each step begins with.

        A matrix whose product is simply added to the layer's output (`mlp_down` without a norm after it) needs nothing
        of its layer but its own inputs, which are as constant as the states below. Steps then begin above the layer.
        """
        names = parameter_names(self.model, position)
        above = self._forward_above(position.layer, names, rows, self.views(dtype)) if noise is None else None
        return above or self.forward(position.layer, dtype, noise)

    def coarse_forward(self, layer: int) -> Forward | None:
        """`forward` with bfloat16 products, for decisions that are not close (`locft.measure.token_scores.retake`).

        Fused layers above `layer` (`locft.engine.llama_kernel`) are computed in bfloat16 and added up in float32. None
        if this would not be faster on the hardware.
        """
        if not coarse_pays(self.model):
            return None
        start, views = self._start(layer), self.views(self.model.dtype)
        tail = views.mixed_tail(start, layer + 1, self.views(torch.bfloat16)) or views.tail(start)
        exact = self._forward(start, views, tail)
        return lambda weights: torch.no_grad()(coarse_products()(exact(weights)))

    def unedited(self) -> SupervisedLogits:
        """The unedited model, from the last layer on."""
        return self.forward(n_layers(self.model) - 1)({})

    def views(self, dtype: torch.dtype) -> ModelViews:
        """The model's views in a dtype."""
        if dtype not in self._views:
            self._views[dtype] = ModelViews(self.model_in(dtype), packed=self.limit > 0)
        return self._views[dtype]

    def model_in(self, dtype: torch.dtype) -> PreTrainedModel:
        """The model in a dtype."""
        if dtype not in self._models:
            self._models[dtype] = cast_model(self.model, dtype, self.fingerprint, on_disk=self.on_disk)
        return self._models[dtype]

    def _forward(self, start: int, views: ModelViews, tail: PreTrainedModel, noise: Noise | None = None) -> Forward:
        def bind(weights: Mapping[str, torch.Tensor]) -> SupervisedLogits:
            own = views.tail_weights(weights)

            def supervised_logits(rows: Sequence[TokenRow]) -> torch.Tensor:
                pack = pack_rows(self.tree, rows, self.limit)
                boundary = self._boundary(start, pack, views)
                return views.logits(tail, noise(boundary) if noise else boundary, pack, own)

            return supervised_logits

        return bind

    def _forward_above(
        self, layer: int, names: Sequence[str], rows: Sequence[TokenRow], views: ModelViews
    ) -> Forward | None:
        """The forward that begins after a matrix; None unless the layer's output is linear in it."""
        path = names[0].rpartition(".")[0]
        owner = self.model.get_submodule(path)
        if type(owner) is not nn.Linear or set(names) != {f"{path}.{name}" for name, _ in owner.named_parameters()}:
            return None
        base = {name: self.model.get_parameter(name).detach().float() for name in names}
        nodes = np.unique(np.concatenate([self.tree.path(row) for row in rows]))  # (U,)
        passed = self._pass_layer(layer, names, rows, nodes, views, base)
        if passed is None:
            return None
        leaving, entering = passed
        place_of = np.zeros(len(self.tree), dtype=np.int64)
        place_of[nodes] = np.arange(len(nodes))

        def bind(weights: Mapping[str, torch.Tensor]) -> SupervisedLogits:
            def edited(nodes: np.ndarray) -> torch.Tensor:
                places = moved(torch.from_numpy(place_of[nodes]), leaving.device)
                return leaving[places] + linear_change(names, weights, base, entering[places])

            def supervised_logits(batch: Sequence[TokenRow]) -> torch.Tensor:
                if layer + 1 == n_layers(self.model):  # no attention follows: other tokens do not matter
                    predicting = np.concatenate([self.tree.predicting(row) for row in batch])
                    return views.head(views.final_norm(edited(predicting)))
                pack = pack_rows(self.tree, batch, self.limit)
                return views.logits(views.tail(layer + 1), edited(np.maximum(pack.nodes.numpy(), 0)), pack, {})

            return supervised_logits

        return bind

    def _pass_layer(
        self,
        layer: int,
        names: Sequence[str],
        rows: Sequence[TokenRow],
        nodes: np.ndarray,
        views: ModelViews,
        base: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """For the nodes of the rows, hidden states leaving the layer (U, D) and those entering the matrix (U, F).

        None if a change of the matrix, tried on the first rows, does not simply add its product to what leaves the
        layer.
        """
        start = self._start(layer)
        found: tuple[torch.Tensor, torch.Tensor] | None = None
        for part in batches(rows, tokens=TOKENS_AT_ONCE, supervised=math.inf):
            pack = pack_rows(self.tree, rows[part], self.limit)
            boundary, inside = self._boundary(start, pack, views), pack.nodes >= 0
            after, inputs = views.through_layer(start, layer, names[0], boundary, pack, base)
            if found is None:
                generator = torch.Generator().manual_seed(0)
                changed = {n: v + 0.05 * torch.randn(v.shape, generator=generator).to(v) for n, v in base.items()}
                moved = views.through_layer(start, layer, names[0], boundary, pack, changed)[0] - after
                added = linear_change(names, changed, base, inputs)
                tolerance = 1e-3 if views.dtype == torch.float32 else 5e-2
                if added.shape != moved.shape or (moved - added)[inside].norm() > tolerance * added[inside].norm():
                    return None
                kept = partial(scratch, len(nodes), on_disk=self.on_disk)
                found = kept(after), kept(inputs)
            places = torch.from_numpy(np.searchsorted(nodes, pack.nodes[inside].numpy()))
            for states, here in zip(found, (after, inputs), strict=True):
                states[places] = here[inside]
        return found

    def _start(self, layer: int) -> int:
        """The layer whose stored states a tail for `layer` begins with: `layer` itself if the disk has space for all."""
        start = self.states.below(layer)
        if start not in self.states.layers:
            self.states.layers.update(self._states_entering({start}).layers)
        return start

    def _states_entering(self, layers: Iterable[int]) -> BoundaryStates:
        return boundary_states(self.model, self.fingerprint, self.tree, layers, self.limit, on_disk=self.on_disk)

    def _boundary(self, start: int, pack: Pack, views: ModelViews) -> torch.Tensor:
        states = self.states.gather(start, pack.nodes, self.model.device)
        return states.to(views.dtype) if states.dtype == self.model.dtype else states  # mamba's stay float32


def logits_with(
    loaded: LoadedModel, engine: TailEngine | None, layer: int, weights: Mapping[str, torch.Tensor]
) -> SupervisedLogits:
    """The model with weights in `layer` and above that stand in for its own; a full forward pass if there is no engine."""
    return engine.forward(layer)(weights) if engine else full_forward(loaded.model, weights)


def unedited_logits(loaded: LoadedModel, engine: TailEngine | None) -> SupervisedLogits:
    """The model as it is; a full forward pass if there is no engine."""
    return engine.unedited() if engine else full_forward(loaded.model)


def coarse_pays(model: PreTrainedModel) -> bool:
    """True if bfloat16 products for this model would be faster on this machine than exact ones."""
    return model.dtype == torch.float32 and training_precision(model.device.type) == "bfloat16"


@contextmanager
def coarse_products() -> Iterator[None]:
    """Within this context, products of float32 matrices round their factors to bfloat16."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def _try_views(model: PreTrainedModel, rows: Sequence[TokenRow]) -> tuple[int, ModelViews]:
    """The limit for packs, and views that compute what the model does: tried on a few of the rows, through all layers.

    Some models do not compute the same for rows packed into one sequence as for single rows: those with a recurrent state,
    with position biases made from a two-dimensional mask, or with a window shorter than a row. Each of their rows gets a
    sequence of its own.
    """
    sample = list({row.token_ids: row for row in rows}.values())[:_SAMPLE]
    expected = torch.cat([full_forward(model)([row]) for row in sample])
    for limit in [SEQUENCE_TOKENS, 0] if _may_be_packed(model, rows) else [0]:
        views = ModelViews(model, packed=limit > 0)
        if _agree(views, model, sample, limit, expected):
            return limit, views
    raise NoTailView(
        f"running this {model.config.model_type} model from a layer upwards does not give what its full "
        "forward pass gives"
    )


def _may_be_packed(model: PreTrainedModel, rows: Sequence[TokenRow]) -> bool:
    config = model.config.get_text_config()
    longest = max(len(row.token_ids) for row in rows)
    try:
        windows = [getattr(config, name, None) for name in _WINDOWS]
    except RuntimeError:  # it differs from layer to layer
        return False
    return not getattr(model, "_is_stateful", False) and all(not window or longest <= window for window in windows)


def _agree(
    views: ModelViews, model: PreTrainedModel, sample: Sequence[TokenRow], limit: int, expected: torch.Tensor
) -> bool:
    """Whether tails from the first, a middle and the last layer give `expected`: a dependence on lower ones shows in upper ones."""
    count = n_layers(model)
    pack = pack_rows(PrefixTree(sample), sample, limit and sum(len(row.token_ids) for row in sample))
    mask, position_ids, token_ids = pack.inputs(model.dtype, model.device)
    inputs = token_ids, mask, position_ids
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    try:
        require_only_states(model, *inputs)
        states = capture_boundary(model, range(count), *inputs)
        found = [views.logits(views.tail(layer), states[layer], pack, {}) for layer in {0, count // 2, count - 1}]
    except NoTailView:
        raise
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError, KeyError):
        return False
    return all(bool((one - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)) for one in found)
