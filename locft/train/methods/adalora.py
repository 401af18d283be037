"""AdaLoRA at a position (arXiv 2303.10512): like LoRA, with rank allocated to where it is needed.

Legend: O rows and I columns of a matrix as it is stored, R the initial rank. Stacked experts have a leading dimension, and
each counts as a matrix.

The change of a matrix is P diag(values) Q. P and Q are kept nearly orthogonal, so that each value with its pair of vectors is
a separate part of the change. Training starts with more of these triplets than requested; the least important ones across all
matrices are then masked, in growing numbers, until on average `rank` per matrix are left.
"""

import math
from collections.abc import Mapping, Sequence

import torch

from locft.train.methods.lora import is_matrix
from locft.train.methods.method import Loss, Method, MethodSettings, Parameter

START = 1.5
"""Initial rank as a multiple of the final rank (the paper, section 4; peft's defaults are 12 and 8)."""
WARM_UP, LAST = 0.15, 0.5
"""Shares of the steps before ranks begin to fall and after they have settled. The paper's own runs on the smaller data sets
of GLUE use 12% to 17% and 46% to 52% (github.com/QingruZhang/AdaLoRA, NLU/scripts; steps derived from the data set sizes)."""
MASKINGS = 1000
"""Maximum number of times triplets are masked; in a training of fewer steps, after every step (as in the same scripts)."""
ORTHOGONALITY = 0.5
"""Weight of the mean distance of P'P and QQ' from the identity, in Frobenius norm (peft's default)."""
SMOOTHING = 0.85
"""Smoothing factor for importance and its spread from step to step (the paper's, and peft's default)."""
DEVIATION = 0.02
"""Standard deviation of the vectors' initial entries."""


class AdaLoRA(Method):
    """weights = origin + alpha / R * P diag(values) Q, all three trained by Adam; the values start at zero.

    Which triplets are masked, and when, is as in peft, but over a fixed share of the maximum number of steps.
    A training that ends early keeps the ranks that it has by then. A new edit (depth_first) continues with the triplets of the
    previous ones, their importance and a new Adam: the ranks are those of the whole training.
    """

    def __init__(self, parameters: Mapping[str, Parameter], settings: MethodSettings, steps: int):
        start = math.ceil(START * settings.rank)
        self.scale = settings.alpha / start
        draws = torch.Generator().manual_seed(settings.seed)
        self.triplets = {
            name: Triplets(parameter.base, start, draws)
            for name, parameter in parameters.items()
            if is_matrix(name, parameter.base)
        }
        self.matrices = sum(each.values[..., 0, 0].numel() for each in self.triplets.values())
        self.budget = Budget(self.matrices * start, self.matrices * settings.rank, max(1, steps))
        self.taken = torch.tensor(0)
        super().__init__(parameters, settings)

    def trained(self) -> list[torch.Tensor]:
        return [tensor for each in self.triplets.values() for tensor in each.trained]

    def stepped(self) -> dict[str, torch.Tensor]:
        found = {**super().stepped(), "taken": self.taken}
        for name, each in self.triplets.items():
            tensors = (*each.trained, each.masked, *each.importance, *each.spread)
            found |= {f"triplets/{name}/{place}": tensor for place, tensor in enumerate(tensors)}
        return found

    @torch.no_grad()
    def step(self, gradients: Sequence[torch.Tensor], loss: Loss, beside: Loss = 0.0) -> None:
        for name, gradient in zip(self.weights, gradients, strict=True):
            if name in self.triplets:
                self.triplets[name].take(gradient.mul_(self.scale), ORTHOGONALITY / (2 * self.matrices))
        self.optimiser.step()
        self._mask()
        self.taken += 1
        for name, each in self.triplets.items():
            torch.add(self.origin[name], each.product(), alpha=self.scale, out=self.weights[name])

    def _mask(self) -> None:
        """Set the values of triplets beyond the budget to zero; those masked when the budget settles stay at zero."""
        taken = int(self.taken)
        if taken < self.budget.settled:
            for each in self.triplets.values():
                each.rate()
        if self.budget.masks_at(taken):
            scores = {name: each.score() for name, each in self.triplets.items()}
            beyond = self.budget.start - self.budget.at(taken)
            threshold = torch.cat([score.flatten() for score in scores.values()]).kthvalue(beyond).values
            for name, each in self.triplets.items():
                each.masked = scores[name] <= threshold
        if self.budget.masks_at(taken) or taken > self.budget.settled:
            for each in self.triplets.values():
                each.values.masked_fill_(each.masked, 0.0)


class Budget:
    """Number of triplets that all matrices may have together, as a function of the number of steps taken before."""

    def __init__(self, start: int, end: int, steps: int):
        self.start, self.end, self.steps = start, end, steps
        self.warm_up = int(WARM_UP * steps)
        """The last step with all triplets."""
        self.settled = steps - int(LAST * steps)
        """The step from which the ranks no longer change."""

    def at(self, step: int) -> int:
        """The budget at a step, which falls cubically from `start` to `end`."""
        left = 1 - (step - self.warm_up) / (self.settled - self.warm_up)
        return int((self.start - self.end) * min(1.0, max(0.0, left)) ** 3 + self.end)

    def masks_at(self, step: int) -> bool:
        interval = max(1, self.steps // MASKINGS)
        return step == self.settled or (self.warm_up < step < self.settled and step % interval == 0)


class Triplets:
    """The triplets of one parameter."""

    def __init__(self, base: torch.Tensor, rank: int, draws: torch.Generator):
        *experts, rows, columns = base.shape
        left = DEVIATION * torch.randn(*experts, rows, rank, generator=draws)
        right = DEVIATION * torch.randn(*experts, rank, columns, generator=draws)
        self.trained = left.to(base.device), base.new_zeros(*experts, rank, 1), right.to(base.device)
        """P (..., O, R), the values (..., R, 1) and Q (..., R, I)."""
        self.left, self.values, self.right = self.trained
        self.masked = torch.zeros_like(self.values, dtype=torch.bool)
        """Which values the last masking selected, (..., R, 1)."""
        self.importance = [torch.zeros_like(tensor) for tensor in self.trained]
        """For each trained entry: |entry * gradient|, smoothed."""
        self.spread = [torch.zeros_like(tensor) for tensor in self.trained]
        """For each trained entry: deviation of |entry * gradient| from its importance, smoothed."""

    def product(self) -> torch.Tensor:
        """P diag(values) Q, (..., O, I)."""
        return self.left @ (self.values * self.right)

    def take(self, gradient: torch.Tensor, weight: float) -> None:
        """Set the gradients of the three: from that of their product, and of `weight` times the distances from orthogonality."""
        inner = self.left.mT @ gradient  # (..., R, I)
        self.left.grad = gradient @ (self.values * self.right).mT
        self.values.grad = (inner * self.right).sum(-1, keepdim=True)
        self.right.grad = inner.mul_(self.values)
        self.left.grad += weight * (self.left @ _distance_gradient(self.left.mT @ self.left))
        self.right.grad += weight * (_distance_gradient(self.right @ self.right.mT) @ self.right)

    def rate(self) -> None:
        """Update the importance of every entry with the gradients of this step."""
        for tensor, importance, spread in zip(self.trained, self.importance, self.spread, strict=True):
            now = (tensor * tensor.grad).abs_()
            importance.lerp_(now, 1 - SMOOTHING)
            spread.lerp_((now - importance).abs_(), 1 - SMOOTHING)

    def score(self) -> torch.Tensor:
        """Score of each triplet, (..., R, 1): importance times spread, its value's plus the means of its vectors'."""
        left, values, right = (i * s for i, s in zip(self.importance, self.spread, strict=True))
        return values + left.mean(-2)[..., None] + right.mean(-1, keepdim=True)


def _distance_gradient(gram: torch.Tensor) -> torch.Tensor:
    """The factor that V is multiplied by to give the gradient of ||V'V - 1|| at V; gram: V'V, (..., R, R)."""
    off = gram - torch.eye(gram.shape[-1], device=gram.device)
    return 2 * off / torch.linalg.matrix_norm(off, keepdim=True).clamp(min=torch.finfo(off.dtype).tiny)
