"""Where the frozen pass runs, and in which precision."""

import torch

from fpt_fast.backbone.errors import BackboneError

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def resolve_device(device: str | torch.device) -> torch.device:
    """Turn ``"auto"`` into the CUDA device if there is one, else the CPU.

    Raises ``BackboneError`` for a CUDA device that this machine has not.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise BackboneError(
            f"device is {str(device)!r}, but torch finds no CUDA device here; "
            "use device='auto' or 'cpu'"
        )
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Turn ``"auto"`` or a name into the dtype of the frozen pass on ``device``.

    Raises ``BackboneError`` for one that the frozen pass does not run in.
    """
    if isinstance(dtype, str) and dtype != "auto":
        if dtype not in _DTYPES:
            raise BackboneError(
                f"dtype must be 'auto' or one of {', '.join(_DTYPES)}, got {dtype!r}"
            )
        return _DTYPES[dtype]
    if isinstance(dtype, torch.dtype):
        if dtype not in _DTYPES.values():
            raise BackboneError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype}")
        return dtype
    return choose_dtype(device)


def choose_dtype(device: torch.device) -> torch.dtype:
    """The dtype that ``dtype="auto"`` means on ``device``.

    Asks for capabilities and never for a stopwatch: the dtype belongs to a cache's fingerprint,
    and a busy machine must not decide it differently from one run to the next.
    """
    if device.type == "cpu":
        return torch.bfloat16 if cpu_has_fast_bf16() else torch.float32
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
        # Tensor cores for f16 came with 7.0; before them f16 gains little and can overflow.
        return (
            torch.float16 if torch.cuda.get_device_capability(device) >= (7, 0) else torch.float32
        )
    return torch.float32


def cpu_has_fast_bf16() -> bool:
    """True where the CPU multiplies bf16 matrices in hardware: AMX, AVX512-BF16 or Arm BF16.

    oneDNN also runs bf16 on plain AVX-512, by converting to f32: slower than f32, so it does
    not count.
    """
    probes = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    if any(getattr(torch.cpu, probe, lambda: False)() for probe in probes):
        return True
    # Absent from the older versions of torch that we support.
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("bf16") or capabilities.get("arm_bf16"))
