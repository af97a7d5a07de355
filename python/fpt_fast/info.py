"""What this installation has and can do, as text: the first thing to attach to a bug report."""

import importlib.metadata
import importlib.util
import os
import platform
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "fpt-fast",
    "torch",
    "torchvision",
    "timm",
    "triton",
    "xformers",
    "numpy",
    "safetensors",
    "xxhash",
    "pillow",
    "scikit-learn",
    "nvtx",
    # Extras: DICOM, export, LoRA, the hub, TensorBoard.
    "pydicom",
    "pylibjpeg",
    "pylibjpeg-openjpeg",
    "pyjpegls",
    "imagecodecs",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "peft",
    "huggingface-hub",
    "tensorboard",
)


def describe_installation() -> str:
    """Versions, devices, precisions and op implementations, one ``name: value`` a line."""
    import torch

    from fpt_fast.backbone import choose_dtype
    from fpt_fast.ops.native_reasons import native_levels, native_missing

    lines = [
        f"python: {sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        *(f"{name}: {_version(name)}" for name in PACKAGES),
        f"cpu threads: {torch.get_num_threads()}, OMP_WAIT_POLICY "
        f"{os.environ.get('OMP_WAIT_POLICY', 'not set')}",
        f"cpu dtype (auto): {_short(choose_dtype(torch.device('cpu')))}",
        f"native: {native_missing() or 'levels ' + native_levels()}",
    ]
    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.device("cuda", number)
            devices.append(device)
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            lines.append(
                f"cuda:{number}: {torch.cuda.get_device_name(device)}, sm {capability}, "
                f"dtype (auto) {_short(choose_dtype(device))}"
            )
    else:
        lines.append("cuda: none")
    return "\n".join([*lines, *map(_implementations, devices)])


def _implementations(device: "torch.device") -> str:
    """What runs the frozen pass's ops on ``device`` in its own dtype, and why others do not."""
    import torch

    from fpt_fast.backbone import choose_dtype
    from fpt_fast.ops import explain

    dtype = choose_dtype(device)
    q = torch.zeros((1, 1, 4, 64), device=device, dtype=dtype)
    told = (explain("frozen_attention", q, q, q), explain("token_scores", q, q))
    return "\n".join(f"on {device} in {_short(dtype)}, {text}" for text in told)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
