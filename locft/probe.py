"""Cheap scores of every position at once, from one backward pass over edits and a few dozen over plain text.

Legend: g gradient of the mean edit loss, s = sign(g) the direction of Adam's first step, F Fisher information on prose.

What a position would learn from a small step along s is ||g||_1 per unit of learning rate, and what the step would
disturb is KL = 1/2 lr^2 s'Fs. So s'Fs / ||g||_1^2 is the disturbance that a unit of learning costs there, free of any
learning rate: `disturbance`, which ranks positions. The others are the scores of the literature, for comparison.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from locft.train.encoding import TokenRow
from locft.train.pipelines import batch_loss
from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, parameter_names
from locft.train.reference import full_forward

COORDINATES = 2**20
"""Gradient entries looked at per parameter: all of a small model's, a random sample of a large one's."""
TOGETHER = 16
"""About so many windows give the gradient of prose itself."""
WINDOW = 32
"""Tokens of one piece of prose: short ones give more directions for the same work."""


@dataclass(frozen=True)
class PositionScores:
    """Of one position. All from the unedited model."""

    position: TuningPosition
    disturbance: float
    """KL on prose, in nats per token, that a unit (one nat squared) of first-order learning costs; low is good."""
    gain: float
    """||g||_1: decrease of the mean edit loss per unit of learning rate of a sign step, in nats."""
    energy: float
    """||g||_2^2, the capacity to learn of arXiv 2605.06183."""
    gradient_ratio: float
    """||g||_2 of the edits over that of prose."""
    alignment: float
    """Cosine between the gradient of the edits and that of prose: negative where learning the edits harms prose."""


def probe_positions(
    loaded: LoadedModel,
    edits: Sequence[TokenRow],
    prose: Sequence[TokenRow],
    positions: Iterable[TuningPosition],
    *,
    seed: int = 0,
) -> tuple[PositionScores, ...]:
    """Scores in the order of the positions.

    edits: training rows, one per edit; all go through the model at once. prose: rows of running text, cut into windows of
    `WINDOW` tokens; some thirty windows are enough. The Fisher information is that of the model's own predictions (labels
    are drawn from it with `seed`). The model is left as it was.
    """
    model, chosen = loaded.model, tuple(positions)
    names = {position: parameter_names(model, position) for position in chosen}
    watched = {name: model.get_parameter(name) for group in names.values() for name in group}
    windows = _windows(prose)
    if not windows:
        raise ValueError("the probe needs prose of more than one token")
    generator = torch.Generator().manual_seed(seed)
    places = {name: _sample(parameter, generator) for name, parameter in watched.items()}
    forward = full_forward(model)

    edit = _gradients(watched, places, lambda: batch_loss(forward(edits), edits, "edit"))
    signs = {name: found.entries.sign() for name, found in edit.items()}
    squared = dict.fromkeys(chosen, 0.0)  # sums over windows of (s . gradient of sampled labels)^2
    few = windows[:: max(1, len(windows) // TOGETHER)]
    text = _gradients(watched, places, lambda: batch_loss(forward(few), few, "token"))
    tokens = sum(len(window.target_ids) for window in windows)
    for window in windows:

        def sampled(window: TokenRow = window) -> torch.Tensor:
            logits = forward([window])
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")

        here = _gradients(watched, places, sampled)
        dots = {name: found.scale * float(signs[name] @ found.entries) for name, found in here.items()}
        for position, group in names.items():
            squared[position] += sum(dots[name] for name in group) ** 2
    return tuple(_scores(position, names[position], edit, text, squared[position] / tokens) for position in chosen)


@dataclass(frozen=True)
class _Gradient:
    """What is kept of a parameter's gradient."""

    entries: torch.Tensor  # (C,) the sampled ones
    scale: float
    """Entries of the parameter per sampled one."""
    absolute: float
    """Sum of absolute values of all entries."""
    squares: float
    """Sum of squares of all entries."""


def _scores(
    position: TuningPosition,
    group: Sequence[str],
    edit: Mapping[str, _Gradient],
    prose: Mapping[str, _Gradient],
    fisher: float,
) -> PositionScores:
    gain, energy = (sum(getattr(edit[name], of) for name in group) for of in ("absolute", "squares"))
    prose_squares = sum(prose[name].squares for name in group)
    dot = sum(edit[name].scale * float(prose[name].entries @ edit[name].entries) for name in group)
    norms = math.sqrt(energy * prose_squares)
    return PositionScores(
        position,
        disturbance=0.5 * fisher / gain**2 if gain else math.inf,
        gain=gain,
        energy=energy,
        gradient_ratio=math.sqrt(energy / prose_squares) if prose_squares else math.inf,
        alignment=dot / norms if norms else 0.0,
    )


def _gradients(watched: Mapping[str, nn.Parameter], places: Mapping[str, torch.Tensor | None], loss) -> dict[str, _Gradient]:
    """Gradients of a loss, each reduced and dropped as soon as it is there: never all of them in memory."""
    kept: dict[str, _Gradient] = {}
    hooks = []

    def reduce(name: str, parameter: nn.Parameter) -> None:
        gradient = parameter.grad.detach().float().reshape(-1)
        parameter.grad = None
        place = places[name]
        entries = gradient if place is None else gradient[place]
        kept[name] = _Gradient(
            entries.cpu(), len(gradient) / len(entries), float(gradient.abs().sum()), float(gradient @ gradient)
        )

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
    """Places of the entries that are looked at, None for all."""
    if parameter.numel() <= COORDINATES:
        return None
    return torch.randint(parameter.numel(), (COORDINATES,), generator=generator).to(parameter.device)


def _windows(prose: Sequence[TokenRow]) -> list[TokenRow]:
    pieces = [row.token_ids[at : at + WINDOW] for row in prose for at in range(0, len(row.token_ids), WINDOW)]
    return [TokenRow(piece, 1) for piece in pieces if len(piece) > 1]
