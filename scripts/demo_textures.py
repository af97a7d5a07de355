"""Grey textures and clutter for the glyphs of the demo's pretraining."""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import gaussian_filter, zoom
from skimage import data


def make_textures(count: int, rng: np.random.Generator, size: int = 640) -> np.ndarray:
    """Grey textures [count,size,size] u8, zero-mean around 128 with a standard deviation of 32."""
    photos = [data.brick(), data.grass(), data.gravel()]
    out = np.empty((count, size, size), np.uint8)
    for i in range(count):
        kind = i % 8
        if kind < 3:
            photo = photos[kind].astype(np.float32)
            photo = zoom(photo, rng.uniform(0.4, 2.0), order=1)
            reps = -(-size // min(photo.shape)) + 1
            # Mirrored tiling leaves no seam that a detector could learn.
            photo = np.pad(photo, (0, reps * min(photo.shape)), mode="symmetric")[:size, :size]
            texture = photo
        else:
            texture = _procedural(kind, size, rng)
        texture = (texture - texture.mean()) / (texture.std() + 1e-6)
        if rng.random() < 0.5:
            texture = texture + _clutter(size, rng)
        out[i] = np.clip(128 + 32 * texture, 0, 255).astype(np.uint8)
    return out


def _procedural(kind: int, size: int, rng: np.random.Generator) -> np.ndarray:
    if kind in (3, 4):  # cloud: octaves of smoothed noise
        texture = np.zeros((size, size), np.float32)
        for octave in range(1, 8):
            cells = 2**octave
            noise = rng.standard_normal((cells + 1, cells + 1)).astype(np.float32)
            step = size / cells
            grown = zoom(noise, step, order=1)[:size, :size]
            texture += (
                np.pad(grown, ((0, size - grown.shape[0]), (0, size - grown.shape[1])), mode="edge")
                * rng.uniform(0.3, 1.0)
                * step**0.5
            )
        return texture
    if kind == 5:  # anisotropic fibres
        noise = rng.standard_normal((size, size)).astype(np.float32)
        return gaussian_filter(noise, (rng.uniform(0.5, 2.5), rng.uniform(3, 12)))
    if kind == 6:  # grain
        noise = rng.standard_normal((size, size)).astype(np.float32)
        return gaussian_filter(noise, rng.uniform(0.5, 4.0))
    y, x = np.mgrid[:size, :size].astype(np.float32)
    warp = gaussian_filter(rng.standard_normal((size, size)).astype(np.float32), 20) * 60
    angle, period = rng.uniform(0, np.pi), rng.uniform(8, 50)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle) + warp * 6) * 2 * np.pi / period)
    return wave + 0.4 * rng.standard_normal((size, size)).astype(np.float32)


def _clutter(size: int, rng: np.random.Generator) -> np.ndarray:
    """Straight lines, blobs and rectangles: unlike handwriting, so that only they become dull."""
    image = Image.new("L", (size, size), 128)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(5, 40))):
        x, y = rng.integers(0, size, 2).tolist()
        dx, dy = rng.integers(-120, 120, 2).tolist()
        shade = int(rng.integers(60, 196))
        kind = rng.integers(3)
        if kind == 0:
            draw.line((x, y, x + dx, y + dy), fill=shade, width=int(rng.integers(1, 6)))
        elif kind == 1:
            r = abs(dx) // 4 + 2
            draw.ellipse((x, y, x + r, y + r), fill=shade)
        else:
            draw.rectangle((x, y, x + abs(dx) // 3 + 1, y + abs(dy) // 3 + 1), fill=shade)
    return gaussian_filter((np.asarray(image, np.float32) - 128) / 32, rng.uniform(0.3, 2.0))
