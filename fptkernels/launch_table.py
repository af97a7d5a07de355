"""Launch sizes of every kernel, and what the compile report compiles.

``TABLE`` is plain data: (kernel, dtype, padded head width, architecture) -> ``Tile``.  Nothing
in it has been measured on a GPU: each row is chosen by reasoning about registers and shared
memory, checked by ``fptkernels.compile_report``, and not yet by measurement.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
PADDED_WIDTHS = (16, 32, 64, 128)
SHORT_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int32: "i32",
    torch.int64: "i64",
}

# f32 products are sums in registers, of rows that would not fit there whole.
_F32_STEP = 16

Key = tuple[str, torch.dtype, int, str]


@dataclass(frozen=True, slots=True)
class Tile:
    """One launch: ``block_m`` rows (queries, prompts) by ``block_n`` tokens (keys)."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class CompileSpec:
    """One kernel as ``triton.compile`` takes it: every argument stands in one of both mappings.

    ``signature`` maps run-time arguments to Triton's types (``"*fp16"``, ``"i64"``, ``"fp32"``),
    ``constexprs`` the others to values.  Of ``aligned`` arguments the report assumes, as the
    launcher does at run time, that they are multiples of 16.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    architecture: str
    num_warps: int
    num_stages: int
    aligned: Sequence[str] = ()


def pad_width(width: int) -> int:
    """Smallest padded head width that holds ``width``: a power of two, 16 at least."""
    return next(padded for padded in PADDED_WIDTHS if padded >= width)


def width_constants(width: int, dtype: torch.dtype) -> dict[str, int]:
    """WIDTH, PADDED and STEP: the columns of q and k that one product takes at a time."""
    padded = pad_width(width)
    return {
        "WIDTH": width,
        "PADDED": padded,
        "STEP": min(padded, _F32_STEP) if dtype == torch.float32 else padded,
    }


def tile(kernel: str, dtype: torch.dtype, padded: int, device: torch.device) -> Tile:
    """The row of ``TABLE`` for a tensor of ``dtype`` on ``device``."""
    return TABLE[kernel, dtype, padded, architecture(device)]


@contextmanager
def overridden(kernel: str, dtype: torch.dtype, padded: int, row: Tile) -> Iterator[None]:
    """Within it ``tile`` gives ``row`` on every architecture: for tuning."""
    keys = [(kernel, dtype, padded, name) for name in ARCHITECTURES]
    before = {key: TABLE[key] for key in keys}
    TABLE.update(dict.fromkeys(keys, row))
    try:
        yield
    finally:
        TABLE.update(before)


def is_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


def architecture(device: torch.device) -> str:
    """Newest architecture of the table that ``device`` has; the oldest one for a CPU."""
    if device.type != "cuda":
        return ARCHITECTURES[0]
    return _architecture_of(device.index or 0)


@cache
def _architecture_of(index: int) -> str:
    major, minor = torch.cuda.get_device_capability(index)
    known = [name for name in ARCHITECTURES if int(name.removeprefix("sm_")) <= 10 * major + minor]
    return known[-1] if known else ARCHITECTURES[0]


def _rows(
    kernel: str, dtypes: Sequence[torch.dtype], by_width: Mapping[int, Tile]
) -> dict[Key, Tile]:
    """The same tiles for several dtypes and every architecture."""
    return {
        (kernel, dtype, padded, name): tile
        for dtype in dtypes
        for padded, tile in by_width.items()
        for name in ARCHITECTURES
    }


_HALF = (torch.float16, torch.bfloat16)
_F32 = (torch.float32,)

TABLE: dict[Key, Tile] = {
    # A [block_m, D] tile of queries and its output stay in registers, keys and values stream.
    **_rows(
        "frozen_attention",
        _HALF,
        {
            16: Tile(128, 64, 4, 3),
            32: Tile(128, 64, 4, 3),
            64: Tile(128, 64, 4, 3),
            128: Tile(128, 64, 8, 3),
        },
    ),
    **_rows("frozen_attention", _F32, dict.fromkeys(PADDED_WIDTHS, Tile(32, 32, 4, 1))),
    # Row maxima and sums: a [block_m, D] tile of queries stays in registers, keys stream.
    **_rows(
        "token_scores_rows",
        _HALF,
        {
            16: Tile(128, 64, 4, 3),
            32: Tile(128, 64, 4, 3),
            64: Tile(128, 64, 4, 3),
            128: Tile(64, 64, 4, 3),
        },
    ),
    **_rows("token_scores_rows", _F32, dict.fromkeys(PADDED_WIDTHS, Tile(64, 64, 8, 1))),
    # The class token's row: block_n keys at once, 16 KB of f16 at D = 64 in flight a program.
    **_rows(
        "token_scores_class_token",
        _HALF,
        {
            16: Tile(1, 256, 4, 1),
            32: Tile(1, 256, 4, 1),
            64: Tile(1, 128, 4, 1),
            128: Tile(1, 64, 4, 1),
        },
    ),
    **_rows(
        "token_scores_class_token",
        _F32,
        {
            16: Tile(1, 256, 4, 1),
            32: Tile(1, 128, 4, 1),
            64: Tile(1, 64, 4, 1),
            128: Tile(1, 32, 4, 1),
        },
    ),
    # Column means: a [block_n, D] tile of keys stays, queries stream.
    **_rows(
        "token_scores_columns",
        _HALF,
        {
            16: Tile(64, 128, 4, 3),
            32: Tile(64, 128, 4, 3),
            64: Tile(64, 128, 4, 3),
            128: Tile(64, 64, 4, 3),
        },
    ),
    **_rows("token_scores_columns", _F32, dict.fromkeys(PADDED_WIDTHS, Tile(64, 64, 8, 1))),
    # block_m rows copied at once: at D = 64 8 KB of keys and as much of values in flight a program.
    # block_n scores in registers, 16 a thread: all of them at N = 1025; 32,767 at most.
    **_rows(
        "select_tokens",
        _HALF,
        {
            16: Tile(64, 2048, 4, 1),
            32: Tile(32, 2048, 4, 1),
            64: Tile(64, 2048, 4, 1),
            128: Tile(32, 2048, 4, 1),
        },
    ),
    **_rows(
        "select_tokens",
        _F32,
        {
            16: Tile(64, 2048, 4, 1),
            32: Tile(64, 2048, 4, 1),
            64: Tile(32, 2048, 4, 1),
            128: Tile(16, 2048, 4, 1),
        },
    ),
    # block_n tokens of one head's keys or values at once: 16 KB or less.
    **_rows(
        "quantise_kv",
        _HALF,
        {
            16: Tile(1, 256, 4, 2),
            32: Tile(1, 128, 4, 2),
            64: Tile(1, 64, 4, 2),
            128: Tile(1, 32, 4, 2),
        },
    ),
    **_rows(
        "quantise_kv",
        _F32,
        {
            16: Tile(1, 256, 4, 2),
            32: Tile(1, 128, 4, 2),
            64: Tile(1, 64, 4, 2),
            128: Tile(1, 32, 4, 2),
        },
    ),
    # Prompts: at most block_m of a head in one program, tokens stream.
    **_rows(
        "prompt_attention",
        _HALF,
        {
            16: Tile(64, 64, 4, 3),
            32: Tile(64, 64, 4, 3),
            64: Tile(64, 64, 4, 3),
            128: Tile(32, 64, 4, 2),
        },
    ),
    **_rows(
        "prompt_attention",
        _F32,
        {
            16: Tile(16, 32, 4, 2),
            32: Tile(16, 32, 4, 2),
            64: Tile(16, 32, 4, 2),
            128: Tile(16, 32, 8, 2),
        },
    ),
    # Its warps are those of block_m prompts; fewer prompts get fewer, but four.
    **_rows(
        "prompt_attention_backward",
        _HALF,
        {
            16: Tile(32, 32, 4, 2),
            32: Tile(32, 32, 4, 2),
            64: Tile(64, 32, 8, 2),
            128: Tile(32, 64, 8, 2),
        },
    ),
    # 64 prompts of f32 would spill.
    **_rows(
        "prompt_attention_backward_8bit",
        _HALF,
        {
            16: Tile(32, 32, 4, 2),
            32: Tile(32, 32, 4, 2),
            64: Tile(32, 32, 8, 2),
            128: Tile(32, 64, 8, 2),
        },
    ),
    # 8-bit tokens and f32 products: in the interpreter alone.
    **_rows(
        "prompt_attention_backward_8bit", _F32, dict.fromkeys(PADDED_WIDTHS, Tile(16, 32, 8, 2))
    ),
    **_rows("prompt_attention_backward", _F32, dict.fromkeys(PADDED_WIDTHS, Tile(16, 32, 8, 2))),
    # 32 tokens spill on the newer ones.
    ("prompt_attention_backward", torch.float32, 64, "sm_80"): Tile(16, 32, 4, 2),
    ("prompt_attention_backward", torch.float32, 64, "sm_90"): Tile(16, 16, 4, 2),
    ("prompt_attention_backward", torch.float32, 64, "sm_100"): Tile(16, 16, 4, 2),
}
