"""One optimiser step for all models of a stack.

Each model has its own learning rate and weight decay; norms and moments never cross rows.  On a CPU
each is one call, ``clipped_adam``; elsewhere they are a handful of vector operations on [W, n].
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from fpt_fast.config import TrainConfig
from fpt_fast.ops.native_optimizer import clipped_adam, has_clipped_adam
from fpt_fast.sweep.stack import ModelStack

# As torch's own: the optimisers' epsilon, and that of ``clip_grad_norm_``.
_EPSILON = 1e-8
_CLIP_EPSILON = 1e-6


class StackOptimizer:
    """AdamW, Adam or SGD over a stack, with the recipe of ``torch.optim`` for each row.

    ``recipes``, one a model, may differ in learning rate, weight decay and seed only.
    """

    def __init__(self, stack: ModelStack, recipes: list[TrainConfig]) -> None:
        self._stack = stack
        self._recipe = recipes[0]
        self._decays = [recipe.weight_decay for recipe in recipes]
        self.steps = 0
        count = 1 if self._recipe.optimizer == "sgd" else 2
        self.moments = tuple(torch.zeros_like(stack.weights) for _ in range(count))

    def keep(self, rows: list[int]) -> None:
        """Drop the state of all models but ``rows``."""
        index = torch.tensor(rows, dtype=torch.int64, device=self._stack.weights.device)
        self._decays = [self._decays[row] for row in rows]
        self.moments = tuple(moment[index] for moment in self.moments)

    def load(self, steps: int, moments: Sequence[Tensor]) -> None:
        """Take up the state after ``steps`` steps."""
        self.steps = steps
        for own, given in zip(self.moments, moments, strict=True):
            own.copy_(given)

    @torch.no_grad()
    def step(self, rates: Tensor) -> None:
        """Clip each model's gradient, maybe in place, and move its weights by its rate [W]."""
        weights, gradients = self._stack.weights, self._stack.gradients
        if self._recipe.optimizer != "sgd" and _is_native(weights):
            self._row_by_row(rates.tolist())
            return
        rate = rates.to(weights).unsqueeze(1)  # [W, 1]
        norms = torch.linalg.vector_norm(gradients, dim=1, keepdim=True)
        gradients.mul_((self._recipe.clip_norm / (norms + _CLIP_EPSILON)).clamp(max=1.0))
        self.steps += 1
        decay = torch.tensor(self._decays).to(weights).unsqueeze(1)
        if self._recipe.optimizer == "adamw":
            weights.mul_(1 - rate * decay)
        else:
            gradients.addcmul_(weights, decay)
        if self._recipe.optimizer == "sgd":
            self._sgd(weights, gradients, rate)
        else:
            self._adam(weights, gradients, rate)

    def _row_by_row(self, rates: list[float]) -> None:
        for row, rate in enumerate(rates):
            mean, square = self.moments
            clipped_adam(
                [self._stack.weights[row]],
                [self._stack.gradients[row]],
                (mean[row], square[row]),
                torch.tensor([float(self.steps)]),
                rate=rate,
                betas=self._recipe.betas,
                eps=_EPSILON,
                decay=self._decays[row],
                decoupled=self._recipe.optimizer == "adamw",
                clip_norm=self._recipe.clip_norm,
            )
        self.steps += 1

    def _adam(self, weights: Tensor, gradients: Tensor, rate: Tensor) -> None:
        mean, square = self.moments
        beta1, beta2 = self._recipe.betas
        mean.lerp_(gradients, 1 - beta1)
        square.mul_(beta2).addcmul_(gradients, gradients, value=1 - beta2)
        spread = square.sqrt().div_((1 - beta2**self.steps) ** 0.5).add_(_EPSILON)
        weights.sub_(mean.div(spread).mul_(rate / (1 - beta1**self.steps)))

    def _sgd(self, weights: Tensor, gradients: Tensor, rate: Tensor) -> None:
        (momentum,) = self.moments
        momentum.mul_(self._recipe.momentum).add_(gradients)
        weights.sub_(momentum * rate)


def _is_native(weights: Tensor) -> bool:
    plain = weights.device.type == "cpu" and weights.dtype == torch.float32
    return plain and weights.is_contiguous() and has_clipped_adam()
