"""Pictures of what was kept of an image."""

import io
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fpt_fast.records import TokenExample

# Wide enough for fine detail on screen and paper; a page with six images stays below 3 MB.
_LONGEST_SIDE = 512
_OUTLINED_SHARE = 0.05


@dataclass(frozen=True, slots=True)
class TokenPicture:
    """An image as a JPEG, the same with its kept patches as a PNG, and what the colours mean.

    ``lowest`` and ``highest`` are the smallest and largest share of layers and heads that keep a
    patch; ``outlined`` counts the patches with a frame.
    """

    plain: bytes
    marked: bytes
    lowest: float
    highest: float
    outlined: int


def kept_share(example: TokenExample) -> Tensor:
    """Share of layers and heads that keep each patch: [rows, columns] f32 in [0, 1].

    Raises ``ValueError`` where the index does not fit the grid.
    """
    rows, columns = example.grid
    tokens = example.prefix_tokens + rows * columns
    index = example.index.reshape(-1).long()
    if index.numel() == 0 or int(index.min()) < 0 or int(index.max()) >= tokens:
        raise ValueError(
            f"index of {example.key!r} must hold tokens in 0..{tokens - 1} "
            f"({example.prefix_tokens} prefix tokens and {rows}x{columns} patches), "
            f"got {tuple(example.index.shape)} values"
            + (f" in {int(index.min())}..{int(index.max())}" if index.numel() else "")
        )
    counts = torch.bincount(index, minlength=tokens)[example.prefix_tokens :]
    choices = example.index.shape[0] * example.index.shape[1]
    return (counts / choices).float().reshape(rows, columns)


def draw_tokens(example: TokenExample) -> TokenPicture:
    """Draw what was kept: the more layers and heads keep a patch, the warmer and clearer it is."""
    from PIL import Image

    if example.pixels.dim() != 3 or len(example.pixels) != 3 or example.pixels.dtype != torch.uint8:
        raise ValueError(
            f"pixels of {example.key!r} must be [3, h, w] u8, got {tuple(example.pixels.shape)} "
            f"{example.pixels.dtype}"
        )
    image = Image.fromarray(example.pixels.permute(1, 2, 0).contiguous().numpy())
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(image)
    share = kept_share(example).numpy()
    top = _top_patches(share)
    marked = Image.fromarray(_overlay(pixels, share, top))
    return TokenPicture(
        plain=_encode(image, "JPEG", quality=90),
        # 256 colours show a heat map as well as 16 million, in a third of the bytes.
        marked=_encode(marked.quantize(256), "PNG", optimize=True),
        lowest=float(share.min()),
        highest=float(share.max()),
        outlined=int(top.sum()),
    )


def _overlay(
    pixels: NDArray[np.uint8], share: NDArray[np.float32], top: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    from matplotlib import colormaps

    height, width = pixels.shape[:2]
    row_of = np.arange(height) * share.shape[0] // height
    column_of = np.arange(width) * share.shape[1] // width
    spread = float(share.max() - share.min())
    heat = (share - share.min()) / spread if spread > 0 else np.zeros_like(share)
    grey = pixels.mean(axis=2, keepdims=True)
    colour = np.asarray(colormaps["inferno"](heat[row_of][:, column_of]))[..., :3] * 255
    # Half colour, half brightness of the image, so that its detail stays visible everywhere.
    out = 0.5 * colour + 0.5 * grey
    out[_outlines(top[row_of][:, column_of])] = (255, 255, 255)
    drawn: NDArray[np.uint8] = out.clip(0, 255).astype(np.uint8)
    return drawn


def _top_patches(share: NDArray[np.float32]) -> NDArray[np.bool_]:
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


def _encode(image: object, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)  # type: ignore[attr-defined]
    return buffer.getvalue()
