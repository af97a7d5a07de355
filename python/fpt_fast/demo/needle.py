"""The demo's data set: one small handwritten digit somewhere in a large textured image.

The class is the digit. Shrunk to the side network's 64 px, a digit covers 3 to 5 px and cannot be
read, and nothing else in the image (texture, brightness, colour, position, size, polarity) depends
on the class: only fine detail decides. The digits are scikit-learn's (the UCI optical recognition
set, 8x8 px, in the order of their writers); each split has its own stretch of them, so that no
digit, and but for the seams no writer, appears in two splits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from fpt_fast.demo.folders import make_folder

__all__ = ["make_needle_dataset"]

_SPLITS = ("train", "val", "test")
_MARKER = "needle.json"
_VERSION = 1
_TEXTURES = 48
Plane = npt.NDArray[np.float32]


def make_needle_dataset(
    root: Path,
    *,
    images: int = 800,
    size: int = 512,
    seed: int = 0,
    classes: Sequence[int] = (0, 3, 4, 7),
    digit_px: tuple[int, int] = (24, 40),
    splits: tuple[float, float, float] = (0.6, 0.15, 0.25),
) -> None:
    """Write ``root/{train,val,test}/{class}/NNNN.jpg``, the same files for the same settings.

    ``root/boxes.csv`` tells where the digits are (path, top, left, height, width in pixels), for
    checks that the selection finds them; ``root/needle.json`` holds the settings.

    The folder appears under its name only when it is complete; a complete one made with the same
    settings is reused, one made with others is replaced. ``images`` is the total over splits and
    classes, ``size`` the side of each RGB image in pixels, ``digit_px`` the smallest and largest
    height of a digit in pixels.

    Raises ValueError for settings that make no sense, FileExistsError where ``root`` holds
    something that this function did not write.
    """
    _check(images, size, classes, digit_px, splits)
    settings: dict[str, Any] = {
        "version": _VERSION,
        "images": images,
        "size": size,
        "seed": seed,
        "classes": list(classes),
        "digit_px": list(digit_px),
        "splits": list(splits),
    }
    make_folder(Path(root), settings, _MARKER, lambda folder: _write_splits(folder, settings))


def _check(
    images: int,
    size: int,
    classes: Sequence[int],
    digit_px: tuple[int, int],
    splits: tuple[float, float, float],
) -> None:
    if len(classes) < 2 or len(set(classes)) < len(classes) or not set(classes) <= set(range(10)):
        raise ValueError(f"classes must be two or more different digits, got {tuple(classes)}")
    if not 8 <= digit_px[0] <= digit_px[1] <= size // 2:
        raise ValueError(f"digit_px must satisfy 8 <= low <= high <= size / 2, got {digit_px}")
    if min(splits) <= 0 or abs(sum(splits) - 1) > 1e-6:
        raise ValueError(f"splits must be three positive shares that sum to 1, got {splits}")
    if images * min(splits) < len(classes):
        raise ValueError(f"{images} images leave a class without an image in some split")


def _write_splits(folder: Path, settings: dict[str, Any]) -> None:
    size, seed, classes = settings["size"], settings["seed"], settings["classes"]
    grounds = _make_textures(_TEXTURES, size * 3 // 2, np.random.default_rng(seed))
    pool = _load_digits(classes, settings["splits"])
    jobs: list[tuple[str, Plane]] = []
    for split, share in zip(_SPLITS, settings["splits"], strict=True):
        for label in classes:
            (folder / split / str(label)).mkdir(parents=True)
        for i in range(round(settings["images"] * share)):
            label = classes[i % len(classes)]
            digits = pool[split, label]
            name = f"{split}/{label}/{len(jobs):04d}.jpg"
            jobs.append((name, digits[i // len(classes) % len(digits)]))

    def write(serial: int) -> str:
        name, digit = jobs[serial]
        # A generator of its own per image: neither class nor thread steers any other choice.
        rng = np.random.default_rng([seed, serial])
        pixels, box = _compose(grounds, digit, size, settings["digit_px"], rng)
        Image.fromarray(pixels).save(folder / name, quality=95, subsampling=0)
        return ",".join([name, *map(str, box)])

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        boxes = list(threads.map(write, range(len(jobs))))
    (folder / "boxes.csv").write_text("\n".join(["path,top,left,height,width", *boxes]) + "\n")


def _load_digits(
    classes: Sequence[int], splits: Sequence[float]
) -> dict[tuple[str, int], list[Plane]]:
    """Digits [8,8] in 0..1 by split and class; splits are stretches of the writers' order."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    planes = (bunch.images / 16).astype(np.float32)
    bounds = [0, *(round(len(planes) * s) for s in np.cumsum(splits))]
    pool: dict[tuple[str, int], list[Plane]] = {}
    for s, split in enumerate(_SPLITS):
        stretch = slice(bounds[s], bounds[s + 1])
        for label in classes:
            pool[split, label] = list(planes[stretch][bunch.target[stretch] == label])
    return pool


def _compose(
    grounds: Plane, digit: Plane, size: int, digit_px: tuple[int, int], rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], tuple[int, ...]]:
    """One image [size,size,3] u8, and the digit's box: top, left, height, width in pixels."""
    texture = grounds[rng.integers(len(grounds))]
    y, x = rng.integers(0, texture.shape[0] - size + 1, 2)
    crop = texture[y : y + size, x : x + size]
    crop = np.rot90(crop, int(rng.integers(4)))[:: int(rng.choice([-1, 1]))]
    plane = crop * np.float32(rng.uniform(6, 22)) + np.float32(rng.uniform(85, 170))
    alpha = _enlarge(digit, int(rng.integers(digit_px[0], digit_px[1] + 1)))
    height, width = alpha.shape
    y, x = rng.integers(0, size - height + 1), rng.integers(0, size - width + 1)
    ink = np.zeros_like(plane)
    ink[y : y + height, x : x + width] = alpha
    strength = rng.uniform(70, 125) * rng.choice([-1, 1])
    ground_tint, ink_tint = (1 + 0.08 * rng.standard_normal((2, 3))).astype(np.float32)
    image = plane[..., None] * ground_tint + ink[..., None] * ink_tint * np.float32(strength)
    image += rng.standard_normal((size, size, 1), np.float32) * np.float32(rng.uniform(0, 5))
    pixels: npt.NDArray[np.uint8] = image.clip(0, 255).astype(np.uint8)
    return pixels, (int(y), int(x), height, width)


def _enlarge(digit: Plane, height: int) -> Plane:
    """Digit [8,8] to a smooth alpha in 0..1 whose digit is ``height`` px high."""
    # A margin of one original pixel lets the strokes end smoothly.
    side = round(height * 10 / 8)
    image = Image.fromarray(np.pad(digit, 1))
    grown = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))
    alpha: Plane = (grown * 1.2).clip(0, 1).astype(np.float32)
    return alpha


def _make_textures(count: int, side: int, rng: np.random.Generator) -> Plane:
    """Textures [count,side,side] f32, mean 0 and deviation 1: photographs and procedural ones."""
    from skimage import data

    photos = [getattr(data, name)().astype(np.float32) for name in ("brick", "grass", "gravel")]
    out = np.empty((count, side, side), np.float32)
    for i in range(count):
        kind = i % 6
        if kind < len(photos):
            texture = _tile(photos[kind], side, rng)
        elif kind == 3:
            texture = _clouds(side, rng)
        else:
            texture = _grain(side, rng, stretched=kind == 5)
        texture = (texture - texture.mean()) / (texture.std() + 1e-6)
        out[i] = (texture + _clutter(side, rng)).clip(-3, 3)
    return out


def _tile(photo: Plane, side: int, rng: np.random.Generator) -> Plane:
    """The photograph at a random scale, mirrored until it fills the square."""
    from scipy.ndimage import zoom

    scaled = zoom(photo, rng.uniform(0.6, 2.0), order=1)
    missing = max(side - scaled.shape[0], 0)
    filled: Plane = np.pad(scaled, (0, missing), mode="symmetric")[:side, :side]
    return filled


def _clouds(side: int, rng: np.random.Generator) -> Plane:
    out = np.zeros((side, side), np.float32)
    for octave in range(1, 9):
        noise = rng.standard_normal((2**octave, 2**octave), np.float32)
        grown = Image.fromarray(noise).resize((side, side), Image.Resampling.BICUBIC)
        out += np.asarray(grown) * np.float32(rng.uniform(0.4, 1.0) * 0.75**octave)
    return out


def _grain(side: int, rng: np.random.Generator, *, stretched: bool) -> Plane:
    from scipy.ndimage import gaussian_filter

    width = rng.uniform(0.8, 3.0)
    length = width * rng.uniform(3, 6) if stretched else width
    noise = rng.standard_normal((side, side), np.float32)
    out: Plane = gaussian_filter(noise, (width, length))
    return out


def _clutter(side: int, rng: np.random.Generator) -> Plane:
    """Straight scratches and round spots, in units of the texture's deviation."""
    image = Image.new("F", (side, side))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.integers(20, 60)):
        x, y = (int(v) for v in rng.integers(0, side, 2))
        shade = float(rng.uniform(-2, 2))
        if rng.random() < 0.5:
            dx, dy = (int(v) for v in rng.integers(-120, 121, 2))
            draw.line((x, y, x + dx, y + dy), fill=shade, width=int(rng.integers(1, 5)))
        else:
            r = int(rng.integers(3, 25))
            draw.ellipse((x, y, x + r, y + r), fill=shade)
    return np.asarray(image, np.float32)
