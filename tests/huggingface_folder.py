"""Hugging Face folders, written from golden vectors or from a timm model, for the tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from helpers import Golden


def write_folder(
    folder: Path,
    config: dict[str, Any],
    tensors: dict[str, Tensor],
    processor: dict[str, Any] | None = None,
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and what the preprocessor says, if anything."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, folder / "model.safetensors")
    if processor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def golden_folder(golden: Golden, folder: Path) -> Path:
    """The frozen model of a golden file as a Hugging Face folder."""
    config = {**golden.config, "model_type": "vit", "hidden_act": "gelu", "layer_norm_eps": 1e-12}
    return write_folder(folder, config, golden.group("frozen"))


def config_of(model: VisionTransformer, model_type: str, **changes: Any) -> dict[str, Any]:
    """A ``config.json`` that describes a timm model."""
    block = model.blocks[0]
    config = {
        "model_type": model_type,
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "intermediate_size": block.mlp.fc1.out_features,
        "hidden_act": "gelu",
        "layer_norm_eps": block.norm1.eps,
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "num_channels": 3,
        "qkv_bias": block.attn.qkv.bias is not None,
    }
    return {**config, **changes}


def tensors_of(model: VisionTransformer, *, dino: bool = False) -> dict[str, Tensor]:
    """A timm model's encoder under the names that ViT and DeiT, or DINOv2, have in transformers."""
    out = {
        "embeddings.patch_embeddings.projection.weight": model.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": model.patch_embed.proj.bias,
        "embeddings.position_embeddings": model.pos_embed,
        "embeddings.cls_token": model.cls_token,
        "layernorm.weight": model.norm.weight,
        "layernorm.bias": model.norm.bias,
    }
    names = {"attn.proj": "attention.output.dense"}
    if dino:
        names |= {"norm1": "norm1", "norm2": "norm2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    else:
        names |= {"norm1": "layernorm_before", "norm2": "layernorm_after"}
        names |= {"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense"}
    for index, block in enumerate(model.blocks):
        at = f"encoder.layer.{index}"
        for kind in ("weight", "bias"):
            for own, theirs in names.items():
                out[f"{at}.{theirs}.{kind}"] = getattr(block.get_submodule(own), kind)
            if getattr(block.attn.qkv, kind) is not None:
                parts = getattr(block.attn.qkv, kind).chunk(3)
                for name, part in zip(("query", "key", "value"), parts, strict=True):
                    out[f"{at}.attention.attention.{name}.{kind}"] = part
        if dino:
            out[f"{at}.layer_scale1.lambda1"] = block.ls1.gamma
            out[f"{at}.layer_scale2.lambda1"] = block.ls2.gamma
    return {name: tensor.detach() for name, tensor in out.items()}


def prefixed(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The same tensors as a model with a head saves them, with the head's own among them."""
    width = tensors["layernorm.weight"].shape[0]
    head = {"classifier.weight": torch.zeros(3, width), "classifier.bias": torch.zeros(3)}
    return {**{f"{prefix}{name}": tensor for name, tensor in tensors.items()}, **head}
