"""Training that is struck by a signal within one of its steps."""

import os
from typing import Any

from fpt_fast.pipeline import TrainSettings, train
from fpt_fast.trainer import epoch as training_epoch


def train_struck(settings: TrainSettings, calls: int, number: int) -> None:
    """Train, with signal ``number`` to this process within its ``calls``-th step."""
    original, made = training_epoch._train_step, []

    def step(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), number)
        return original(*arguments)

    training_epoch._train_step = step
    train(settings)
