"""Loads the C++ extension on first need, and says why its ops cannot run on given arguments.

The extension is ``fpt_fast/_native.so``, a plain shared library that registers ops of the namespace
``fpt_native`` with torch (``csrc/register.cpp``).  It is loaded when an op first asks for its
implementations, and not at import, which stays cheap.  Two environment variables, for tests and
builds of one's own:

- ``FPT_NATIVE_LIBRARY``: path of another build; empty for none at all.
- ``FPT_NATIVE_LEVEL``: ``amx``, ``avx512_bf16``, ``avx512``, ``avx2`` or ``portable``, to
  run the kernels of that level instead of the best one.
"""

import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent.parent
_WIDEST = 16  # csrc/side_attention.cpp
_PANEL = 32  # csrc/frozen_linear.cpp
_RUN = 16  # csrc/trained_linear.cpp
_NARROW = {torch.bfloat16, torch.float32}  # rows that it reads
# What fpt_fast.ops.native calls: a build that is older than a checkout may lack some.
_OPS = (
    "levels",
    "select_tokens",
    "token_scores",
    "frozen_attention",
    "prompt_attention",
    "prompt_attention_backward",
    "prompt_attention_indexed",
    "prompt_attention_indexed_backward",
    "side_attention",
    "side_attention_backward",
    "frozen_linear",
    "clipped_adam",
    "trained_linear",
    "trained_linear_backward",
    "side_layers",
    "side_layers_backward",
)


def native_reasons(args: Sequence[object]) -> list[str]:
    """Full sentences; empty where the extension runs: on the CPU, if it was built."""
    missing = native_missing()
    if missing:
        return [missing]
    # The names only where there are some to say: this is asked several times a step.
    tensors = [arg for arg in args if isinstance(arg, Tensor) and arg.device.type != "cpu"]
    elsewhere = ", ".join(sorted({tensor.device.type for tensor in tensors}))
    return [f"it runs on cpu tensors, got tensors on {elsewhere}"] if elsewhere else []


def native_floats_reasons(args: Sequence[object]) -> list[str]:
    """``native_reasons`` of an op that computes in f32, and so has no f64 form."""
    reasons = native_reasons(args)
    if any(isinstance(arg, Tensor) and arg.dtype == torch.float64 for arg in args):
        reasons.append("it has no float64 form")
    return reasons


def native_prompt_reasons(args: Sequence[object]) -> list[str]:
    """``native_reasons`` of the prompts' ops: no f64 or fp8, and channels side by side."""
    reasons = native_floats_reasons(args)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    dtypes = {tensor.dtype for tensor in tensors}
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        if dtype in dtypes:
            reasons.append(f"it has no {str(dtype).removeprefix('torch.')} form")
    features = [tensor for tensor in tensors if tensor.dim() > 4]
    scales = [scale for arg in args if isinstance(arg, tuple) for scale in arg]
    if any(x.stride(-1) != 1 and x.shape[-1] > 1 for x in features + scales):
        reasons.append("it reads features and scales whose last axis has stride 1")
    return reasons


def native_narrow_reasons(args: Sequence[object]) -> list[str]:
    """``native_floats_reasons`` of the side network's attention: D of at most 16."""
    reasons = native_floats_reasons(args)
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if tensors and tensors[0].shape[-1] > _WIDEST:
        reasons.append(f"it takes heads of at most {_WIDEST} channels")
    return reasons


def native_tiles_reasons(args: Sequence[object]) -> list[str]:
    """``native_reasons`` of a linear map in tiles: bf16, sizes that 32 divides, level amx."""
    reasons = native_reasons(args)
    if reasons:
        return reasons
    tensors = [arg for arg in args if isinstance(arg, Tensor)]
    if any(tensor.dtype != torch.bfloat16 for tensor in tensors):
        reasons.append("it takes bfloat16 alone")
    weight = tensors[1]
    if weight.shape[0] % _PANEL or weight.shape[1] % _PANEL or not weight.shape[1]:
        reasons.append(f"it takes weights whose sizes {_PANEL} divides, got {tuple(weight.shape)}")
    if any(x.dim() and x.stride(-1) != 1 and x.shape[-1] > 1 for x in tensors):
        reasons.append("it reads tensors whose last axis has stride 1")
    level = os.environ.get("FPT_NATIVE_LEVEL") or native_levels().split(", ")[0]
    if level != "amx":
        reasons.append(f"it needs the tiles of level amx, and level {level} runs here")
    return reasons


def native_bf16_reasons(args: Sequence[object]) -> list[str]:
    """``native_reasons`` of (x, weight, bias, added) of a map in bf16: sizes, strides, dtypes,
    level."""
    reasons = native_reasons(args)
    if reasons:
        return reasons
    x, weight = args[:2]
    assert isinstance(x, Tensor) and isinstance(weight, Tensor)
    rows = [x, *(added for added in args[3:] if isinstance(added, Tensor))]
    if not {y.dtype for y in rows} <= _NARROW or weight.dtype != torch.float32:
        reasons.append("it takes x in bfloat16 or float32 and weights in float32")
    if not weight.is_contiguous():
        reasons.append("it takes contiguous weights")
    columns, *axes = weight.shape
    depth = math.prod(axes)
    if columns % _RUN or axes[-1] % _RUN or depth % _PANEL or not depth:
        reasons.append(
            f"it takes weights [O, K] with O and the last axis that {_RUN} divides and K in all "
            f"that {_PANEL} divides, got {tuple(weight.shape)}"
        )
    if any(y.stride(-1) != 1 and y.shape[-1] > 1 for y in rows):
        reasons.append("it reads tensors whose last axis has stride 1")
    level = os.environ.get("FPT_NATIVE_LEVEL") or native_levels().split(", ")[0]
    if level not in ("amx", "avx512_bf16"):
        reasons.append(
            f"it needs products of level amx or avx512_bf16, and level {level} runs here"
        )
    return reasons


def native_layers_reasons(args: Sequence[object]) -> list[str]:
    """``native_floats_reasons`` of (tokens, states, layers or all their weights, heads)."""
    tokens, states, layers, heads = args
    assert isinstance(tokens, Tensor) and isinstance(layers, Sequence) and isinstance(heads, int)
    # The weights are all of tokens' dtype and device: so says the public function's check.
    reasons = native_floats_reasons((tokens, states))
    if tokens.shape[-1] > _WIDEST * heads:
        reasons.append(f"it takes heads of at most {_WIDEST} channels")
    return reasons


@cache
def native_missing() -> str | None:
    """Load the extension; None where it is there, else why it is not."""
    named = os.environ.get("FPT_NATIVE_LIBRARY")
    if named == "":
        return "the C++ extension is switched off by FPT_NATIVE_LIBRARY"
    path = Path(named) if named else _FOLDER / "_native.so"
    if not path.exists():
        return f"the C++ extension is not installed: {_why_not_built(path)}"
    try:
        torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"the C++ extension does not load: {error}"
    absent = [op for op in _OPS if not hasattr(torch.ops.fpt_native, op)]
    if absent:
        return (
            f"the C++ extension {path} was built from other sources, without {', '.join(absent)}: "
            "build it anew (python setup.py build_ext --inplace in a clone)"
        )
    return None


@cache
def native_levels() -> str:
    """Levels that this processor runs, the best first; only where nothing is missing."""
    levels: str = torch.ops.fpt_native.levels()
    return levels


def _why_not_built(path: Path) -> str:
    note = path.with_name("_native_missing.txt")
    if note.exists():
        return "when fpt-fast was installed, " + note.read_text(encoding="utf-8").strip()
    return f"there is no {path.name} (python setup.py build_ext --inplace builds it in a clone)"
