"""Trials of one configuration, trained as one stack."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fpt_fast.fusion import dropout_factors
from fpt_fast.losses import EpochLoss
from fpt_fast.model import FptModel
from fpt_fast.records import EpochRecord
from fpt_fast.sweep.optimizer import StackOptimizer
from fpt_fast.sweep.stack import ModelStack
from fpt_fast.sweep.trials import Trial
from fpt_fast.trainer import learning_rate_at


@dataclass(slots=True)
class TrialState:
    """How far one trial is; weights are rows [n] of its group's stack.

    ``ended`` says why it was ended before its last epoch, None where it was not.
    """

    trial: Trial
    stack: ModelStack
    generator: torch.Generator
    records: list[EpochRecord] = field(default_factory=list)
    best_epoch: int | None = None
    best_value: float | None = None
    best_weights: Tensor | None = None
    ended: str | None = None


class TrialGroup:
    """Trials whose models have equal shapes: one stack, one optimiser, ``W`` rows each."""

    def __init__(
        self, models: Sequence[FptModel], trials: Sequence[Trial], device: torch.device
    ) -> None:
        self.stack = ModelStack(models)
        self.stack.to(device)
        self.optimizer = StackOptimizer(self.stack, [trial.recipe for trial in trials])
        self.states = [
            TrialState(trial, self.stack, torch.Generator(device).manual_seed(trial.recipe.seed))
            for trial in trials
        ]
        self._dropout = models[0].config.fusion_dropout

    def __len__(self) -> int:
        """Trials that still train."""
        return len(self.states)

    def keep(self, rows: list[int]) -> None:
        """Go on with ``rows`` alone."""
        self.stack.keep(rows)
        self.optimizer.keep(rows)
        self.states = [self.states[row] for row in rows]

    def logits(self, pixels: Tensor, attended: Tensor | None, *, training: bool = False) -> Tensor:
        """Logits [W, B, outputs] of pixels [W, B, 3, h, w], with dropout while training."""
        keep = None
        if training and attended is not None and self._dropout > 0:
            keep = self._dropout_factors(attended.shape[0], attended.shape[1])
        return self.stack.forward(pixels, attended, keep).float()

    def step(self, epoch: float) -> None:
        """One optimiser step with the gradients of ``backward``; ``epoch`` is fractional."""
        rates = [learning_rate_at(epoch, state.trial.recipe) for state in self.states]
        self.optimizer.step(torch.tensor(rates, device=self.stack.weights.device))

    def _dropout_factors(self, layers: int, batch: int) -> Tensor:
        """[W, L, B, P, S]: the random numbers that each model draws alone, from its own seed."""
        config = self.stack.config
        width = self.stack.spec.hidden_size // config.side_reduction
        factors = self.stack.weights.new_empty(
            (len(self), layers, batch, config.num_prompts, width)
        )
        for row, state in zip(factors, self.states, strict=True):
            row.copy_(dropout_factors(row, self._dropout, state.generator))
        return factors


def backward(groups: Sequence[TrialGroup], loss: Tensor) -> None:
    """Gradients of ``loss``, the sum over all trials, to each group's stack: one pass for all."""
    weights = [weight for group in groups for weight in group.stack.leaves]
    gradients = iter(torch.autograd.grad(loss, weights))
    for group in groups:
        group.stack.take_gradients([next(gradients) for _ in group.stack.leaves])


def losses_of(loss: EpochLoss, logits: Tensor, labels: Tensor) -> Tensor:
    """Each model's loss [W] for logits [W, B, outputs]."""
    losses: Tensor = torch.func.vmap(loss, in_dims=(0, None))(logits, labels)
    return losses
