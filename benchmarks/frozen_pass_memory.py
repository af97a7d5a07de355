"""What one frozen pass adds to a process: ``python -m benchmarks.frozen_pass_memory --size 1024``.

A process of its own, so that neither other benchmarks nor loading the weights count.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer

from fpt_fast.backbone import load_backbone
from fpt_fast.selection import select_features

ROOT = Path(__file__).resolve().parent.parent
Pass = Callable[[torch.Tensor], tuple[int, str]]


def main() -> None:
    """Print the memory in bytes before the pass and at its peak, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("size", 1024), ("width", 768), ("heads", 12), ("depth", 12), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--plain", action="store_true", help="the published algorithm instead")
    options = parser.parse_args()
    model = VisionTransformer(
        img_size=224, embed_dim=options.width, num_heads=options.heads, depth=options.depth
    )
    run = plain_pass(model, options) if options.plain else our_pass(model, options)
    pixels = torch.randn(options.batch, 3, options.size, options.size)
    # Resets the high-water mark, which the weights' conversion has raised.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    started = time.perf_counter()
    kept, dtype = run(pixels)
    seconds = time.perf_counter() - started
    peak = _status("VmHWM")
    report = {"kept": kept, "dtype": dtype, "seconds": seconds, "before": before, "peak": peak}
    print(json.dumps({"tokens": (options.size // 16) ** 2 + 1, **report}))


def our_pass(model: VisionTransformer, options: argparse.Namespace) -> Pass:
    """Tokens kept per head, and the dtype of the pass."""
    backbone = load_backbone(model, dtype=options.dtype, device="cpu")
    layers = range(options.depth // 2, options.depth)

    def run(pixels: torch.Tensor) -> tuple[int, str]:
        kept = select_features(
            backbone, pixels, layers=layers, token_ratio=0.2, importance="global"
        )
        return kept.index.shape[-1], str(backbone.dtype).removeprefix("torch.")

    return run


def plain_pass(model: VisionTransformer, options: argparse.Namespace) -> Pass:
    """As ``our_pass``; every map is made, and every layer's selection is kept until the end."""
    from huggingface_folder import tensors_of

    from benchmarks.plain.frozen_pass import PlainFrozenVit

    plain = PlainFrozenVit(tensors_of(model), num_heads=options.heads, layer_norm_eps=1e-6)

    def run(pixels: torch.Tensor) -> tuple[int, str]:
        return plain(pixels)[0].index.shape[-1], "float32"

    return run


def added_bytes(*arguments: str) -> dict[str, Any]:
    """Run this module in a process of its own; its report, with ``added`` bytes."""
    command = [sys.executable, "-m", "benchmarks.frozen_pass_memory", *arguments]
    paths = [str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, env=environment
    )
    report: dict[str, Any] = json.loads(done.stdout)
    return {**report, "added": report["peak"] - report["before"]}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this needs Linux")


if __name__ == "__main__":
    main()
