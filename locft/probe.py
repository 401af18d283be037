"""Cheap scores of every position at once, from one backward pass over edits and a few dozen over plain text.

Legend: g gradient of the mean edit loss, s = sign(g) the direction of Adam's first step, F Fisher information on prose,
C gradient entries looked at.

What a position would learn from a small step along s is ||g||_1 per unit of learning rate, and what the step would
disturb is KL = 1/2 lr^2 s'Fs. So s'Fs / (2 ||g||_1^2) is the disturbance that a unit of learning costs there, whatever
the learning rate: `disturbance`, which ranks positions.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, parameter_names
from locft.train.objective import batch_loss
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow

COORDINATES = 2**20
"""Gradient entries looked at per parameter: all of a small model's, a random sample of a large one's."""
WINDOW = 32
"""Tokens of one piece of prose: short pieces give more directions for the same work."""


@dataclass(frozen=True)
class PositionScores:
    """Scores of one position of the unedited model."""

    position: TuningPosition
    disturbance: float
    """KL on prose, in nats per token, that a unit (one nat squared) of first-order learning costs; low is good."""
    gain: float
    """||g||_1: decrease of the mean edit loss, in nats, per unit of learning rate of a sign step."""


def probe_positions(
    loaded: LoadedModel,
    edits: Sequence[TokenRow],
    prose: Sequence[TokenRow],
    positions: Iterable[TuningPosition],
    *,
    seed: int = 0,
) -> tuple[PositionScores, ...]:
    """Scores in the order of the positions. The model is left as it was.

    edits: training rows, one per edit; all go through the model at once. prose: rows of running text, cut into windows
    of `WINDOW` tokens; some thirty windows are enough. The Fisher information is that of the model's own predictions
    (labels are drawn from them with `seed`). Raises ValueError when no row of prose has two tokens.
    """
    model, chosen = loaded.model, tuple(positions)
    names = {position: parameter_names(model, position) for position in chosen}
    watched = {name: model.get_parameter(name) for group in names.values() for name in group}
    windows = [TokenRow(ids, 1) for row in prose for ids in _windows(row.token_ids)]
    if not windows:
        raise ValueError("the probe needs prose of more than one token")
    generator = torch.Generator().manual_seed(seed)
    places = {name: _sample(parameter, generator) for name, parameter in watched.items()}
    forward = full_forward(model)

    edit = _gradients(watched, places, lambda: batch_loss(forward(edits), edits, "edit"))
    signs = {name: found.entries.sign() for name, found in edit.items()}
    squared = dict.fromkeys(chosen, 0.0)  # sums over windows of (s . gradient of sampled labels)^2
    for window in windows:

        def sampled(window: TokenRow = window) -> torch.Tensor:
            logits = forward([window])
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")

        here = _gradients(watched, places, sampled)
        dots = {name: found.scale * float(signs[name] @ found.entries) for name, found in here.items()}
        for position, group in names.items():
            squared[position] += sum(dots[name] for name in group) ** 2
    tokens = sum(len(window.target_ids) for window in windows)
    scores = []
    for position in chosen:
        gain = sum(edit[name].absolute for name in names[position])
        disturbance = 0.5 * (squared[position] / tokens) / gain**2 if gain else math.inf
        scores.append(PositionScores(position, disturbance, gain))
    return tuple(scores)


@dataclass(frozen=True)
class _SampledGradient:
    """What is kept of a parameter's gradient."""

    entries: torch.Tensor  # (C,) the sampled ones
    scale: float
    """Entries of the parameter per sampled one."""
    absolute: float
    """Sum of absolute values of all entries."""


def _gradients(
    watched: Mapping[str, nn.Parameter], places: Mapping[str, torch.Tensor | None], loss: Callable[[], torch.Tensor]
) -> dict[str, _SampledGradient]:
    """Gradients of a loss. Each is reduced and dropped as soon as it is computed, to save memory."""
    kept: dict[str, _SampledGradient] = {}
    hooks = []

    def reduce(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs right after it was accumulated
        gradient = parameter.grad.detach().float().reshape(-1)
        parameter.grad = None
        place = places[name]
        entries = gradient if place is None else gradient[place]
        kept[name] = _SampledGradient(entries.cpu(), len(gradient) / len(entries), float(gradient.abs().sum()))

    try:
        for name, parameter in watched.items():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(lambda p, name=name: reduce(name, p)))
        with torch.enable_grad():
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in watched.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return kept


def _sample(parameter: nn.Parameter, generator: torch.Generator) -> torch.Tensor | None:
    """Indices of the entries looked at; None for all."""
    if parameter.numel() <= COORDINATES:
        return None
    return torch.randint(parameter.numel(), (COORDINATES,), generator=generator).to(parameter.device)


def _windows(ids: tuple[int, ...]) -> list[tuple[int, ...]]:
    pieces = [ids[at : at + WINDOW] for at in range(0, len(ids), WINDOW)]
    return [piece for piece in pieces if len(piece) > 1]
