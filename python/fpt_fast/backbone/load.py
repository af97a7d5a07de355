"""One door for every source of a frozen model."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fpt_fast.backbone.dtype import resolve_device, resolve_dtype
from fpt_fast.backbone.errors import BackboneError
from fpt_fast.backbone.frozen import FrozenBackbone
from fpt_fast.backbone.huggingface import load_huggingface_folder
from fpt_fast.backbone.positions import POSITION_INTERPOLATIONS, PositionInterpolation
from fpt_fast.backbone.self_check import check_own_pass
from fpt_fast.backbone.timm_modules import adapt_module, has_class_token
from fpt_fast.backbone.timm_names import create_timm_model, load_timm_folder
from fpt_fast.backbone.vit import FrozenVit
from fpt_fast.backbone.weights import weights_hash
from fpt_fast.records import Attention, BackboneSpec

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)


def load_backbone(
    source: str | Path | nn.Module,
    *,
    checkpoint_path: str | Path | None = None,
    pretrained: bool = True,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    position_interpolation: PositionInterpolation = "timm",
    attention: Attention = "auto",
) -> FrozenBackbone:
    """Load a frozen vision transformer, verified and ready to run.

    ``source`` is one of

    - a timm name, ``"vit_base_patch16_384"``, ``"timm/…"`` or ``"hf-hub:…"``, with weights from
      the hub, from ``checkpoint_path`` (safetensors, or a torch file of weights), or random with
      ``pretrained=False``;
    - a folder: of a Hugging Face ViT, DeiT or DINOv2 (``config.json`` and safetensors), or as
      timm saves one;
    - a module of your own with timm's block interface (``patch_embed``, ``cls_token``,
      ``pos_embed``, ``blocks``, ``norm``); it is copied, never changed.

    ``dtype`` ``"auto"``: bf16 where the CPU multiplies it in hardware, bf16 or f16 on a GPU, else
    f32; or ``"float32"``, ``"bfloat16"``, ``"float16"``.  ``position_interpolation`` fits the
    position embeddings to input sizes other than the native one: ``"timm"`` as timm does,
    ``"bicubic_scale"`` as the authors' code does.  ``attention`` is ``"auto"`` or an implementation
    of ``fpt_fast.ops.frozen_attention``; they differ by rounding only.

    Models from timm and of your own are run once on a small random input; ``BackboneError`` (a
    ``ValueError``) is raised, with the reason, for those whose own forward the frozen pass does
    not reproduce, and for everything that cannot be found, read or used.
    """
    if position_interpolation not in POSITION_INTERPOLATIONS:
        raise BackboneError(
            f"position_interpolation must be one of {', '.join(POSITION_INTERPOLATIONS)}, "
            f"got {position_interpolation!r}"
        )
    placed = resolve_device(device)
    precision = resolve_dtype(dtype, placed)
    checkpoint = None if checkpoint_path is None else Path(checkpoint_path)
    vit, spec = _load(source, checkpoint, pretrained)
    return FrozenBackbone(
        vit,
        spec,
        device=placed,
        dtype=precision,
        position_interpolation=position_interpolation,
        attention=attention,
    )


def backbone_name(source: str | Path | nn.Module) -> str:
    """The name that ``load_backbone(source).spec`` will have, without loading anything."""
    if isinstance(source, nn.Module):
        return type(source).__name__
    folder = _folder(source)
    if folder is not None:
        return folder.resolve().name
    return str(source).removeprefix("hf-hub:").removeprefix("timm/")


def _load(
    source: str | Path | nn.Module, checkpoint: Path | None, pretrained: bool
) -> tuple[FrozenVit, BackboneSpec]:
    folder = _folder(source)
    if checkpoint is not None and (folder is not None or isinstance(source, nn.Module)):
        raise BackboneError(
            "checkpoint_path goes with a timm name; this source has its own weights"
        )
    if isinstance(source, nn.Module):
        try:
            module = copy.deepcopy(source)
        except Exception as error:
            raise BackboneError(
                f"cannot copy the module: {type(error).__name__}: {error}"
            ) from error
        return _from_module(module, backbone_name(source))
    if folder is None:
        module = create_timm_model(str(source), checkpoint, pretrained)
        return _from_module(module, backbone_name(source))
    if "architecture" in _read_config(folder):
        return _from_module(load_timm_folder(folder), backbone_name(folder))
    return load_huggingface_folder(folder)


def _folder(source: str | Path | nn.Module) -> Path | None:
    """The folder that ``source`` names, or None for a timm name or a module."""
    if isinstance(source, nn.Module):
        return None
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise BackboneError(
                f"{path} has no config.json; a Hugging Face folder has config.json and "
                "model.safetensors"
            )
        return path
    looks_like_path = isinstance(source, Path) or path.is_absolute() or str(source)[:1] in ".~"
    if looks_like_path or path.is_file():
        raise BackboneError(
            f"{path} is not a folder; give a folder with config.json, or a timm name together with "
            "checkpoint_path"
        )
    return None


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read {folder / 'config.json'}: {error}") from error
    if not isinstance(config, dict):
        raise BackboneError(f"{folder / 'config.json'} must hold a JSON object")
    return config


def _from_module(module: nn.Module, name: str) -> tuple[FrozenVit, BackboneSpec]:
    try:
        vit = adapt_module(module)
        patch = vit.embedding.projection.kernel_size
        rows, columns = vit.embedding.grid
        size = (rows * patch[0], columns * patch[1])
        check_own_pass(module, size)
    except BackboneError as error:
        raise BackboneError(f"{name} cannot be used as a frozen model: {error}") from error
    cfg = getattr(module, "pretrained_cfg", None) or {}
    spec = BackboneSpec(
        name=name,
        weights_hash=weights_hash(vit),
        hidden_size=vit.embedding.projection.out_channels,
        num_heads=vit.block(0).num_heads,
        depth=len(vit.blocks),
        patch_size=(patch[0], patch[1]),
        prefix_tokens=vit.embedding.prefix.shape[1],
        has_class_token=has_class_token(module),
        image_size=size,
        mean=tuple(cfg.get("mean", _IMAGENET_MEAN)),
        std=tuple(cfg.get("std", _IMAGENET_STD)),
    )
    return vit, spec
