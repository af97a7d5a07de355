"""Fine-grained Prompt Tuning: adapt a large frozen vision transformer to high-resolution images.

The names below are imported on first use, so that ``import fpt_fast`` is silent and cheap.
The whole method as four calls is ``fpt_fast.pipeline``; the authors' names are in
``fpt_fast.compat``.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fpt_fast.backbone import FrozenBackbone, load_backbone
    from fpt_fast.cache import CacheReader, CacheWriter
    from fpt_fast.config import FptConfig, TrainConfig
    from fpt_fast.images import load_image_set
    from fpt_fast.model import FptModel, create_model
    from fpt_fast.ops import (
        explain,
        prompt_attention,
        prompt_attention_indexed,
        quantise_kv,
        select_tokens,
        token_scores,
    )
    from fpt_fast.selection import select_features
    from fpt_fast.trainer import fit, predict

__version__ = "0.1.0"

__all__ = [
    "CacheReader",
    "CacheWriter",
    "FptConfig",
    "FptModel",
    "FrozenBackbone",
    "TrainConfig",
    "__version__",
    "create_model",
    "explain",
    "fit",
    "load_backbone",
    "load_image_set",
    "predict",
    "prompt_attention",
    "prompt_attention_indexed",
    "quantise_kv",
    "select_features",
    "select_tokens",
    "token_scores",
]

_MODULE_OF = {
    "CacheReader": "cache",
    "CacheWriter": "cache",
    "FptConfig": "config",
    "FptModel": "model",
    "FrozenBackbone": "backbone",
    "TrainConfig": "config",
    "create_model": "model",
    "explain": "ops",
    "fit": "trainer",
    "load_backbone": "backbone",
    "load_image_set": "images",
    "predict": "trainer",
    "prompt_attention": "ops",
    "prompt_attention_indexed": "ops",
    "quantise_kv": "ops",
    "select_features": "selection",
    "select_tokens": "ops",
    "token_scores": "ops",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
