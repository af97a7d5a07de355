"""Pictures that stand alone: the image beside a map of its patches, with what colours mean."""

import io
import textwrap
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from fpt_fast.records import TokenExample
from fpt_fast.report.maps import attention_by_head, attention_share, kept_by_head, kept_share
from fpt_fast.report.tokens import heat_colours, overlay, pixels_of, top_patches
from fpt_fast.words import counted

What = Literal["kept", "attention"]
WHAT: tuple[What, ...] = ("kept", "attention")

# The longest side of a picture; a smaller image is enlarged, so that its patches can be told.
_LONGEST = 640
# All heads of a layer side by side, and one of them at most and at least.
_ROW, _LARGEST, _SMALLEST = 1680, 300, 112
_MARGIN, _GAP, _BAR = 16, 12, 18
_TEXT, _SMALL, _TITLE = 15, 13, 18
_INK, _SOFT = (31, 41, 55), (107, 114, 128)

_MEANS = {
    "kept": "Kept tokens: the colour of a patch is the share of {layers} layers x {heads} heads "
    "that keep it.",
    "attention": "Where the prompts look: the colour of a patch is its share of their attention, "
    "the mean of {layers} layers, {heads} heads and {prompts} prompts.",
}
_MEANS_BY_HEAD = {
    "kept": "Kept tokens of each layer (row) and head (column): bright patches are kept.",
    "attention": "Where the prompts look with each layer (row) and head (column): the brighter a "
    "patch, the more; each map from its own least to its own most.",
}


def draw_sheet(example: TokenExample, what: What, said: str) -> bytes:
    """The image, and beside it the same with what was kept or looked at, a bar of colours with the
    values at its ends, and in words what it shows: PNG.

    ``said`` is what the model says of it.
    """
    share = _share(example, what)
    plain = np.asarray(_scaled(example, _LONGEST))
    outlined = top_patches(share)
    marked = overlay(plain, share, outlined)
    height, width = plain.shape[:2]
    lines = _MEANS[what].format(
        layers=example.index.shape[0],
        heads=example.index.shape[1],
        prompts=0 if example.weights is None else example.weights.shape[2],
    )
    if outlined.any():
        lines += f" Frames: the {counted(int(outlined.sum()), 'highest patch')}."
    labels = [f"{value:.1%}" for value in (share.max(), share.min())]
    legend = _BAR + 6 + max(_width(label, _SMALL) for label in labels)
    sheet = _Sheet(2 * width + 2 * _GAP + legend, height, example.key, said, lines)
    sheet.image.paste(Image.fromarray(plain), (_MARGIN, sheet.top))
    sheet.image.paste(Image.fromarray(marked), (_MARGIN + width + _GAP, sheet.top))
    left = _MARGIN + 2 * (width + _GAP)
    heat = heat_colours(np.linspace(1, 0, height)[:, None].repeat(_BAR, axis=1))
    # As the colours look over an image of middle brightness.
    bar = (0.5 * heat + 0.5 * float(plain.mean())).astype(np.uint8)
    sheet.image.paste(Image.fromarray(bar), (left, sheet.top))
    for label, y in zip(labels, (sheet.top, sheet.top + height - _SMALL - 4), strict=True):
        sheet.write(label, (left + _BAR + 6, y), _SMALL, _SOFT)
    return sheet.png()


def draw_heads(example: TokenExample, what: What, said: str = "") -> bytes:
    """One map for each layer (row) and head (column), with their numbers, the image before: PNG."""
    if what not in _MEANS:
        raise ValueError(f"what must be 'kept' or 'attention', got {what!r}")
    maps = (kept_by_head(example).float() if what == "kept" else attention_by_head(example)).numpy()
    layers, heads = maps.shape[:2]
    edge = min(_LARGEST, max(_SMALLEST, _ROW // (heads + 1)))
    plain = np.asarray(_scaled(example, edge))
    height, width = plain.shape[:2]
    names = [f"layer {layer}" for layer in example.layers]
    left, above = max(_width(name, _SMALL) for name in names) + 8, _SMALL + 8
    body = (left + (heads + 1) * (width + _GAP), above + layers * (height + _GAP) - _GAP)
    sheet = _Sheet(*body, example.key, said, _MEANS_BY_HEAD[what])
    nothing = np.zeros(maps.shape[2:], dtype=bool)
    for layer in range(layers):
        y = sheet.top + above + layer * (height + _GAP)
        sheet.write(names[layer], (_MARGIN, y + height // 2 - _SMALL // 2), _SMALL, _SOFT)
        for place in range(heads + 1):
            x = _MARGIN + left + place * (width + _GAP)
            drawn = plain if place == 0 else overlay(plain, maps[layer, place - 1], nothing)
            if layer == 0:
                name = "image" if place == 0 else f"head {place - 1}"
                sheet.write(name, (x, sheet.top), _SMALL, _SOFT)
            if layer == 0 or place > 0:
                sheet.image.paste(Image.fromarray(drawn), (x, y))
    return sheet.png()


class _Sheet:
    """White paper with a title, a line below it, room for ``width`` x ``height`` from ``top`` on,
    and words below that."""

    def __init__(self, width: int, height: int, title: str, said: str, words: str) -> None:
        room = max(width, 420)
        columns = max(20, int(room / (0.56 * _TEXT)))
        below = textwrap.wrap(words, columns)
        head = [(line, _TITLE, _INK) for line in textwrap.wrap(title, int(columns * 0.8))[-2:]]
        head += [(line, _TEXT, _INK) for line in textwrap.wrap(said, columns)[:6]]
        self.top = _MARGIN + sum(size + 8 for _, size, _ in head) + 4
        bottom = self.top + height + 10
        size = (room + 2 * _MARGIN, bottom + len(below) * (_TEXT + 6) + _MARGIN)
        self.image = Image.new("RGB", size, (255, 255, 255))
        self._draw = ImageDraw.Draw(self.image)
        y = _MARGIN
        for line, points, colour in head:
            self.write(line, (_MARGIN, y), points, colour)
            y += points + 8
        for number, line in enumerate(below):
            self.write(line, (_MARGIN, bottom + number * (_TEXT + 6)), _TEXT, _SOFT)

    def write(
        self, text: str, at: tuple[int, int], points: int, colour: tuple[int, int, int]
    ) -> None:
        self._draw.text(at, text, fill=colour, font=_font(points))

    def png(self) -> bytes:
        # Not of 256 colours: the image has more greys than they would leave it.
        buffer = io.BytesIO()
        self.image.save(buffer, "PNG", compress_level=4)
        return buffer.getvalue()


def _share(example: TokenExample, what: What) -> NDArray[np.float32]:
    if what not in _MEANS:
        raise ValueError(f"what must be 'kept' or 'attention', got {what!r}")
    shares = kept_share(example) if what == "kept" else attention_share(example)
    found: NDArray[np.float32] = shares.numpy()
    return found


def _scaled(example: TokenExample, longest: int) -> Image.Image:
    """The image with its longest side so long."""
    image = pixels_of(example)
    scale = longest / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS)


@lru_cache(maxsize=8)
def _font(points: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which matplotlib brings along."""
    import matplotlib

    path = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
    return ImageFont.truetype(str(path), points)


def _width(text: str, points: int) -> int:
    return int(_font(points).getlength(text)) + 1
