"""What this installation has and can do, as text: the first thing to attach to a bug report."""

import importlib.metadata
import importlib.util
import platform
import sys

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
)


def describe_installation() -> str:
    """Versions, devices, precisions and op implementations, one ``name: value`` a line."""
    import torch

    from fpt_fast.backbone import choose_dtype
    from fpt_fast.ops import explain
    from fpt_fast.ops.native_reasons import native_levels, native_missing

    lines = [
        f"python: {sys.version.split()[0]} on {platform.system()} {platform.machine()}",
        *(f"{name}: {_version(name)}" for name in PACKAGES),
        f"cpu threads: {torch.get_num_threads()}",
        f"cpu dtype (auto): {_short(choose_dtype(torch.device('cpu')))}",
        f"native: {native_missing() or 'levels ' + native_levels()}",
    ]
    if torch.cuda.is_available():
        for number in range(torch.cuda.device_count()):
            device = torch.device("cuda", number)
            capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
            lines.append(
                f"cuda:{number}: {torch.cuda.get_device_name(device)}, sm {capability}, "
                f"dtype (auto) {_short(choose_dtype(device))}"
            )
    else:
        lines.append("cuda: none")
    q = torch.zeros(1, 1, 4, 8)
    lines.append(f"token_scores on cpu: {explain('token_scores', q, q)}")
    return "\n".join(lines)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
