"""The fast forward: from the stored states at the trained layer upwards, and logits only where a token is supervised.

Everything about it is equal to `locft.train.reference.full_forward` up to rounding; the tests hold it to that on every
architecture, and `locft bench` measures both side by side.
"""

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from locft.engine.boundary_states import TOKENS_AT_ONCE, boundary_states
from locft.engine.fused_attention import attention_for, fuse
from locft.engine.llama_kernel import forget_layouts, fuse_layers, is_fused, only_at
from locft.engine.packed_linear import freeze_linears
from locft.engine.packing import Pack, PrefixTree, pack_rows
from locft.engine.tail import (
    NoTailView,
    capture_boundary,
    head_view,
    supports_tail,
    tail_hidden,
    tail_parameter_name,
    tail_view,
)
from locft.measure.two_stage_scoring import coarse_pays, coarse_products
from locft.model.dtype_copy import cast_model
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, decoder_layers, n_layers, parameter_names
from locft.train.encoding import Forward, SupervisedLogits, TokenRow, batches
from locft.train.reference import full_forward

SEQUENCE_TOKENS = 96
"""Tokens of a packed sequence: attention costs their square, and the ends of shorter ones are padding. Matrix products take
all sequences of a pack together."""

_SAMPLE = 4
"""Rows on which an engine is tried before it is used."""
_FEW = 1.3
"""Where so many times fewer tokens are supervised than there are, the last layer computes only theirs."""


class TailEngine:
    """Forwards that begin at a layer, over a fixed set of rows."""

    def __init__(
        self, loaded: LoadedModel, rows: Sequence[TokenRow], layers: Iterable[int] = (), *, on_disk: bool = True
    ):
        """rows: all that will ever be asked for. layers: where trials will train, to compute their states in one pass; others
        are computed when they are needed. on_disk: as of `boundary_states`.

        Raises NoTailView for a model that has none, or whose views, tried on some of the rows, do not compute what it does.
        """
        if reason := supports_tail(loaded.model):
            raise NoTailView(reason)
        self.model = loaded.model
        self.tree = PrefixTree(rows)
        self.limit, parts = _tried(loaded.model, rows)
        self._parts = {loaded.model.dtype: parts}
        self._compute = partial(
            boundary_states, loaded.model, loaded.fingerprint, self.tree, rows, limit=self.limit, on_disk=on_disk
        )
        self.states = self._compute(layers={*layers, n_layers(loaded.model) - 1})
        self._cast = partial(cast_model, loaded.model, fingerprint=loaded.fingerprint, on_disk=on_disk)

    def forward(self, layer: int, dtype: torch.dtype | None = None) -> Forward:
        """A forward whose weights may differ from the model's in `layer` and above, computed in `dtype` (the model's own)."""
        start = self._start(layer)
        parts = self._computing_in(dtype or self.model.dtype)

        def bind(weights: Mapping[str, torch.Tensor]) -> SupervisedLogits:
            own = parts.names(start, weights)

            def supervised_logits(rows: Sequence[TokenRow]) -> torch.Tensor:
                pack = pack_rows(self.tree, rows, self.limit)
                return parts.logits(parts.tail(start), self._boundary(start, pack, parts), pack, own)

            return supervised_logits

        return bind

    def training_forward(self, position: TuningPosition, rows: Sequence[TokenRow], dtype: torch.dtype) -> Forward:
        """As `forward`, for training one position on these rows.

        A matrix whose product is simply added to the layer's output (`mlp_down` without a norm behind it) needs nothing of
        its layer but its own inputs, which are as constant as the states below: the step then begins above the layer.
        """
        names = parameter_names(self.model, position)
        cut = self._cut(position.layer, names, rows, self._computing_in(dtype))
        return cut or self.forward(position.layer, dtype)

    def coarse_forward(self, layer: int) -> Forward | None:
        """The same from products of bfloat16 factors, for decisions that are not close (`locft.measure.two_stage_scoring`).

        Above `layer`, layers that are fused (`locft.engine.llama_kernel`) are computed in bfloat16 and added up in float32.
        None where the hardware would not be faster.
        """
        if not coarse_pays(self.model):
            return None
        start, parts = self._start(layer), self._computing_in(self.model.dtype)
        fused = any(map(is_fused, decoder_layers(parts.model)[layer + 1 :]))
        tail = parts.with_fused(start, layer + 1, self._computing_in(torch.bfloat16)) if fused else parts.tail(start)

        def bind(weights: Mapping[str, torch.Tensor]) -> SupervisedLogits:
            own = parts.names(start, weights)

            @torch.no_grad()
            def supervised_logits(rows: Sequence[TokenRow]) -> torch.Tensor:
                pack = pack_rows(self.tree, rows, self.limit)
                with coarse_products():
                    return parts.logits(tail, self._boundary(start, pack, parts), pack, own)

            return supervised_logits

        return bind

    def unedited(self) -> SupervisedLogits:
        """The unedited model, from the last layer on."""
        return self.forward(n_layers(self.model) - 1)({})

    def _cut(self, layer: int, names: Sequence[str], rows: Sequence[TokenRow], parts: "_Parts") -> Forward | None:
        """The forward that starts behind a matrix; None when the layer's output is not linear in it."""
        path = names[0].rpartition(".")[0]
        owner = self.model.get_submodule(path)
        if type(owner) is not nn.Linear or set(names) != {f"{path}.{name}" for name, _ in owner.named_parameters()}:
            return None
        start, base = self._start(layer), {name: self.model.get_parameter(name).detach().float() for name in names}
        nodes = np.unique(np.concatenate([self.tree.path(row) for row in rows]))
        outputs = inputs = None  # (nodes, D), (nodes, F)
        for part in batches(rows, tokens=TOKENS_AT_ONCE, supervised=math.inf):
            pack = pack_rows(self.tree, rows[part], self.limit)
            boundary, inside = self._boundary(start, pack, parts), pack.nodes >= 0
            after, entering = parts.through(start, layer, names[0], boundary, pack, base)
            if outputs is None:
                generator = torch.Generator().manual_seed(0)
                changed = {n: v + 0.05 * torch.randn(v.shape, generator=generator).to(v) for n, v in base.items()}
                moved = parts.through(start, layer, names[0], boundary, pack, changed)[0] - after
                added = parts.added(names, changed, base, entering)
                tolerance = 1e-3 if parts.dtype == torch.float32 else 5e-2
                if added.shape != moved.shape or (moved - added)[inside].norm() > tolerance * added[inside].norm():
                    return None
                outputs = torch.empty(len(nodes), after.shape[-1], dtype=after.dtype, device=after.device)
                inputs = torch.empty(len(nodes), entering.shape[-1], dtype=entering.dtype, device=after.device)
            local = torch.from_numpy(np.searchsorted(nodes, pack.nodes[inside].numpy()))
            outputs[local], inputs[local] = after[inside], entering[inside]
        place_of = torch.zeros(len(self.tree), dtype=torch.long)
        place_of[torch.from_numpy(nodes)] = torch.arange(len(nodes))

        def bind(weights: Mapping[str, torch.Tensor]) -> SupervisedLogits:
            def supervised_logits(batch: Sequence[TokenRow]) -> torch.Tensor:
                if layer + 1 == n_layers(self.model):  # no attention follows: other tokens do not matter
                    local = place_of[torch.from_numpy(np.concatenate([self.tree.predicting(row) for row in batch]))]
                    hidden = outputs[local] + parts.added(names, weights, base, inputs[local])
                    return parts.head(parts.final(hidden))
                pack = pack_rows(self.tree, batch, self.limit)
                local = place_of[pack.nodes.clamp(min=0)]
                boundary = outputs[local] + parts.added(names, weights, base, inputs[local])
                return parts.logits(parts.tail(layer + 1), boundary, pack, {})

            return supervised_logits

        return bind

    def _start(self, layer: int) -> int:
        """The layer whose stored states a tail for `layer` begins with: itself, unless the disk is too small for all."""
        start = self.states.below(layer)
        if start not in self.states.layers:
            self.states = replace(self.states, layers={**self.states.layers, **self._compute(layers={start}).layers})
        return start

    def _boundary(self, start: int, pack: Pack, parts: "_Parts") -> torch.Tensor:
        states = self.states.gather(start, pack.nodes).to(self.model.device)
        return states.to(parts.dtype) if states.dtype == self.model.dtype else states  # mamba's stay float32

    def _computing_in(self, dtype: torch.dtype) -> "_Parts":
        if dtype not in self._parts:
            self._parts[dtype] = _Parts(self._cast(dtype), packed=self.limit > 0)
        return self._parts[dtype]


class _Parts:
    """The pieces of a model that trials run, in one dtype; made when first used and kept."""

    def __init__(self, model: PreTrainedModel, packed: bool):
        """packed: rows come with masks of ours, for which `locft.engine.fused_attention` is several times faster on a CPU than PyTorch's kernel."""
        self.dtype = model.dtype
        self.model = tail_view(model, 0)
        configs: dict[int, Any] = {}
        for module in self.model.modules() if packed and model.device.type == "cpu" else ():
            if (config := getattr(module, "config", None)) is not None:
                module.config = configs.setdefault(id(config), copy.copy(config))
                module.config._attn_implementation = attention_for(model)
        if packed and model.device.type == "cpu":
            fuse(self.model)
        if self.dtype == torch.bfloat16 and model.device.type == "cpu":
            freeze_linears(self.model)
        if packed and model.device.type == "cpu":
            fuse_layers(self.model)
        self.head = head_view(self.model)
        self._tails: dict[tuple[int, int | None], PreTrainedModel] = {}

    def names(self, start: int, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights by the names and in the dtype of the tail from `start`."""
        return {
            tail_parameter_name(self.model, start, name): value.to(self.model.get_parameter(name).dtype)
            for name, value in weights.items()
        }

    def logits(
        self, tail: PreTrainedModel, boundary: torch.Tensor, pack: Pack, weights: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """(K, V) from the states (G, N, D) entering a tail."""
        device = self.model.device
        mask, position_ids = pack.attention_mask(self.dtype).to(device), pack.position_ids.to(device)
        run = partial(tail_hidden, tail, boundary, mask, position_ids, weights)
        places, own = pack.asked()
        if _FEW * places.shape[1] >= pack.nodes.shape[1]:
            return self.head(run()[pack.sequence, pack.place])
        with only_at(decoder_layers(tail)[-1], places):
            hidden = run()
        narrow = hidden.shape[1] == places.shape[1]
        return self.head(hidden[pack.sequence, own if narrow else pack.place])

    def final(self, hidden: torch.Tensor) -> torch.Tensor:
        """(K, D) behind the last layer -> (K, D) that the head takes: the final norm."""
        ones = torch.ones(1, len(hidden), dtype=torch.long, device=hidden.device)
        return tail_hidden(self.tail(n_layers(self.model)), hidden[None], ones)[0]

    @torch.no_grad()
    def through(
        self,
        start: int,
        layer: int,
        name: str,
        boundary: torch.Tensor,
        pack: Pack,
        weights: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What leaves `layer` (G, N, D), and what enters the module of parameter `name` in it (G, N, F)."""
        view, kept = self.tail(start, layer + 1), {}
        owner = view.get_submodule(tail_parameter_name(self.model, start, name).rpartition(".")[0])
        hooks = [
            owner.register_forward_pre_hook(lambda _m, args: kept.__setitem__("entering", args[0])),
            decoder_layers(view)[-1].register_forward_hook(
                lambda _m, _a, out: kept.__setitem__("after", out[0] if isinstance(out, tuple) else out)
            ),
        ]
        try:
            mask = pack.attention_mask(self.dtype).to(self.model.device)
            tail_hidden(view, boundary, mask, pack.position_ids.to(self.model.device), self.names(start, weights))
        finally:
            for hook in hooks:
                hook.remove()
        return kept["after"], kept["entering"]

    def added(
        self,
        names: Sequence[str],
        weights: Mapping[str, torch.Tensor],
        base: Mapping[str, torch.Tensor],
        inputs: torch.Tensor,
    ) -> torch.Tensor:
        """What a linear module adds to its output when its weights differ from the base: (..., F) -> (..., D)."""
        change = {name.rpartition(".")[2]: (weights[name] - base[name]).to(inputs.dtype) for name in names}
        return F.linear(inputs, change["weight"], change.get("bias"))

    def tail(self, start: int, stop: int | None = None) -> PreTrainedModel:
        key = (start, stop)
        if key not in self._tails:
            self._tails[key] = tail_view(self.model, start, stop)
        return self._tails[key]

    def with_fused(self, start: int, stop: int, others: "_Parts") -> PreTrainedModel:
        """The tail from `start`, but with another dtype's fused layers from `stop` on."""
        tail = tail_view(self.model, start)
        layers = decoder_layers(tail)
        for index, layer in enumerate(decoder_layers(others.model)[stop:], stop):
            if is_fused(layer):
                layers[index - start] = layer
        return tail


@torch.no_grad()
def _tried(model: PreTrainedModel, rows: Sequence[TokenRow]) -> tuple[int, _Parts]:
    """The limit for packs, and the parts that compute as the model does: tried on a few of the rows, through all layers.

    Models with a recurrent state or with position biases made from a two-dimensional mask do not compute rows packed into one
    sequence as they compute them alone, nor do those with a window shorter than a row: their rows have a sequence each.
    """
    sample = list({row.token_ids: row for row in rows}.values())[:_SAMPLE]
    expected = torch.cat([full_forward(model)([row]) for row in sample])
    limits = [SEQUENCE_TOKENS, 0] if _may_be_packed(model, rows) else [0]
    for limit in limits:
        parts = _Parts(model, packed=limit > 0)
        if _agrees(parts, model, sample, limit, expected):
            forget_layouts(parts.model)
            return limit, parts
    raise NoTailView(f"the views of this {model.config.model_type} model do not compute what it computes as a whole")


def _may_be_packed(model: PreTrainedModel, rows: Sequence[TokenRow]) -> bool:
    config = model.config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "window_size")]
    longest = max(len(row.token_ids) for row in rows)
    return not getattr(model, "_is_stateful", False) and all(not window or longest <= window for window in windows)


def _agrees(
    parts: _Parts, model: PreTrainedModel, sample: Sequence[TokenRow], limit: int, expected: torch.Tensor
) -> bool:
    tree = PrefixTree(sample)
    pack = pack_rows(tree, sample, limit and sum(len(row.token_ids) for row in sample))
    ids = torch.from_numpy(tree.token_ids)[pack.nodes.clamp(min=0)].to(model.device)
    mask, places = pack.attention_mask(model.dtype).to(model.device), pack.position_ids.to(model.device)
    try:
        found = parts.logits(parts.tail(0), capture_boundary(model, 0, ids, mask, places)[0], pack, {})
    except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
        return False
    tolerance = 1e-4 if model.dtype == torch.float32 else 5e-2
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1))
