"""What a run's parts took of the memory, for people and for ``memory.json``."""

import json
import logging
import resource
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpt_fast.loader import FeatureLoader
from fpt_fast.pipeline.inputs import RunInputs
from fpt_fast.tiers import gigabytes

MEMORY_FILE = "memory.json"

log = logging.getLogger("fpt_fast")


def report_memory(
    run: Path, inputs: RunInputs, loaders: Iterable[FeatureLoader | None], model: nn.Module
) -> None:
    """Log one line, and write ``memory.json``: for each split the tier of its features, why, and
    the bytes of its store on device and host; beside it the bytes of batches on their way, of the
    stored side images, of weights and optimiser, and the peaks of process and device."""
    parts = memory_parts(inputs, loaders, model)
    log.info("%s", describe_memory(parts))
    (run / MEMORY_FILE).write_text(json.dumps(parts, indent=1), encoding="utf-8")


def memory_parts(
    inputs: RunInputs, loaders: Iterable[FeatureLoader | None], model: nn.Module
) -> dict[str, Any]:
    """As JSON values; all sizes in bytes."""
    weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    on_gpu = weights[0].is_cuda
    return {
        **({"features": {}} if inputs.placed is None else inputs.placed.memory()),
        "side_images_bytes": sum(loader.side_bytes for loader in loaders if loader is not None),
        # Gradients, and the two moments of Adam.
        "model_bytes": 4 * sum(parameter.nbytes for parameter in weights),
        "peak_host_bytes": peak if sys.platform == "darwin" else peak * 1024,
        "peak_device_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
    }


def describe_memory(parts: dict[str, Any]) -> str:
    """One line on ``memory_parts``."""
    words = []
    for split, values in parts["features"].items():
        taken = [
            f"{gigabytes(values[name])} GB{where}"
            for name, where in (("device_bytes", ""), ("host_bytes", " of the host"))
            if values[name]
        ]
        words.append(f"features of {split} {' '.join([values['tier'], *taken])}")
    for name, value in parts.items():
        if name.endswith("_bytes") and value:
            words.append(f"{name.removesuffix('_bytes').replace('_', ' ')} {gigabytes(value)} GB")
    return f"memory: {', '.join(words)}"
