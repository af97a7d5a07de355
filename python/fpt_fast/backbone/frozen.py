"""The frozen model as the rest of the library sees it."""

from collections.abc import Iterator, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from fpt_fast.backbone.errors import BackboneError
from fpt_fast.backbone.positions import PositionInterpolation
from fpt_fast.backbone.vit import FrozenVit
from fpt_fast.config import check_divides, format_layers
from fpt_fast.ops import attention_with_scores, frozen_attention, scores_come_free
from fpt_fast.ops.implementation import resolve
from fpt_fast.records import Attention, BackboneSpec, Importance, LayerStates


class FrozenBackbone:
    """A frozen vision transformer; ``load_backbone`` makes one.

    ``spec`` describes it, ``device`` and ``dtype`` say where and in which precision it runs,
    ``position_interpolation`` how it fits its positions to other sizes, ``attention`` which
    implementation of ``frozen_attention`` it asks for.
    """

    def __init__(
        self,
        vit: FrozenVit,
        spec: BackboneSpec,
        *,
        device: torch.device,
        dtype: torch.dtype,
        position_interpolation: PositionInterpolation,
        attention: Attention = "auto",
    ) -> None:
        vit.place(device, dtype)
        self.vit = vit
        self.spec = spec
        self.device = device
        self.dtype = dtype
        self.position_interpolation = position_interpolation
        self.attention = attention
        self.attention_implementation = self._resolve_attention()

    def __repr__(self) -> str:
        s = self.spec
        return (
            f"FrozenBackbone({s.name}: {s.depth} layers, {s.num_heads} heads, {s.hidden_size} wide,"
            f" patch {s.patch_size[0]}x{s.patch_size[1]}; {self.dtype} on {self.device})"
        )

    def extract(
        self, pixels: Tensor, layers: Sequence[int], *, importance: Importance | None = None
    ) -> Iterator[LayerStates]:
        """Yield q, k, v of each of ``layers`` in one pass, lazily, one layer at a time.

        ``pixels`` [B, 3, h, w], normalised, on any device and in any floating dtype; the patch
        size must divide h and w.  ``layers``: ascending, 0-based.  The states are on ``device``
        in ``dtype``.

        With ``importance="global"``, layers before the last carry the ``lse`` of their attention,
        and their ``scores`` where it gives these almost for free: on a CPU.  In the last one only
        queries, keys and values are computed, and nothing after it: whoever wants its scores
        computes them from q and k.

        Raises ``ValueError`` (``BackboneError``, ``ConfigError``) for layers and sizes that
        cannot be, before anything runs.
        """
        self._check_pixels(pixels)
        layers = tuple(layers)
        ascending = bool(layers) and list(layers) == sorted(set(layers))
        if not ascending or layers[0] < 0 or layers[-1] >= self.spec.depth:
            raise BackboneError(
                f"layers must be ascending, without repeats, between 0 and {self.spec.depth - 1}, "
                f"got {format_layers(layers) if ascending else list(layers)}"
            )
        return self._extract(pixels, layers, importance == "global")

    # Not inference_mode: whoever trains on the states must be able to save them for backward.
    @torch.no_grad()
    def _extract(
        self, pixels: Tensor, layers: tuple[int, ...], with_scores: bool
    ) -> Iterator[LayerStates]:
        x = self._embed(pixels)
        for index in range(layers[-1]):
            block = self.vit.block(index)
            q, k, v = block.project(x)
            scores = lse = None
            if with_scores and index in layers:
                need_scores = scores_come_free(q, self.attention)
                out, scores, lse = attention_with_scores(
                    q, k, v, need_scores=need_scores, impl=self.attention
                )
                attended = cast(Tensor, out)  # asked for by default
            else:
                attended = self._attend(q, k, v)
            if index in layers:
                yield LayerStates(index, q, k, v, lse, scores)
            del q, k, v, scores, lse
            x = block.complete(x, attended)
        q, k, v = self.vit.block(layers[-1]).project(x)
        del x
        yield LayerStates(layers[-1], q, k, v)

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """One vector per image [B, C] f32, for linear probing; ``pixels`` as in ``extract``.

        The class token behind the final norm, or the mean of the patch tokens where there is no
        class token.
        """
        self._check_pixels(pixels)
        x = self._embed(pixels)
        for index in range(self.spec.depth - 1):
            x = self.vit.block(index)(x)
        last = self.vit.block(self.spec.depth - 1)
        q, k, v = last.project(x)
        # Nobody reads the other tokens of the last layer, so only these are computed.
        first = 0 if self.spec.has_class_token else self.spec.prefix_tokens
        used = slice(first, 1 if self.spec.has_class_token else None)
        attended = F.scaled_dot_product_attention(q[:, :, used], k, v)
        tokens = self.vit.norm(last.complete(x[:, used], attended))
        pooled: Tensor = self.vit.pooled_norm(tokens.float().mean(1).to(self.dtype))
        return pooled.float()

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention alone: without our own for the CPU, auto is torch's choice."""
        if self.attention == "auto" and self.attention_implementation != "native":
            return F.scaled_dot_product_attention(q, k, v)
        return frozen_attention(q, k, v, impl=self.attention)[0]

    def _resolve_attention(self) -> str:
        """What ``attention`` runs on tensors of this model; raises where it cannot."""
        spec = self.spec
        shape = (1, spec.num_heads, spec.num_tokens(spec.image_size), spec.head_width)
        q = torch.empty((), device=self.device, dtype=self.dtype).expand(shape)
        try:
            return resolve("frozen_attention", self.attention, (q, q, q)).name
        except ValueError as error:
            raise BackboneError(
                f"attention={self.attention!r} does not run {spec.name} in {self.dtype} on "
                f"{self.device}: {error}"
            ) from error

    def _embed(self, pixels: Tensor) -> Tensor:
        placed = pixels.to(device=self.device, dtype=self.dtype)
        x: Tensor = self.vit.embedding(placed, self.position_interpolation)
        return x

    def _check_pixels(self, pixels: Tensor) -> None:
        if pixels.dim() != 4 or pixels.shape[1] != 3 or not pixels.is_floating_point():
            raise BackboneError(
                f"pixels must be [B, 3, h, w], floating and normalised, got "
                f"{tuple(pixels.shape)} {pixels.dtype}"
            )
        check_divides(
            "the frozen input size", (pixels.shape[2], pixels.shape[3]), self.spec.patch_size
        )
