"""The side network: a narrow vision transformer over the small image and the prompts' states."""

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn import functional

from fpt_fast.ops import SideWeights, side_attention, side_layers, trained_linear
from fpt_fast.ops.modules import is_as_made, is_trained_linear, multiplies_in_bf16

_INIT_STD = 0.02
# Of a layer, in the order of SideWeights.
_PARTS: tuple[tuple[str, type[nn.Module]], ...] = (
    ("norm1", nn.LayerNorm),
    ("qkv", nn.Linear),
    ("proj", nn.Linear),
    ("norm2", nn.LayerNorm),
    ("fc1", nn.Linear),
    ("fc2", nn.Linear),
)


class SideNetwork(nn.Module):
    """Vision transformer of width ``S`` whose layer *i* also sees ``states[i]``.

    ``patch_size`` and ``image_size`` are (height, width) in pixels, or one number for both;
    ``image_size`` is the size of the side input and need not be square.  It has its own class
    token and learned positions.  All weights start as published: truncated normal of standard
    deviation 0.02, biases 0, LayerNorm at 1 and 0.  Raises ``ValueError`` for sizes that do not
    fit together.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        num_layers: int,
        patch_size: int | tuple[int, int],
        image_size: int | tuple[int, int],
        num_outputs: int,
        mlp_ratio: float = 4,
        layer_norm_eps: float = 1e-12,
    ) -> None:
        super().__init__()
        self.num_heads, self.eps = num_heads, layer_norm_eps
        self.patch_size = _pair(patch_size)
        self.image_size = _pair(image_size)
        _check_sizes(width, num_heads, num_layers, self.patch_size, self.image_size, num_outputs)
        self.grid = (
            self.image_size[0] // self.patch_size[0],
            self.image_size[1] // self.patch_size[1],
        )

        self.patch_embed = nn.Linear(3 * self.patch_size[0] * self.patch_size[1], width)
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.positions = nn.Parameter(torch.empty(1, 1 + self.grid[0] * self.grid[1], width))
        self.layers = nn.ModuleList(
            SideLayer(width, num_heads, round(width * mlp_ratio), layer_norm_eps)
            for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width, eps=layer_norm_eps)
        self.head = nn.Linear(width, num_outputs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew, from PyTorch's global generator."""
        for weight in (self.cls_token, self.positions):
            nn.init.trunc_normal_(weight, std=_INIT_STD)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=_INIT_STD)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, pixels: Tensor, states: Tensor | None) -> Tensor:
        """Return logits ``[B, num_outputs]`` of ``pixels`` [B, 3, h, w] in normalised values.

        ``states`` [L, B, P, S], or None for the side network alone.  Raises ``ValueError`` where
        a shape does not fit this network.
        """
        self._check(pixels, states)
        tokens = self._through_layers(self.embed(pixels), states)
        normed = self.norm(tokens[:, 0])
        # A few rows take less time in f32 than their way to bf16 and back.
        narrow = normed.is_cpu and multiplies_in_bf16("cpu")
        with torch.autocast("cpu", enabled=False) if narrow else nullcontext():
            logits: Tensor = self.head(normed)
        return logits

    def _through_layers(self, tokens: Tensor, states: Tensor | None) -> Tensor:
        """The class token [B, 1, S] after all layers; the head reads nothing else of the last."""
        weights = [
            layer.weights(tokens.dtype) if is_as_made(layer, SideLayer) else None
            for layer in self.layers
        ]
        known = [layer for layer in weights if layer is not None]
        if len(known) == len(weights):
            return run_layers(tokens, states, known, self.num_heads, self.eps, 1)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            queries = 1 if i == last else tokens.shape[1]
            tokens = layer(tokens, None if states is None else states[i], queries)
        return tokens

    def embed(self, pixels: Tensor) -> Tensor:
        """Return the tokens ``[B, T, S]`` of ``pixels`` [B, 3, h, w], class token first."""
        # Not len(): an export would take the number for granted.
        batch = pixels.shape[0]
        (rows, columns), (height, width) = self.grid, self.patch_size
        # A convolution with stride equal to its size is a product of cut-out patches.
        patches = pixels.reshape(batch, 3, rows, height, columns, width)
        patches = patches.permute(0, 2, 4, 1, 3, 5)
        embed = self.patch_embed
        if is_trained_linear(embed, pixels):
            weight = embed.weight.view(-1, *patches.shape[3:])
            embedded = trained_linear(patches, weight, embed.bias).flatten(1, 2)
        else:
            embedded = embed(patches.reshape(batch, rows * columns, -1))
        class_token = self.cls_token.expand(batch, -1, -1)
        return torch.cat((class_token, embedded), dim=1) + self.positions

    def _check(self, pixels: Tensor, states: Tensor | None) -> None:
        if pixels.ndim != 4 or pixels.shape[1:] != (3, *self.image_size):
            raise ValueError(
                f"pixels must be [B, 3, {self.image_size[0]}, {self.image_size[1]}] (the side "
                f"input's size), got {tuple(pixels.shape)}"
            )
        if states is None:
            return
        batch, width = len(pixels), self.norm.normalized_shape[0]
        if states.ndim != 4 or (*states.shape[:2], states.shape[3]) != (
            len(self.layers),
            batch,
            width,
        ):
            raise ValueError(
                f"states must be [{len(self.layers)}, {batch}, P, {width}] (layers, batch, "
                f"prompts, width), got {tuple(states.shape)}"
            )


class SideLayer(nn.Module):
    """Pre-norm transformer layer over ``[tokens, prompts]`` that returns no prompts."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, layer_norm_eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.eps = layer_norm_eps
        self.norm1 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=layer_norm_eps)
        self.fc1 = nn.Linear(width, mlp_width)
        self.fc2 = nn.Linear(mlp_width, width)

    def forward(self, tokens: Tensor, prompts: Tensor | None, queries: int) -> Tensor:
        """Return the first ``queries`` tokens ``[B, queries, S]`` after this layer.

        ``tokens`` [B, T, S]; ``prompts`` [B, P, S] or None.  The prompts are cut off after the
        layer, so they are keys and values here, never queries, and skip the MLP.
        """
        weights = self.weights(tokens.dtype)
        if weights is None:
            return self._call_parts(tokens, prompts, queries)
        states = None if prompts is None else prompts.unsqueeze(0)
        return run_layers(tokens, states, [weights], self.num_heads, self.eps, queries)

    def weights(self, dtype: torch.dtype) -> SideWeights | None:
        """The layer's weights; None where they do not say all (a part is an adapter, or hooked, or
        of another ``dtype`` or epsilon), and the parts must be called."""
        found: list[Tensor] = []
        for name, kind in _PARTS:
            # By attribute, twelve times a layer, this took as long as some of the step's products.
            part = self._modules[name]
            if part is None or not is_as_made(part, kind):
                return None
            weight, bias = part._parameters.get("weight"), part._parameters.get("bias")
            if weight is None or bias is None:
                return None
            found += (weight, bias)
        if not self.norm1.eps == self.norm2.eps == self.eps or found[0].dtype != dtype:
            return None
        return SideWeights(*found)

    def _call_parts(self, tokens: Tensor, prompts: Tensor | None, queries: int) -> Tensor:
        """The same, part by part."""
        seen = tokens if prompts is None else torch.cat((tokens, prompts), dim=1)
        q, k, v = self.qkv(self.norm1(seen)).unflatten(2, (3, self.num_heads, -1)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (q[:, :queries], k, v))
        tokens = tokens[:, :queries] + self.proj(side_attention(q, k, v).transpose(1, 2).flatten(2))
        hidden: Tensor = self.fc2(functional.gelu(self.fc1(self.norm2(tokens))))
        return tokens + hidden


def run_layers(
    tokens: Tensor,
    states: Tensor | None,
    layers: Sequence[SideWeights],
    heads: int,
    eps: float,
    queries: int,
) -> Tensor:
    """``side_layers`` in the arithmetic that the present autocast asks for.

    In f32 the native layers were no faster than torch's operations on a busy machine: there they
    run by name only.
    """
    narrow = multiplies_in_bf16(tokens.device.type)
    return side_layers(
        tokens,
        states,
        layers,
        heads=heads,
        queries=queries,
        eps=eps,
        products="bfloat16" if narrow else "float32",
        impl="auto" if narrow else "torch",
    )


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _check_sizes(
    width: int,
    num_heads: int,
    num_layers: int,
    patch_size: tuple[int, int],
    image_size: tuple[int, int],
    num_outputs: int,
) -> None:
    if min(width, num_heads, num_layers, num_outputs, *patch_size, *image_size) < 1:
        raise ValueError(
            "width, num_heads, num_layers, num_outputs, patch_size and image_size must be at "
            f"least 1, got {(width, num_heads, num_layers, num_outputs, patch_size, image_size)}"
        )
    if width % num_heads:
        raise ValueError(f"num_heads must divide the side width {width}, got {num_heads}")
    if image_size[0] % patch_size[0] or image_size[1] % patch_size[1]:
        raise ValueError(
            f"image_size must be a multiple of the patch size {patch_size[0]}x{patch_size[1]}, "
            f"got {image_size[0]}x{image_size[1]}"
        )
