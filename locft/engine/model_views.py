"""The parts of a model that trials run, in one dtype.

Legend: G sequences of a pack, N tokens of each, D hidden, F width of a matrix's input, K supervised tokens, V
vocabulary.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from locft.engine.llama_kernel import FusedLayer, fuse_layers
from locft.engine.packing import Pack
from locft.engine.tail import PassEnded, head_view, output_states, reconfigure, tail_hidden, tail_view
from locft.model.positions import decoder_layers, n_layers
from locft.process import moved


class ModelViews:
    """The head, and tails from any layer, which are made on first use and kept."""

    def __init__(self, model: PreTrainedModel, packed: bool):
        """packed: rows come in packs with our own masks, not one sequence per row."""
        self.dtype, self.packed = model.dtype, packed
        self.model = tail_view(model, 0)
        if packed:
            if model.device.type == "cpu":
                # With a mask given, eager attention is several times faster on a CPU than PyTorch's kernel.
                reconfigure(self.model, _attn_implementation="eager")
            fuse_layers(self.model)
        self.head = head_view(self.model)
        self._tails: dict[int, PreTrainedModel] = {}

    def tail(self, start: int) -> PreTrainedModel:
        """The view from layer `start` upwards."""
        if start not in self._tails:
            self._tails[start] = tail_view(self.model, start)
        return self._tails[start]

    def mixed_tail(self, start: int, stop: int, coarse: "ModelViews") -> PreTrainedModel | None:
        """The tail from `start` with another dtype's fused layers from `stop` on; None if none is fused."""
        theirs = decoder_layers(coarse.model)
        if not any(isinstance(layer, FusedLayer) for layer in theirs[stop:]):
            return None
        tail = tail_view(self.model, start)
        layers = decoder_layers(tail)
        for index, layer in enumerate(theirs[stop:], stop):
            if isinstance(layer, FusedLayer):
                layers[index] = layer
        return tail

    def tail_weights(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Weights in the views' dtype."""
        return {name: value.to(self.model.get_parameter(name).dtype) for name, value in weights.items()}

    def logits(
        self, tail: PreTrainedModel, boundary: torch.Tensor, pack: Pack, weights: Mapping[str, torch.Tensor]
    ) -> torch.Tensor:
        """(K, V) from the hidden states (G, N, D) entering a tail. weights: as from `tail_weights`."""
        mask, position_ids, token_ids = pack.inputs(self.dtype, self.model.device)
        hidden = tail_hidden(tail, boundary, mask, position_ids, weights, token_ids)
        return self.head(hidden[moved(pack.sequence, hidden.device), moved(pack.place, hidden.device)])

    def final_norm(self, hidden: torch.Tensor) -> torch.Tensor:
        """(K, D) after the last layer -> (K, D) as the head expects them."""
        if self.packed:  # given a mask of ones, a model would check whether it is all ones
            mask = hidden.new_zeros(len(hidden), 1, 1, 1)
        else:
            mask = torch.ones(len(hidden), 1, dtype=torch.long, device=hidden.device)
        return tail_hidden(self.tail(n_layers(self.model)), hidden[:, None], mask)[:, 0]

    @torch.no_grad()
    def through_layer(
        self, start: int, layer: int, name: str, boundary: torch.Tensor, pack: Pack, weights: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states leaving `layer` (G, N, D), and those entering the module in it that owns parameter `name` (G, N, F).

        boundary: hidden states (G, N, D) entering layer `start`. weights: by parameter name, in place of the model's own.
        """
        view = self.tail(start)
        module = view.get_submodule(name.rpartition(".")[0])
        entering: list[torch.Tensor] = []
        leaving: list[torch.Tensor] = []

        def leave(_module: nn.Module, _args: tuple, output: Any) -> None:
            leaving.append(output_states(output))
            raise PassEnded

        hooks = [
            module.register_forward_pre_hook(lambda _module, args: entering.append(args[0])),
            decoder_layers(view)[layer].register_forward_hook(leave),
        ]
        mask, position_ids, token_ids = pack.inputs(self.dtype, self.model.device)
        try:
            with suppress(PassEnded):
                tail_hidden(view, boundary, mask, position_ids, self.tail_weights(weights), token_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return leaving[0], entering[-1]


def linear_change(
    names: Sequence[str], weights: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor], inputs: torch.Tensor
) -> torch.Tensor:
    """What a linear module adds to its output when its weights differ from the base: (..., F) -> (..., D)."""
    change = {name.rpartition(".")[2]: (weights[name] - base[name]).to(inputs.dtype) for name in names}
    return F.linear(inputs, change["weight"], change.get("bias"))
