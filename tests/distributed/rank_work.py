"""What the ranks of the tests do: preload, some of them struck by a signal or a wrong setting."""

import dataclasses
import os
from typing import Any

from fpt_fast.pipeline import PreloadSettings, preload, preloading


def preload_struck(settings: PreloadSettings, rank: int, calls: int, number: int) -> None:
    """Preload, with signal ``number`` to ``rank`` within its ``calls``-th batch (0: none)."""
    original, made = preloading.select_features, []

    def select(*arguments: Any, **named: Any) -> Any:
        made.append(1)
        if len(made) == calls and os.environ["RANK"] == str(rank):
            os.kill(os.getpid(), number)
        return original(*arguments, **named)

    preloading.select_features = select
    preload(settings)


def preload_differently(settings: PreloadSettings) -> None:
    """Preload with another batch size on rank 1."""
    size = settings.batch_size + int(os.environ["RANK"])
    preload(dataclasses.replace(settings, batch_size=size))
