"""Endless synthetic pretraining images for the demo's backbone: font glyphs in clutter.

Glyphs are letters and symbols only; the digits, which the demo must tell apart, are never
rendered. Everything is made on the fly from a few thousand glyph masks and a few hundred
grey textures, so that one worker process outruns the training on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from demo_textures import make_textures
from demo_vit import GRID, PATCH
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import IterableDataset

CANVAS = 96
SIDES = (64, 128, 256, 512)
SIGNS = np.array([-1, 1])
GLYPHS = (
    "ABCDEFGHJKLMNPQRSTUVWXYZ"
    "abdefghmnqrtyk"
    "ΓΔΘΛΞΠΣΦΨΩ"
    "αβγδεζηλμξπσφω"
    "ЖИЯЮЭЩДЧ"
    "&@#$%?!+*=<>{}[]/~^§¶"
    "∂∇∞∫√∈→↑∑⊕∪∀"  # noqa: RUF001
)
NUM_GLYPHS = len(GLYPHS)
# Fonts with an encoding of their own (cmmi, cmsy, cmex, STIXNonUni, STIXSiz) map code points to
# other shapes; the last-resort font maps every code point to a box.
FONT_PREFIXES = ("DejaVuS", "STIXGeneral", "cmb10", "cmr10", "cmss10", "cmtt10", "cmti10")


@dataclass(frozen=True)
class GlyphBatch:
    """images [B,3,h,w] u8 · patch_labels [B,T] i64 (0 is background, glyph g is g + 1)
    · glyph_targets [B,G] f32, rows sum to 1 · offset: (row, column) inside the 32x32 grid."""

    images: torch.Tensor
    patch_labels: torch.Tensor
    glyph_targets: torch.Tensor
    offset: tuple[int, int]


def render_glyph_masks() -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Masks [M,96,96] u8, glyph's longer side 64 px, and per glyph the indices of its masks."""
    fonts = sorted((Path(matplotlib.get_data_path()) / "fonts/ttf").glob("*.ttf"))
    fonts = [f for f in fonts if f.name.startswith(FONT_PREFIXES)]
    masks: list[np.ndarray] = []
    members: list[list[int]] = [[] for _ in GLYPHS]
    for path in fonts:
        covered = FT2Font(str(path)).get_charmap()
        font = ImageFont.truetype(str(path), 72)
        for g, char in enumerate(GLYPHS):
            if ord(char) not in covered:
                continue
            # cm fonts hold ASCII letters, but other shapes at some symbol positions.
            if path.name.startswith("cm") and not (char.isascii() and char.isalpha()):
                continue
            for stroke in (0, 2, 5):
                mask = _render(char, font, stroke)
                if mask is not None:
                    members[g].append(len(masks))
                    masks.append(mask)
    return torch.from_numpy(np.stack(masks)), [torch.tensor(m) for m in members]


def _render(char: str, font: ImageFont.FreeTypeFont, stroke: int) -> np.ndarray | None:
    image = Image.new("L", (200, 200))
    ImageDraw.Draw(image).text((60, 40), char, fill=255, font=font, stroke_width=stroke)
    box = image.getbbox()
    if box is None:
        return None
    image = image.crop(box)
    scale = 64 / max(image.size)
    size = (max(round(image.width * scale), 3), max(round(image.height * scale), 3))
    canvas = Image.new("L", (CANVAS, CANVAS))
    corner = ((CANVAS - size[0]) // 2, (CANVAS - size[1]) // 2)
    canvas.paste(image.resize(size, Image.Resampling.BILINEAR), corner)
    return np.asarray(canvas)


class GlyphStream(IterableDataset[GlyphBatch]):
    """Endless batches whose size and number of glyphs follow ``progress`` (shared, 0 to 1)."""

    def __init__(
        self, progress: torch.Tensor, seed: int, tokens: int = 8192, textures: int = 320
    ) -> None:
        self.progress = progress  # [1] f32 in shared memory, written by the trainer
        self.seed = seed
        self.tokens = tokens
        self.masks, self.members = render_glyph_masks()
        self.textures = make_textures(textures, np.random.default_rng(seed))

    def __iter__(self) -> Iterator[GlyphBatch]:
        info = torch.utils.data.get_worker_info()
        seed = self.seed + 1000 * (0 if info is None else info.id)
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        while True:
            progress = float(self.progress)
            side = int(rng.choice(SIDES, p=size_shares(progress)))
            batch = max(self.tokens // (side // PATCH) ** 2, 1)
            yield self.make_batch(batch, side, progress, rng)

    def make_batch(
        self, batch: int, side: int, progress: float, rng: np.random.Generator
    ) -> GlyphBatch:
        """One batch of ``side``-px images; with ``progress`` glyphs get rarer, smaller, fainter."""
        most = {64: 1, 128: 3, 256: 5, 512: 8}[side]
        single = rng.random(batch) < 0.3 + 0.6 * progress
        counts = np.where(single, 1, rng.integers(1, most + 1, batch))
        hard = min(progress / 0.25, 1.0)
        glyph = rng.integers(0, NUM_GLYPHS, int(counts.sum()))
        alphas = self.draw_glyphs(glyph, hard, rng)
        grids = side // PATCH
        delta = np.zeros((batch, side, side), np.float32)
        labels = np.zeros((batch, grids, grids), np.int64)
        targets = np.zeros((batch, NUM_GLYPHS), np.float32)
        ground = np.empty((batch, side, side), np.float32)
        at = 0
        for b in range(batch):
            ground[b] = self._ground(side, hard, rng)
            boxes: list[tuple[int, int, int]] = []
            for _ in range(counts[b]):
                strength = rng.uniform(90 - 40 * hard, 140) * rng.choice(SIGNS)
                if _place(delta[b], labels[b], boxes, alphas[at] * strength, int(glyph[at]), rng):
                    targets[b, glyph[at]] = 1.0
                at += 1
        images = _colour(ground, delta, rng)
        row, column = (int(v) for v in rng.integers(0, GRID - grids + 1, 2))
        return GlyphBatch(
            images,
            torch.from_numpy(labels).flatten(1),
            torch.from_numpy(targets / targets.sum(1, keepdims=True)),
            (row, column),
        )

    def _ground(self, side: int, hard: float, rng: np.random.Generator) -> np.ndarray:
        texture = self.textures[rng.integers(len(self.textures))]
        y, x = rng.integers(0, texture.shape[0] - side + 1, 2)
        crop = texture[y : y + side, x : x + side]
        if rng.random() < 0.5:
            crop = crop.T
        crop = crop[:: rng.choice(SIGNS), :: rng.choice(SIGNS)]
        contrast = rng.uniform(0.1, 0.3 + 0.5 * hard)
        return (crop.astype(np.float32) - 128) * contrast + rng.uniform(70, 185)

    def draw_glyphs(
        self, glyph: np.ndarray, hard: float, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """Warped, blurred, resized alphas [s,s] f32 in 0..1, one per entry of ``glyph``."""
        pick = [int(m[rng.integers(len(m))]) for m in (self.members[g] for g in glyph)]
        masks = self.masks[pick].unsqueeze(1).float() / 255
        warped = F.grid_sample(masks, _warp_grid(len(pick)), align_corners=False)
        out: list[np.ndarray] = []
        # A chunk shares its sizes, so that the resizing is not one call per glyph.
        for some in warped.split(12):
            # Two glyphs in three go through 8 to 14 px, as the real digits did.
            if rng.random() < 0.67:
                small = F.adaptive_avg_pool2d(some, int(rng.integers(8, 15)))
                small = (small * (1 + 0.15 * torch.randn_like(small))).mul(16).round().div(16)
                small = small * torch.empty(len(some), 1, 1, 1).uniform_(1.0, 1.5)
            else:
                small = F.adaptive_avg_pool2d(some, int(rng.integers(18, 65)))
            size = int(rng.triangular(24 - 8 * hard, 40 - 8 * hard, 60))
            mode = "bicubic" if rng.random() < 0.7 else "bilinear"
            grown = F.interpolate(small.clamp(0, 1), size=(size, size), mode=mode)
            out.extend(grown[:, 0].clamp(0, 1).numpy())
        return out


def size_shares(progress: float) -> tuple[float, float, float, float]:
    """Shares of ``SIDES``: glyphs are learnt on small crops, finding the needle on large images."""
    if progress < 0.2:
        return 1.0, 0.0, 0.0, 0.0
    if progress < 0.35:
        return 0.5, 0.42, 0.06, 0.02
    if progress < 0.6:
        return 0.3, 0.5, 0.15, 0.05
    if progress < 0.8:
        return 0.1, 0.35, 0.4, 0.15
    return 0.0, 0.25, 0.5, 0.25


def _warp_grid(count: int) -> torch.Tensor:
    """Random rotation, shear, scale and a smooth elastic field: [count,64,64,2]."""
    angle = torch.randn(count) * 0.2
    scale_x, scale_y = (torch.empty(count).uniform_(0.72, 0.98) for _ in range(2))
    shear = torch.randn(count) * 0.15
    cos, sin = angle.cos(), angle.sin()
    zero = torch.randn(count) * 0.03
    theta = torch.stack(
        [
            torch.stack([scale_x * cos, scale_x * (-sin + shear), zero], -1),
            torch.stack([scale_y * sin, scale_y * cos, zero.flip(0)], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [count, 1, 64, 64], align_corners=False)
    field = F.interpolate(torch.randn(count, 2, 4, 4) * 0.06, size=(64, 64), mode="bicubic")
    return grid + field.permute(0, 2, 3, 1)


def _place(
    delta: np.ndarray,
    labels: np.ndarray,
    boxes: list[tuple[int, int, int]],
    ink: np.ndarray,
    glyph: int,
    rng: np.random.Generator,
) -> bool:
    """Add a glyph, ink [s,s], to ``delta`` [h,w], ``labels`` [h/16,w/16]; no two overlap."""
    side, size = delta.shape[0], ink.shape[0]
    for _ in range(4):
        y, x = (int(v) for v in rng.integers(0, side - size + 1, 2))
        if all(abs(y - v) >= max(size, s) or abs(x - u) >= max(size, s) for v, u, s in boxes):
            break
    else:
        return False
    boxes.append((y, x, size))
    delta[y : y + size, x : x + size] += ink
    top, left = y // PATCH, x // PATCH
    rows, columns = -(-(y + size) // PATCH) - top, -(-(x + size) // PATCH) - left
    block = np.zeros((rows * PATCH, columns * PATCH), np.float32)
    block[y - top * PATCH :, x - left * PATCH :][:size, :size] = np.abs(ink)
    cover = block.reshape(rows, PATCH, columns, PATCH).mean((1, 3))
    view = labels[top : top + rows, left : left + columns]
    view[cover > 6] = glyph + 1
    return True


def _colour(ground: np.ndarray, delta: np.ndarray, rng: np.random.Generator) -> torch.Tensor:
    """Tint ground and glyphs separately, add noise: [B,3,h,w] u8."""
    batch = len(ground)
    tint = torch.from_numpy(1 + 0.12 * rng.standard_normal((2, batch, 3, 1, 1))).float()
    # A third of the images stays grey.
    tint[:, rng.random(batch) < 0.33] = 1.0
    images = torch.from_numpy(ground)[:, None] * tint[0]
    images += torch.from_numpy(delta)[:, None] * tint[1]
    noise = torch.from_numpy(rng.uniform(0, 9, (batch, 1, 1, 1))).float()
    images += noise * torch.randn(batch, 1, *ground.shape[1:])
    return images.clamp_(0, 255).to(torch.uint8)
