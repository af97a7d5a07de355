"""A run of the toy trainer that is watched from step to step, and struck by a signal in one."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from toy_training import CLASSES, ToyBatches, toy_config, toy_model, weights_of

from fpt_fast.records import FeatureBatch, TrainingHistory
from fpt_fast.trainer import fit

EPOCHS, STEPS, VAL_STEPS = 4, 7, 3
At = tuple[int, int]


class Watched(ToyBatches):
    """Calls ``before(epoch, step)`` before it yields a batch, and notes which it made."""

    def __init__(self, steps: int, before: Callable[[int, int], None], seed: int = 0) -> None:
        super().__init__(steps=steps, seed=seed)
        self.before = before
        self.made: list[At] = []

    def __iter__(self) -> Iterator[FeatureBatch]:
        return self.iterate_from(0)

    def iterate_from(self, first: int) -> Iterator[FeatureBatch]:
        for step, batch in enumerate(super().__iter__()):
            if step >= first:
                self.before(self.epoch, step)
                self.made.append((self.epoch, step))
                yield batch


def nothing(epoch: int, step: int) -> None:
    pass


def run(
    run_dir: Path,
    before: Callable[[int, int], None] = nothing,
    before_val: Callable[[int, int], None] = nothing,
    **changes: Any,
) -> tuple[TrainingHistory, dict[str, torch.Tensor]]:
    model = toy_model()
    history = fit(
        model,
        Watched(STEPS, before),
        Watched(VAL_STEPS, before_val, seed=1),
        toy_config(epochs=EPOCHS, monitor="f1"),
        run_dir=run_dir,
        num_classes=CLASSES,
        progress=False,
        resume=True,
        **changes,
    )
    return history, weights_of(model)


def run_struck(run_dir: Path, checkpoint_steps: int, at: int = -1, number: int = 0) -> None:
    """``run``, with signal ``number`` before step ``at``, counted through all epochs (-1: none)."""

    def strike(epoch: int, step: int) -> None:
        if epoch * STEPS + step == at:
            os.kill(os.getpid(), number)

    run(run_dir, strike, checkpoint_steps=checkpoint_steps)
