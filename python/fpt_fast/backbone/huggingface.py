"""Frozen models from a Hugging Face folder, ``config.json`` and safetensors, by hand.

ViT, DeiT, DINOv2 and DINOv2 with registers.  Poolers and classification heads are left aside.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fpt_fast.backbone.errors import BackboneError
from fpt_fast.backbone.linear_maps import LayerScale, Mlp
from fpt_fast.backbone.vit import Embedding, FrozenBlock, FrozenVit
from fpt_fast.backbone.weights import weights_hash
from fpt_fast.records import BackboneSpec

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_new": lambda: nn.GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: nn.GELU(approximate="tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
}
# Mean and standard deviation that the image processor of each family has where a folder says none.
_HALVES = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@dataclass(frozen=True)
class _Family:
    """Where one ``model_type`` keeps what; ``%`` names a tensor's ``weight`` or ``bias``."""

    prefix: str
    tokens: tuple[str, ...]
    block: Mapping[str, str]
    layer_scale: bool
    normalisation: tuple[tuple[float, ...], tuple[float, ...]]


_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
_DINO_BLOCK = {
    "norm1": "norm1",
    "proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_FAMILIES = {
    "vit": _Family("vit.", ("cls_token",), _VIT_BLOCK, False, _HALVES),
    "deit": _Family("deit.", ("cls_token", "distillation_token"), _VIT_BLOCK, False, _IMAGENET),
    "dinov2": _Family("dinov2.", ("cls_token",), _DINO_BLOCK, True, _IMAGENET),
    "dinov2_with_registers": _Family(
        "dinov2_with_registers.", ("cls_token", "register_tokens"), _DINO_BLOCK, True, _IMAGENET
    ),
}
_IGNORED = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.", "decoder.")
_IGNORED_NAMES = {"embeddings.mask_token"}


def load_huggingface_folder(folder: Path) -> tuple[FrozenVit, BackboneSpec]:
    """Read the model of ``folder``; weights keep the dtype they were saved in.

    Raises ``BackboneError`` for a model type that is not supported, missing or superfluous
    tensors, and tensors whose shapes are not what the configuration says.
    """
    config = _read_json(folder / "config.json")
    kind = config.get("model_type")
    if kind not in _FAMILIES:
        raise BackboneError(
            f"{folder}: model_type {kind!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    family = _FAMILIES[str(kind)]
    source = _Weights(folder, _read_weights(folder), family)
    vit = _skeleton(folder, config, family)
    state = source.translate(vit, family)
    try:
        vit.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise BackboneError(
            f"{folder}: the weights are not what config.json says. {error}"
        ) from error
    mean, std = _normalisation(folder, family)
    patch, (rows, columns) = vit.embedding.projection.kernel_size, vit.embedding.grid
    spec = BackboneSpec(
        name=folder.resolve().name,
        weights_hash=weights_hash(vit),
        hidden_size=vit.embedding.projection.out_channels,
        num_heads=vit.block(0).num_heads,
        depth=len(vit.blocks),
        patch_size=(patch[0], patch[1]),
        prefix_tokens=vit.embedding.prefix.shape[1],
        has_class_token=True,
        image_size=(rows * patch[0], columns * patch[1]),
        mean=mean,
        std=std,
    )
    return vit, spec


class _Weights:
    """The tensors of a folder under the names of their encoder, each to be taken once."""

    def __init__(self, folder: Path, tensors: dict[str, Tensor], family: _Family) -> None:
        self.folder = folder
        if any(name.startswith(family.prefix) for name in tensors):
            # Behind the encoder's prefix is all that is read; the rest are heads and poolers.
            tensors = {
                name.removeprefix(family.prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(family.prefix)
            }
        self.left = {
            name: tensor
            for name, tensor in tensors.items()
            if not name.startswith(_IGNORED) and name not in _IGNORED_NAMES
        }

    def take(self, name: str) -> Tensor:
        """Hand out one tensor; a missing one is an error."""
        if name not in self.left:
            raise BackboneError(
                f"{self.folder}: the weights lack {name!r}; is the safetensors file that of the "
                "whole model?"
            )
        return self.left.pop(name)

    def translate(self, vit: FrozenVit, family: _Family) -> dict[str, Tensor]:
        """The state dict of ``vit``; raises where anything is missing or left over."""
        prefix = torch.cat([self.take(f"embeddings.{name}") for name in family.tokens], 1)
        state = {
            "embedding.prefix": prefix,
            "embedding.position": self.take("embeddings.position_embeddings"),
        }
        for kind in ("weight", "bias"):
            projection = f"embeddings.patch_embeddings.projection.{kind}"
            state[f"embedding.projection.{kind}"] = self.take(projection)
            state[f"norm.{kind}"] = self.take(f"layernorm.{kind}")
        wanted = vit.state_dict().keys()
        for index in range(len(vit.blocks)):
            ours, theirs = f"blocks.{index}", f"encoder.layer.{index}"
            for kind in ("weight", "bias"):
                if f"{ours}.qkv.{kind}" in wanted:
                    parts = [
                        self.take(f"{theirs}.attention.attention.{part}.{kind}")
                        for part in ("query", "key", "value")
                    ]
                    state[f"{ours}.qkv.{kind}"] = torch.cat(parts)
                for own, name in family.block.items():
                    state[f"{ours}.{own}.{kind}"] = self.take(f"{theirs}.{name}.{kind}")
            if family.layer_scale:
                for branch in (1, 2):
                    scale = self.take(f"{theirs}.layer_scale{branch}.lambda1")
                    state[f"{ours}.scale{branch}.gamma"] = scale
        if self.left:
            names = sorted(self.left)
            raise BackboneError(
                f"{self.folder}: {len(names)} tensors would go unused, such as {names[0]!r}; "
                "config.json does not describe this model"
            )
        return state


def _skeleton(folder: Path, config: dict[str, Any], family: _Family) -> FrozenVit:
    """A model of the right shape without weights, on the meta device."""
    try:
        width, depth = int(config["hidden_size"]), int(config["num_hidden_layers"])
        heads = int(config["num_attention_heads"])
        hidden = int(
            config["intermediate_size"]
            if "intermediate_size" in config
            else width * config["mlp_ratio"]
        )
        patch, image = _pair(config["patch_size"]), _pair(config["image_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise BackboneError(
            f"{folder / 'config.json'} does not describe the model: {type(error).__name__}: {error}"
        ) from error
    act = str(config.get("hidden_act", "gelu"))
    if act not in _ACTIVATIONS:
        known = ", ".join(_ACTIVATIONS)
        raise BackboneError(f"{folder}: hidden_act {act!r} is not supported; supported are {known}")
    if config.get("use_swiglu_ffn"):
        raise BackboneError(
            f"{folder}: use_swiglu_ffn is not supported from a Hugging Face folder; load the same "
            "model by its timm name"
        )
    if config.get("num_channels", 3) != 3 or width % heads:
        raise BackboneError(
            f"{folder}: expected 3 channels and a width that the heads divide, got "
            f"{config.get('num_channels', 3)} channels, width {width}, {heads} heads"
        )
    eps = float(config.get("layer_norm_eps", 1e-6 if family.layer_scale else 1e-12))
    grid = (image[0] // patch[0], image[1] // patch[1])
    tokens = len(family.tokens)
    if "register_tokens" in family.tokens:
        tokens = 1 + int(config.get("num_register_tokens", 4))
    positioned = 1 if "register_tokens" in family.tokens else tokens
    with torch.device("meta"):
        embedding = Embedding(
            nn.Conv2d(3, width, patch, patch),
            nn.Identity(),
            torch.empty(1, tokens, width),
            torch.empty(1, positioned + grid[0] * grid[1], width),
            grid,
            nn.Identity(),
        )
        blocks = [
            FrozenBlock(
                heads,
                nn.LayerNorm(width, eps),
                nn.Linear(width, 3 * width, bias=bool(config.get("qkv_bias", True))),
                nn.Linear(width, width),
                nn.LayerNorm(width, eps),
                Mlp(width, hidden, _ACTIVATIONS[act]()),
                scale1=LayerScale(width) if family.layer_scale else None,
                scale2=LayerScale(width) if family.layer_scale else None,
            )
            for _ in range(depth)
        ]
        return FrozenVit(embedding, blocks, nn.LayerNorm(width, eps))


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif index.is_file():
        files = sorted(set(_read_json(index).get("weight_map", {}).values()))
    else:
        raise BackboneError(
            f"{folder} has no model.safetensors; pickled weights (pytorch_model.bin) are not read: "
            "convert them with transformers' save_pretrained"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if Path(file).name != file:
            raise BackboneError(f"{index} names a file outside its folder: {file!r}")
        try:
            tensors |= load_file(folder / file)
        except (OSError, SafetensorError) as error:
            raise BackboneError(f"cannot read {folder / file}: {error}") from error
    return tensors


def _normalisation(
    folder: Path, family: _Family
) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    mean, std = family.normalisation
    file = folder / "preprocessor_config.json"
    if file.is_file():
        processor = _read_json(file)
        if processor.get("do_normalize", True):
            mean, std = processor.get("image_mean", mean), processor.get("image_std", std)
        else:
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _triple(mean, file), _triple(std, file)


def _triple(values: Any, file: Path) -> tuple[float, float, float]:
    try:
        red, green, blue = (float(value) for value in values)
    except (TypeError, ValueError):
        raise BackboneError(f"{file} must give three numbers a channel, got {values!r}") from None
    return red, green, blue


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, list):
        height, width = value
        return int(height), int(width)
    return int(value), int(value)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BackboneError(f"cannot read {file}: {error}") from error
    if not isinstance(values, dict):
        raise BackboneError(f"{file} must hold a JSON object")
    return values
