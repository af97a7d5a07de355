"""Why an attention that others wrote for CUDA cannot run on given arguments."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fpt_fast.ops.implementation import needs_device

_HALF = (torch.float16, torch.bfloat16)
_on_cuda = needs_device("cuda")


def flash_reasons(args: Sequence[object]) -> list[str]:
    """Of torch's FlashAttention."""
    built = torch.backends.cuda.is_flash_attention_available()
    return [
        *([] if built else ["this build of torch has no FlashAttention"]),
        *_reasons(args, dtypes=_HALF, widest=256, oldest=(8, 0)),
    ]


def efficient_reasons(args: Sequence[object]) -> list[str]:
    """Of torch's memory-efficient attention."""
    return _reasons(args, dtypes=(*_HALF, torch.float32), widest=None, oldest=(5, 0))


def cudnn_reasons(args: Sequence[object]) -> list[str]:
    """Of cuDNN's attention."""
    built = torch.backends.cudnn.is_available()  # type: ignore[no-untyped-call]
    return [
        *([] if built else ["this torch finds no cuDNN"]),
        *_reasons(args, dtypes=_HALF, widest=128, oldest=(8, 0)),
    ]


def xformers_reasons(args: Sequence[object]) -> list[str]:
    """Of xformers."""
    return [
        *(
            []
            if _has_xformers()
            else ["xformers is not installed (pip install 'fpt-fast[xformers]')"]
        ),
        *_reasons(args, dtypes=(*_HALF, torch.float32), widest=None, oldest=(5, 0)),
    ]


def _reasons(
    args: Sequence[object],
    *,
    dtypes: Sequence[torch.dtype],
    widest: int | None,
    oldest: tuple[int, int],
) -> list[str]:
    """Full sentences: device, dtype, head width and, where there is a device, its capability."""
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    reasons = _on_cuda(tensors)
    q = tensors[0]
    if q.dtype not in dtypes:
        names = ", ".join(map(_short, dtypes))
        reasons.append(f"it takes {names}, got {_short(q.dtype)}")
    if widest is not None and q.shape[-1] > widest:
        reasons.append(f"it takes a head width of at most {widest}, got {q.shape[-1]}")
    if q.device.type == "cuda" and (has := torch.cuda.get_device_capability(q.device)) < oldest:
        reasons.append(
            f"it needs compute capability {oldest[0]}.{oldest[1]} or newer, got {has[0]}.{has[1]}"
        )
    return reasons


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@cache
def _has_xformers() -> bool:
    return find_spec("xformers") is not None
