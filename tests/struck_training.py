"""Training that is struck by a signal within one of its steps."""

import os
from typing import Any

from fpt_fast.pipeline import TrainSettings, train
from fpt_fast.trainer import step as training_step


def train_struck(settings: TrainSettings, calls: int, number: int) -> None:
    """Train, with signal ``number`` to this process within its ``calls``-th step."""
    original, made = training_step.step_once, []

    def struck(*arguments: Any) -> Any:
        made.append(1)
        if len(made) == calls:
            os.kill(os.getpid(), number)
        return original(*arguments)

    training_step.step_once = struck
    train(settings)
