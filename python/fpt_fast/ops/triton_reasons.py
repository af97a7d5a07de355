"""Why a Triton kernel cannot run on given arguments."""

import os
from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

from fpt_fast.ops.implementation import Reasons

MAX_WIDTH = 128
_OLDEST = (8, 0)


def triton_reasons(width_of: int) -> Reasons:
    """Reasons of a kernel whose head width is the last axis of argument number ``width_of``.

    Full sentences; empty where the kernel runs: on a GPU, or in Triton's interpreter.
    """
    return lambda args: _reasons(args, width_of)


def _reasons(args: Sequence[object], width_of: int) -> list[str]:
    if not _is_installed():
        return ["triton is not installed (pip install 'fpt-fast[gpu]')"]
    tensors = [arg for arg in _flat(args) if isinstance(arg, Tensor)]
    reasons = _device_reasons({tensor.device for tensor in tensors})
    if any(tensor.dtype == torch.float64 for tensor in tensors):
        reasons.append("it has no float64 form")
    for heads in args[width_of : width_of + 1]:  # ``explain`` may be given fewer
        if isinstance(heads, Tensor) and heads.shape[-1] > MAX_WIDTH:
            reasons.append(f"it takes a head width of at most {MAX_WIDTH}, got {heads.shape[-1]}")
    return reasons


def _device_reasons(devices: set[torch.device]) -> list[str]:
    types = {device.type for device in devices}
    if types == {"cpu"}:
        if os.environ.get("TRITON_INTERPRET") == "1":
            return []
        return ["it runs on cuda tensors, got tensors on cpu"]
    if types != {"cuda"}:
        return [f"it runs on cuda tensors, got tensors on {', '.join(sorted(types))}"]
    older = sorted({torch.cuda.get_device_capability(device) for device in devices})
    if older[0] < _OLDEST:
        return [f"it needs compute capability 8.0 or newer, got {older[0][0]}.{older[0][1]}"]
    return []


def _flat(args: Sequence[object]) -> list[object]:
    """Arguments with pairs of scales taken apart."""
    return [item for arg in args for item in (arg if isinstance(arg, tuple) else (arg,))]


@cache
def _is_installed() -> bool:
    return find_spec("triton") is not None
