"""A vision transformer whose parameters are named as in Hugging Face's ViT.

What ``frozen_vit`` and ``side_vit`` share.  ``transformers`` is not needed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpt_fast.backbone.positions import interpolate_positions

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": functional.gelu,
    "gelu_new": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "silu": functional.silu,
}
# What a transformers ViTConfig holds where nobody set anything.
_DEFAULTS = {
    "num_channels": 3,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "qkv_bias": True,
    "num_labels": 2,
}


@dataclass(frozen=True, slots=True)
class ImageClassifierOutput:
    """Result of a classifier: ``logits`` [B, labels]; the rest is always None here."""

    logits: Tensor
    loss: None = None
    hidden_states: None = None
    attentions: None = None


@dataclass(frozen=True, slots=True)
class VitSettings:
    """What is read of a ``config`` object with the attributes of a Hugging Face ``ViTConfig``."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_channels: int
    activation: Callable[[Tensor], Tensor]
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    layer_norm_eps: float
    initializer_range: float
    qkv_bias: bool
    num_labels: int

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns) of an image of ``image_size``."""
        return (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )


def read_config(config: object) -> VitSettings:
    """Read and check ``config``; raises ``ValueError`` naming the attribute that cannot work."""

    def read(name: str) -> Any:
        if hasattr(config, name):
            return getattr(config, name)
        if name in _DEFAULTS:
            return _DEFAULTS[name]
        raise ValueError(f"config must have the attribute {name}, like a transformers ViTConfig")

    activation = read("hidden_act")
    if isinstance(activation, str):
        if activation not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(
                f"config.hidden_act must be one of {known}, or a function, got {activation!r}"
            )
        activation = _ACTIVATIONS[activation]
    if read("hidden_size") % read("num_attention_heads"):
        raise ValueError(
            f"config.num_attention_heads must divide hidden_size {read('hidden_size')}, "
            f"got {read('num_attention_heads')}"
        )
    return VitSettings(
        image_size=_pair(read("image_size")),
        patch_size=_pair(read("patch_size")),
        activation=activation,
        **{
            name: read(name)
            for name in (
                "hidden_size",
                "num_hidden_layers",
                "num_attention_heads",
                "intermediate_size",
                "num_channels",
                "hidden_dropout_prob",
                "attention_probs_dropout_prob",
                "layer_norm_eps",
                "initializer_range",
                "qkv_bias",
                "num_labels",
            )
        },
    )


def refuse_unsupported(config: object, arguments: dict[str, object]) -> None:
    """Raise ``ValueError`` for what Hugging Face's forward offers and this one does not.

    ``arguments`` are the call's own; where one is None, ``config`` decides as it does there.
    """
    remedies = {
        "head_mask": "no head can be masked",
        "labels": "compute the loss from .logits",
        "output_attentions": "no attention map is ever formed",
        "output_hidden_states": "hidden states are not kept",
    }
    for name, remedy in remedies.items():
        value = arguments[name]
        if value is None and name.startswith("output_"):
            value = getattr(config, name, None)
        if value is not None and value is not False:
            raise ValueError(f"{name} is not supported here ({remedy}), got {value!r}")
    return_dict = arguments["return_dict"]
    if return_dict is None:
        return_dict = getattr(config, "use_return_dict", True)
    if not return_dict:
        raise ValueError("return_dict must be True here (read .logits), got False")


class ViTPatchEmbeddings(nn.Module):
    """Holds the projection of the patches."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.projection = nn.Conv2d(
            settings.num_channels,
            settings.hidden_size,
            kernel_size=settings.patch_size,
            stride=settings.patch_size,
        )


class ViTEmbeddings(nn.Module):
    """Class token, patches and positions: pixels [B, 3, h, w] to tokens [B, 1 + patches, C]."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.settings = settings
        width, (rows, columns) = settings.hidden_size, settings.grid
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.empty(1, rows * columns + 1, width))
        self.patch_embeddings = ViTPatchEmbeddings(settings)

    def forward(self, pixel_values: Tensor, interpolate_pos_encoding: bool) -> Tensor:
        """Return the tokens; ``ValueError`` for another size than the config's, unless allowed."""
        settings = self.settings
        if pixel_values.ndim != 4 or pixel_values.shape[1] != settings.num_channels:
            raise ValueError(
                f"pixel_values must be [B, {settings.num_channels}, h, w], "
                f"got {tuple(pixel_values.shape)}"
            )
        size = (pixel_values.shape[2], pixel_values.shape[3])
        if not interpolate_pos_encoding and size != settings.image_size:
            raise ValueError(
                f"pixel_values must be {settings.image_size[0]}x{settings.image_size[1]} pixels "
                f"like config.image_size, got {size[0]}x{size[1]}; allow others with "
                "interpolate_pos_encoding=True"
            )
        patches = self.patch_embeddings.projection(pixel_values).flatten(2).transpose(1, 2)
        class_token = self.cls_token.expand(len(pixel_values), -1, -1)
        grid = (size[0] // settings.patch_size[0], size[1] // settings.patch_size[1])
        tokens = torch.cat((class_token, patches), dim=1) + self._positions(grid)
        return functional.dropout(tokens, settings.hidden_dropout_prob, self.training)

    def _positions(self, grid: tuple[int, int]) -> Tensor:
        positions = self.position_embeddings
        if grid == self.settings.grid:
            return positions
        patches = interpolate_positions(positions[:, 1:], self.settings.grid, grid, "bicubic_scale")
        return torch.cat((positions[:, :1], patches.to(positions.dtype)), dim=1)


class ViTSelfAttention(nn.Module):
    """Holds the projections to queries, keys and values."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        width, bias = settings.hidden_size, settings.qkv_bias
        self.query = nn.Linear(width, width, bias=bias)
        self.key = nn.Linear(width, width, bias=bias)
        self.value = nn.Linear(width, width, bias=bias)


class ViTDense(nn.Module):
    """Holds one Linear under the name ``dense``."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features)


class ViTAttention(nn.Module):
    """Holds self-attention's projections and its output."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.attention = ViTSelfAttention(settings)
        self.output = ViTDense(settings.hidden_size, settings.hidden_size)


class ViTLayer(nn.Module):
    """Pre-norm transformer layer, in two halves with queries, keys and values between them."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.settings = settings
        width, eps = settings.hidden_size, settings.layer_norm_eps
        self.attention = ViTAttention(settings)
        self.intermediate = ViTDense(width, settings.intermediate_size)
        self.output = ViTDense(settings.intermediate_size, width)
        self.layernorm_before = nn.LayerNorm(width, eps=eps)
        self.layernorm_after = nn.LayerNorm(width, eps=eps)

    def project(self, seen: Tensor, queries: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``q`` [B, H, queries, D] of the first tokens, ``k``, ``v`` [B, H, n, D] of all.

        ``seen`` [B, n, C] are the layer's input tokens.
        """
        normed = self.layernorm_before(seen)
        own = self.attention.attention
        return (
            self._split(own.query(normed[:, :queries])),
            self._split(own.key(normed)),
            self._split(own.value(normed)),
        )

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention [B, H, queries, D] of ``q`` to ``k`` and ``v``."""
        dropout = self.settings.attention_probs_dropout_prob if self.training else 0.0
        return functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)

    def complete(self, tokens: Tensor, attended: Tensor) -> Tensor:
        """Return ``tokens`` [B, n, C] after the layer, given their attention [B, H, n, D]."""
        dropout = self.settings.hidden_dropout_prob
        out = self.attention.output.dense(attended.transpose(1, 2).flatten(2))
        tokens = tokens + functional.dropout(out, dropout, self.training)
        hidden = self.settings.activation(self.intermediate.dense(self.layernorm_after(tokens)))
        out = self.output.dense(hidden)
        return tokens + functional.dropout(out, dropout, self.training)

    def _split(self, tokens: Tensor) -> Tensor:
        batch, length, _ = tokens.shape
        return tokens.view(batch, length, self.settings.num_attention_heads, -1).transpose(1, 2)


class ViTEncoder(nn.Module):
    """Holds the layers under the name ``layer``."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.layer = nn.ModuleList(ViTLayer(settings) for _ in range(settings.num_hidden_layers))

    def layers(self) -> list[ViTLayer]:
        """Return the layers in order, by their type."""
        return [cast(ViTLayer, layer) for layer in self.layer]


class ViTModel(nn.Module):
    """Holds embeddings, encoder and final LayerNorm."""

    def __init__(self, settings: VitSettings) -> None:
        super().__init__()
        self.embeddings = ViTEmbeddings(settings)
        self.encoder = ViTEncoder(settings)
        self.layernorm = nn.LayerNorm(settings.hidden_size, eps=settings.layer_norm_eps)


class ViTClassifier(nn.Module):
    """``vit`` and ``classifier``, with fresh weights as Hugging Face draws them."""

    def __init__(self, config: object) -> None:
        super().__init__()
        self.config = config
        self.settings = read_config(config)
        self.num_labels = self.settings.num_labels
        self.vit = ViTModel(self.settings)
        self.classifier = (
            nn.Linear(self.settings.hidden_size, self.num_labels)
            if self.num_labels > 0
            else nn.Identity()
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew: truncated normal, biases 0, LayerNorm at 1 and 0."""
        std = self.settings.initializer_range
        nn.init.trunc_normal_(self.vit.embeddings.cls_token, std=std)
        nn.init.trunc_normal_(self.vit.embeddings.position_embeddings, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.trunc_normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def classify(self, tokens: Tensor) -> ImageClassifierOutput:
        """Return the head's output on the class token of ``tokens`` [B, n, C]."""
        return ImageClassifierOutput(self.classifier(self.vit.layernorm(tokens[:, 0])))


def _pair(size: Any) -> tuple[int, int]:
    if isinstance(size, int):
        return (size, size)
    height, width = size
    return (int(height), int(width))
