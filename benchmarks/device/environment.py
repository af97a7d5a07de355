"""What the run stood on: device, versions, commit, and the measured ceilings of the device."""

import importlib.metadata
import platform
import shutil
import subprocess
from typing import Any

import torch
import triton
import triton.language as tl

from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import timed

_PACKAGES = ("torch", "triton", "xformers", "timm", "numpy", "pytest")


def items(options: Options) -> list[Item]:
    """The device, then its ceilings."""
    return [
        Item("device", lambda _: describe(options)),
        Item("ceilings", lambda _: ceilings(options), least=5.0 if not options.is_dry else 0.0),
    ]


def describe(options: Options) -> dict[str, Any]:
    """Names and versions; what is not there is None."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "device": platform.processor() or platform.machine(),
        "cores": torch.get_num_threads(),
    }
    if options.is_dry:
        return found
    device = torch.cuda.get_device_properties(0)
    smi = "name,driver_version,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
    return {
        **found,
        "device": device.name,
        "capability": f"{device.major}.{device.minor}",
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": getattr(device, "L2_cache_size", None),
        "memory_bytes": device.total_memory,
        "nvidia_smi": _output("nvidia-smi", f"--query-gpu={smi}", "--format=csv"),
    }


def ceilings(options: Options) -> dict[str, Any]:
    """Bytes copied a second (read and written), operations by dtype, exponentials."""
    device, is_dry = options.device, options.is_dry
    size = 1 << 12 if is_dry else 1 << 31
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), device)["seconds"]
    edge = 32 if is_dry else 8192
    rates = {}
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        n = edge if dtype != torch.float32 else edge // 2
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        seconds = timed(lambda a=a, b=b: a @ b, device)["seconds"]  # type: ignore[misc]
        rates[str(dtype).removeprefix("torch.")] = 2 * n**3 / seconds
    return {
        "bandwidth": 2 * size / copy,
        "flops": rates,
        "exponentials": exponentials_per_second(device, is_dry),
    }


@triton.jit
def _powers_kernel(x_ptr, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    x_idx = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_tile = tl.load(x_ptr + x_idx)
    for _ in range(STEPS):
        x_tile = tl.exp2(-x_tile)  # stays between 0 and 1
    tl.store(x_ptr + x_idx, x_tile)


def exponentials_per_second(device: torch.device, is_dry: bool) -> float:
    """Powers of two in f32 that stay in registers, eight a thread; a lower bound."""
    programs, block, steps = (1, 32, 2) if is_dry else (132 * 16, 1024, 512)
    x = torch.zeros(programs * block, device=device)

    def run() -> None:
        _powers_kernel[(programs,)](x, STEPS=steps, BLOCK=block, num_warps=4)

    return programs * block * steps / float(timed(run, device)["seconds"])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout.strip()
