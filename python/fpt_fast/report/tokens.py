"""Pictures of what was kept of an image, and of where the prompts look."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fpt_fast.records import TokenExample
from fpt_fast.report.maps import attention_share, kept_share

# Wide enough for fine detail on screen and paper; a page with six images stays below 5 MB.
_LONGEST_SIDE = 512
_OUTLINED_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class TokenPicture:
    """An image as a JPEG, the same with a map of its patches as a PNG, and what colours mean.

    ``lowest`` and ``highest`` are the smallest and largest value of a patch; ``outlined`` counts
    the patches with a frame.
    """

    plain: bytes
    marked: bytes
    lowest: float
    highest: float
    outlined: int


def draw_tokens(example: TokenExample) -> TokenPicture:
    """Draw what was kept: the more layers and heads keep a patch, the warmer and clearer it is."""
    return _draw(example, kept_share(example).numpy())


def draw_attention(example: TokenExample) -> TokenPicture:
    """Draw where the prompts look: the more of their attention is on a patch, the warmer."""
    return _draw(example, attention_share(example).numpy())


def _draw(example: TokenExample, share: NDArray[np.float32]) -> TokenPicture:
    image = pixels_of(example)
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    top = top_patches(share)
    marked = Image.fromarray(overlay(np.asarray(image), share, top))
    return TokenPicture(
        plain=_encode(image, "JPEG", quality=90),
        # 256 colours show a heat map as well as 16 million, in a third of the bytes.
        marked=_encode(marked.quantize(256), "PNG", optimize=True),
        lowest=float(share.min()),
        highest=float(share.max()),
        outlined=int(top.sum()),
    )


def pixels_of(example: TokenExample) -> Image.Image:
    """The example's pixels as an image of PIL."""
    if example.pixels.dim() != 3 or len(example.pixels) != 3 or example.pixels.dtype != torch.uint8:
        raise ValueError(
            f"pixels of {example.key!r} must be [3, h, w] u8, got {tuple(example.pixels.shape)} "
            f"{example.pixels.dtype}"
        )
    return Image.fromarray(example.pixels.permute(1, 2, 0).contiguous().numpy())


def overlay(
    pixels: NDArray[np.uint8], share: NDArray[np.float32], top: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    """The image [h, w, 3] with a map of patches [rows, columns] over it, from its least to its
    most, and white frames around the ``top`` ones."""
    height, width = pixels.shape[:2]
    row_of = np.arange(height) * share.shape[0] // height
    column_of = np.arange(width) * share.shape[1] // width
    spread = float(share.max() - share.min())
    heat = (share - share.min()) / spread if spread > 0 else np.zeros_like(share)
    grey = pixels.mean(axis=2, keepdims=True, dtype=np.float32)
    # Half colour, half brightness of the image, so that its detail stays visible everywhere.
    drawn = 0.5 * heat_colours(heat)[row_of][:, column_of] + 0.5 * grey
    out: NDArray[np.uint8] = drawn.astype(np.uint8)
    out[_outlines(top[row_of][:, column_of])] = (255, 255, 255)
    return out


def heat_colours(heat: NDArray[np.floating]) -> NDArray[np.float32]:
    """Colours [h, w, 3] in 0..255 of ``heat`` [h, w] in [0, 1]."""
    from matplotlib import colormaps

    colours = np.asarray(colormaps["inferno"](heat), dtype=np.float32)[..., :3] * 255
    return colours


def top_patches(share: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The most often kept patches, at most a twentieth unless several tie for the last place."""
    count = max(1, round(share.size * _OUTLINED_SHARE))
    threshold = np.sort(share, axis=None)[-count]
    top: NDArray[np.bool_] = share >= threshold
    # A tie of everybody says nothing.
    return top if top.sum() <= 3 * count else share > threshold


def _outlines(inside: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Pixels on the border of groups of marked patches, one pixel wide."""
    padded = np.pad(inside, 1)
    neighbours = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    border: NDArray[np.bool_] = inside & ~neighbours
    return border


def _encode(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
