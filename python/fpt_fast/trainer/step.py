"""The training step: what it computes, and the ordinary way of running it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from fpt_fast.records import FeatureBatch
from fpt_fast.trainer.arithmetic import Arithmetic
from fpt_fast.trainer.batches import check_labels, check_logits, move_batch
from fpt_fast.trainer.optimizer import drop_gradients
from fpt_fast.trainer.ranks import sum_gradients, whole_loss
from fpt_fast.trainer.schedule import learning_rate_at

if TYPE_CHECKING:
    from fpt_fast.trainer.run import Run

# Reading a loss waits for the device; once in so many steps costs nothing.
_STEPS_BETWEEN_CHECKS = 64


class TrainStep(Protocol):
    """Makes the steps of a run, in their order, and remembers the losses of the current epoch.

    ``looks`` is the number of steps between two looks at the losses within an epoch, each of which
    waits for the device; None for none before the epoch's end.
    """

    looks: int | None

    def begin(self, epoch: int, losses: Sequence[float]) -> None:
        """The next steps are those of ``epoch``, behind those that gave ``losses``."""
        ...

    def __call__(self, batch: FeatureBatch) -> None:
        """Make the next step."""
        ...

    def losses(self, first: int = 0) -> list[float]:
        """Losses of this epoch's steps so far, from step ``first`` on."""
        ...

    def state(self) -> dict[str, Any]:
        """What a resumed run must take up beside weights and optimiser, as JSON values."""
        ...

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        ...


class OrdinaryStep:
    """Every operation launched by itself, on any device."""

    looks: int | None = _STEPS_BETWEEN_CHECKS

    def __init__(self, run: "Run") -> None:
        self._run = run
        self._arithmetic = Arithmetic(run.config.precision, run.device)
        self._losses = torch.zeros(len(run.train_batches), device=run.device)
        self._epoch = self._made = 0

    def begin(self, epoch: int, losses: Sequence[float]) -> None:
        """The next steps are those of ``epoch``, behind those that gave ``losses``."""
        self._epoch, self._made = epoch, len(losses)
        self._losses[: len(losses)] = torch.tensor(losses)

    def __call__(self, batch: FeatureBatch) -> None:
        """Forward, backward and one step of the optimiser."""
        run = self._run
        check_step_labels(run, batch)
        rate = learning_rate_at(self._epoch + self._made / len(run.train_batches), run.config)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        self._losses[self._made] = step_once(run, self._arithmetic, move_batch(batch, run.device))
        self._made += 1

    def losses(self, first: int = 0) -> list[float]:
        """Losses of this epoch's steps so far, from step ``first`` on."""
        values: list[float] = self._losses[first : self._made].tolist()
        return values

    def state(self) -> dict[str, Any]:
        """The scale of f16 losses."""
        return self._arithmetic.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        self._arithmetic.restore(state)


def step_once(run: "Run", arithmetic: Arithmetic, batch: FeatureBatch) -> Tensor:
    """Gradients of ``batch``, which is on the device (of several ranks: this one's share), and one
    step of the optimiser at its present learning rate; returns the loss of the whole batch, still
    on the device.  Nothing here waits for the device."""
    prepare = side_input_of(run)
    drop_gradients(run.parameters)
    if prepare is not None:
        batch = replace(batch, side_pixels=prepare(batch.side_pixels))
    with arithmetic.forward():
        output: Tensor = run.model(batch)
    logits = output.float()
    outputs = 1 if run.config.is_regression else run.num_classes
    check_logits(logits, len(batch.keys), outputs)
    loss = whole_loss(run.loss, logits, batch.labels, run.dropout.share, run.world)
    arithmetic.backward(loss)
    sum_gradients(run.parameters, run.world)
    arithmetic.step(run.optimizer, run.parameters, run.config.clip_norm)
    return loss.detach()


def side_input_of(run: "Run") -> Callable[[Tensor], Tensor] | None:
    """What makes the side input on the device out of what the batches bring, where they do not
    bring the side input itself."""
    prepare: Callable[[Tensor], Tensor] | None = getattr(run.train_batches, "side_input", None)
    return prepare


def check_step_labels(run: "Run", batch: FeatureBatch) -> None:
    """Refuse labels that are none; on an accelerator in the first epoch only: looking waits."""
    if batch.labels.device.type == "cpu" or not run.labels_checked:
        check_labels(batch, run.num_classes)
