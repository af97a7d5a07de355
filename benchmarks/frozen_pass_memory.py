"""What one frozen pass adds to a process: ``python -m benchmarks.frozen_pass_memory --size 1024``.

A process of its own, so that neither other benchmarks nor loading the weights count.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer

from fpt_fast.backbone import load_backbone
from fpt_fast.selection import select_features

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Print the memory in bytes before the pass and at its peak, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (("size", 1024), ("width", 768), ("heads", 12), ("depth", 12), ("batch", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="auto")
    options = parser.parse_args()
    model = VisionTransformer(
        img_size=224, embed_dim=options.width, num_heads=options.heads, depth=options.depth
    )
    backbone = load_backbone(model, dtype=options.dtype, device="cpu")
    del model
    pixels = torch.randn(options.batch, 3, options.size, options.size)
    # Resets the high-water mark, which the weights' conversion has raised.
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    kept = select_features(
        backbone,
        pixels,
        layers=range(options.depth // 2, options.depth),
        token_ratio=0.2,
        importance="global",
    )
    peak = _status("VmHWM")
    tokens = backbone.spec.num_tokens((options.size, options.size))
    report = {"tokens": tokens, "kept": kept.index.shape[-1], "before": before, "peak": peak}
    print(json.dumps(report))


def added_bytes(*arguments: str) -> dict[str, int]:
    """Run this module in a process of its own; its report, with ``added`` bytes."""
    command = [sys.executable, "-m", "benchmarks.frozen_pass_memory", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    report: dict[str, int] = json.loads(done.stdout)
    return {**report, "added": report["peak"] - report["before"]}


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {field}; this needs Linux")


if __name__ == "__main__":
    main()
