"""Cheap scores of every position at once, from one backward pass over edits and a few dozen over plain text.

Legend: g gradient of the mean edit loss, s = sign(g) the direction of Adam's first step, F Fisher information on prose,
N entries of a parameter.

What a position would learn from a small step along s is ||g||_1 per unit of learning rate, and what the step would
disturb is KL = 1/2 lr^2 s'Fs. So s'Fs / (2 ||g||_1^2) is the disturbance that a unit of learning costs there, whatever
the learning rate: `disturbance`, which ranks positions. s'Fs is the mean square of s'h over gradients h of sampled labels, and
every entry counts: the square of an estimate from a sample of them would be too large, most of all for large matrices.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from locft.model.models import LoadedModel
from locft.model.positions import TuningPosition, parameter_names
from locft.train.objective import batch_loss
from locft.train.reference import full_forward
from locft.train.token_rows import TokenRow, windows

AT_ONCE = 2**18
"""Groups of four entries of a gradient that are multiplied with their signs at a time, so that little memory is needed."""
WINDOW = 32
"""Tokens of one piece of prose: short pieces give more directions for the same work."""

T = TypeVar("T")


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
    model = loaded.model
    names = {position: parameter_names(model, position) for position in positions}
    watched = {name: model.get_parameter(name) for group in names.values() for name in group}
    pieces = windows(prose, WINDOW)
    if not pieces:
        raise ValueError("the probe needs prose of more than one token")
    generator = torch.Generator().manual_seed(seed)
    forward = full_forward(model)

    signs = _gradients(watched, lambda name, found: Signs(found), lambda: batch_loss(forward(edits), edits, "edit"))
    squared = dict.fromkeys(names, 0.0)  # sums over pieces of (s . gradient of sampled labels)^2

    def sampled(piece: TokenRow) -> torch.Tensor:
        logits = forward([piece])
        drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return F.cross_entropy(logits, drawn.to(logits.device), reduction="sum")

    for piece in pieces:
        dots = _gradients(watched, lambda name, found: signs[name].dot(found), partial(sampled, piece))
        for position, group in names.items():
            squared[position] += sum(dots[name] for name in group) ** 2
    tokens = sum(len(piece.target_ids) for piece in pieces)
    scores = []
    for position, group in names.items():
        gain = sum(signs[name].absolute for name in group)
        disturbance = 0.5 * (squared[position] / tokens) / gain**2 if gain else math.inf
        scores.append(PositionScores(position, disturbance, gain))
    return tuple(scores)


class Signs:
    """The signs of a gradient in two bits per entry, an eighth of the memory of bfloat16 weights."""

    def __init__(self, gradient: torch.Tensor):
        """gradient: (N,), on any device, where the signs stay."""
        self.absolute = float(gradient.abs().sum())
        """||g||_1."""
        place = torch.tensor([1, 4, 16, 64], dtype=torch.uint8, device=gradient.device)
        parts = ((part.sign() + 1).to(torch.uint8) for part in _groups(gradient).split(AT_ONCE))
        self.codes = torch.cat([(part * place).sum(1, dtype=torch.uint8) for part in parts])
        """(N/4,), four signs in each."""
        self.table = (torch.arange(256, device=gradient.device)[:, None] // place.long() % 4 - 1).float()
        """(256, 4), the signs of a code."""

    def dot(self, gradient: torch.Tensor) -> float:
        """s'h with another gradient h of the parameter, (N,)."""
        parts = zip(_groups(gradient).split(AT_ONCE), self.codes.split(AT_ONCE), strict=True)
        found = [torch.dot(part.flatten(), F.embedding(codes.int(), self.table).flatten()) for part, codes in parts]
        return float(torch.stack(found).double().sum())


def _groups(gradient: torch.Tensor) -> torch.Tensor:
    """(N,) -> (N/4, 4), with zeros at the end."""
    return F.pad(gradient, (0, -len(gradient) % 4)).view(-1, 4)


def _gradients(
    watched: Mapping[str, nn.Parameter], reduced: Callable[[str, torch.Tensor], T], loss: Callable[[], torch.Tensor]
) -> dict[str, T]:
    """What `reduced` makes of the name and the gradient (N,) of each parameter, which is dropped at once to save memory."""
    kept: dict[str, T] = {}
    hooks = []

    def reduce(name: str, parameter: nn.Parameter) -> None:
        assert parameter.grad is not None  # the hook runs right after it was accumulated
        gradient = parameter.grad.detach().float().reshape(-1)
        parameter.grad = None
        kept[name] = reduced(name, gradient)

    try:
        for name, parameter in watched.items():
            parameter.requires_grad_(True)
            hooks.append(parameter.register_post_accumulate_grad_hook(partial(reduce, name)))
        with torch.enable_grad():
            loss().backward()
    finally:
        for hook in hooks:
            hook.remove()
        for parameter in watched.values():
            parameter.requires_grad_(False)
            parameter.grad = None
    return kept
