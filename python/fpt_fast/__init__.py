"""Fine-grained Prompt Tuning: adapt a large frozen vision transformer to high-resolution images.

The names below are imported on first use, so that ``import fpt_fast`` is silent and cheap.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpt_fast.config import FptConfig, TrainConfig

__version__ = "0.1.0"

_HOME = {
    "FptConfig": "config",
    "TrainConfig": "config",
}

__all__ = [
    "FptConfig",
    "TrainConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
