"""The demo's small ViT as its scripts train and probe it, and its Hugging Face layout on disk."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

PATCH, GRID = 16, 32
MEAN, STD = 0.5, 0.25


@dataclass(frozen=True)
class Shape:
    """The backbone's hyper-parameters, as Hugging Face names them."""

    hidden_size: int = 192
    num_hidden_layers: int = 6
    num_attention_heads: int = 6
    intermediate_size: int = 768
    patch_size: int = PATCH
    image_size: int = PATCH * GRID
    layer_norm_eps: float = 1e-6


class Block(nn.Module):
    """Pre-norm transformer block, exact GELU; tokens [B,N,C] to [B,N,C]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.norm1 = nn.LayerNorm(width, shape.layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, shape.layer_norm_eps)
        self.up = nn.Linear(width, shape.intermediate_size)
        self.down = nn.Linear(shape.intermediate_size, width)

    def project(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q, k, v, each [B,H,N,D], of the block's own self-attention."""
        b, n, c = x.shape
        qkv = self.qkv(self.norm1(x)).view(b, n, 3, self.heads, c // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.project(x)
        x = x + self.out(_attend(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Self-attention, [B,H,N,D] each, by the way that is fastest to train on a CPU."""
    if q.shape[2] > 300:
        return F.scaled_dot_product_attention(q, k, v)
    # At few tokens the backward of the fused attention takes most of a step; autocast would send
    # the softmax through f32.
    with torch.autocast("cpu", enabled=False):
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return scores.softmax(-1) @ v


class SmallViT(nn.Module):
    """Frozen model of the demo: u8 images [B,3,h,w] to normalised tokens [B,1+T,C]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.hidden_size
        self.patch = nn.Linear(3 * PATCH * PATCH, width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.zeros(1, 1 + GRID * GRID, width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.LayerNorm(width, shape.layer_norm_eps)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02 if module is not self.patch else 0.03)
                nn.init.zeros_(module.bias)
        for parameter in (self.cls_token, self.positions):
            nn.init.trunc_normal_(parameter, std=0.02)

    def embed(self, images: torch.Tensor, offset: tuple[int, int] = (0, 0)) -> torch.Tensor:
        """Tokens [B,1+T,C]; ``offset`` places a small image inside the 32x32 position grid."""
        b, _, h, w = images.shape
        rows, columns = h // PATCH, w // PATCH
        pixels = (images.float() / 255 - MEAN) / STD
        pixels = pixels.view(b, 3, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        tokens = self.patch(pixels.reshape(b, rows * columns, -1))
        grid = self.positions[:, 1:].view(1, GRID, GRID, -1)
        grid = grid[:, offset[0] : offset[0] + rows, offset[1] : offset[1] + columns]
        first = (self.cls_token + self.positions[:, :1]).expand(b, -1, -1)
        return torch.cat([first, tokens + grid.flatten(1, 2)], 1)

    def forward(self, images: torch.Tensor, offset: tuple[int, int] = (0, 0)) -> torch.Tensor:
        x = self.embed(images, offset)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def export(model: SmallViT, shape: Shape, folder: Path) -> None:
    """Write f16 weights, ``config.json`` and ``preprocessor_config.json``, each atomically."""
    folder.mkdir(parents=True, exist_ok=True)
    out = {
        "embeddings.cls_token": model.cls_token,
        "embeddings.position_embeddings": model.positions,
        "embeddings.patch_embeddings.projection.weight": model.patch.weight.view(
            -1, 3, PATCH, PATCH
        ),
        "embeddings.patch_embeddings.projection.bias": model.patch.bias,
        "layernorm.weight": model.norm.weight,
        "layernorm.bias": model.norm.bias,
    }
    for i, block in enumerate(model.blocks):
        for kind in ("weight", "bias"):
            at = f"encoder.layer.{i}."
            parts = getattr(block.qkv, kind).chunk(3)
            for name, part in zip(("query", "key", "value"), parts, strict=True):
                out[f"{at}attention.attention.{name}.{kind}"] = part
            for name, module in (
                ("attention.output", block.out),
                ("intermediate", block.up),
                ("output", block.down),
            ):
                out[f"{at}{name}.dense.{kind}"] = getattr(module, kind)
            out[f"{at}layernorm_before.{kind}"] = getattr(block.norm1, kind)
            out[f"{at}layernorm_after.{kind}"] = getattr(block.norm2, kind)
    weights = {f"vit.{k}": v.detach().half().contiguous().clone() for k, v in out.items()}
    save_file(weights, folder / "model.safetensors.tmp", metadata={"format": "pt"})
    (folder / "model.safetensors.tmp").replace(folder / "model.safetensors")
    config = {
        "model_type": "vit",
        "architectures": ["ViTModel"],
        **asdict(shape),
        "hidden_act": "gelu",
        "qkv_bias": True,
        "num_channels": 3,
        "attention_probs_dropout_prob": 0.0,
        "hidden_dropout_prob": 0.0,
    }
    size = {"height": shape.image_size, "width": shape.image_size}
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": size,
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [MEAN] * 3,
        "image_std": [STD] * 3,
    }
    # safetensors makes files that only their owner can read.
    (folder / "model.safetensors").chmod(0o644)
    for name, record in (("config", config), ("preprocessor_config", preprocessor)):
        (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")


def load_backbone(folder: Path) -> SmallViT:
    """The exported Hugging Face layout back into the training module."""
    config = json.loads((folder / "config.json").read_text())
    shape = Shape(**{k: config[k] for k in Shape.__dataclass_fields__})
    model = SmallViT(shape)
    old = {
        k.removeprefix("vit."): v.float()
        for k, v in load_file(folder / "model.safetensors").items()
    }
    new = {
        "cls_token": old["embeddings.cls_token"],
        "positions": old["embeddings.position_embeddings"],
        "patch.weight": old["embeddings.patch_embeddings.projection.weight"].flatten(1),
        "patch.bias": old["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": old["layernorm.weight"],
        "norm.bias": old["layernorm.bias"],
    }
    for i in range(shape.num_hidden_layers):
        at = f"encoder.layer.{i}."
        for kind in ("weight", "bias"):
            new[f"blocks.{i}.qkv.{kind}"] = torch.cat(
                [old[f"{at}attention.attention.{n}.{kind}"] for n in ("query", "key", "value")]
            )
            for name, source in (
                ("out", "attention.output.dense"),
                ("up", "intermediate.dense"),
                ("down", "output.dense"),
                ("norm1", "layernorm_before"),
                ("norm2", "layernorm_after"),
            ):
                new[f"blocks.{i}.{name}.{kind}"] = old[f"{at}{source}.{kind}"]
    model.load_state_dict(new)
    return model.eval()
