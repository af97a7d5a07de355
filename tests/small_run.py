"""A frozen model on disk, small enough to run the whole method in a second."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from helpers import load_golden


def write_backbone(
    folder: Path, edit: Callable[[dict[str, torch.Tensor]], None] | None = None
) -> Path:
    """A Hugging Face ViT directory with the golden frozen weights (4 layers, 6 heads, patch 8)."""
    golden = load_golden("fpt_plus_global")
    config = golden.config
    weights = golden.group("frozen")
    if edit is not None:
        edit(weights)
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    values = {
        "model_type": "vit",
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
        "qkv_bias": True,
        "num_channels": 3,
        **{
            name: config[name]
            for name in (
                "hidden_size",
                "num_attention_heads",
                "num_hidden_layers",
                "intermediate_size",
                "patch_size",
                "image_size",
            )
        },
    }
    (folder / "config.json").write_text(json.dumps(values))
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
