"""Small classification tasks on real images that need no download.

Each function writes a folder ``train/val/test/<class>/NNNN.png`` as ``preload`` and ``train`` take
it.  The images come with scikit-learn (handwritten digits) and scikit-image (photographs of brick,
grass and gravel; patches of the Labeled Faces in the Wild with and without a face).  None is a
medical image, and the first three tasks are easy: they tell that a method learns, and how it ranks
when little is left to win, and nothing about a diagnosis.
"""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fpt_fast.demo.folders import make_folder
from fpt_fast.demo.needle import make_needle_dataset

SPLITS = ("train", "val", "test")
SHARES = (0.6, 0.15, 0.25)
# Height of the needle in pixels, smallest and largest, in an image of 512 px; the demo's is medium.
NEEDLE_PX = {"easy": (44, 64), "medium": (24, 40), "hard": (16, 24)}
TEXTURES = ("brick", "grass", "gravel")
TILE = 64
_FACES = "lfw_subset"

Plane = npt.NDArray[np.uint8]
# Split, class, and grey image of any size.
Sample = tuple[str, str, Plane]


def make_needle(root: Path, *, difficulty: str, images: int, size: int, seed: int = 0) -> None:
    """The demo's task: the class is a digit hidden in a texture; see ``NEEDLE_PX``.

    The digit shrinks and grows with ``size``, the side of the images in pixels.  Raises
    ValueError for another ``difficulty`` or settings that make no sense.
    """
    if difficulty not in NEEDLE_PX:
        raise ValueError(f"difficulty must be one of {', '.join(NEEDLE_PX)}, got {difficulty!r}")
    low, high = (max(8, round(px * size / 512)) for px in NEEDLE_PX[difficulty])
    make_needle_dataset(root, images=images, size=size, seed=seed, digit_px=(low, high))


def make_digits(root: Path, *, images: int, size: int, seed: int = 0) -> None:
    """Ten digits, 8 x 8 px enlarged to ``size``; splits are stretches of the writers' order.

    Raises ValueError for more than the 1797 images that there are.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    planes = (bunch.images * (255 / 16)).round().astype(np.uint8)
    _write(root, "digits", planes, bunch.target.astype(str), images, size, seed)


def make_faces(root: Path, *, images: int, size: int, seed: int = 0) -> None:
    """Face or not: 200 patches of 25 x 25 px enlarged to ``size``, in their own order.

    Raises ValueError for more than those 200.
    """
    from skimage import data

    patches: npt.NDArray[np.float64] = getattr(data, _FACES)()
    planes = (patches * 255).round().astype(np.uint8)
    labels = np.repeat(["face", "other"], [100, 100])
    _write(root, "faces", planes, labels, images, size, seed)


def make_textures(root: Path, *, images: int, size: int, seed: int = 0) -> None:
    """Brick, grass or gravel: tiles of 64 x 64 px enlarged to ``size``.

    Each split has rows of each photograph for its own, so that no pixel appears in two splits;
    ``root/boxes.csv`` has every tile's place (path, top, left in pixels).
    """
    from skimage import data

    photos: dict[str, Plane] = {name: getattr(data, name)() for name in TEXTURES}
    rng = np.random.default_rng(seed)
    samples: list[Sample] = []
    boxes: list[tuple[int, int]] = []
    for split, (first, last) in zip(SPLITS, _bands(len(photos["brick"])), strict=True):
        for i in range(round(images * SHARES[SPLITS.index(split)])):
            name = TEXTURES[i % len(TEXTURES)]
            top = int(rng.integers(first, last - TILE + 1))
            left = int(rng.integers(0, photos[name].shape[1] - TILE + 1))
            samples.append((split, name, photos[name][top : top + TILE, left : left + TILE]))
            boxes.append((top, left))

    def write(folder: Path) -> None:
        _save(folder, samples, size)
        lines = [
            f"{_name(serial, split, label)},{top},{left}"
            for serial, ((split, label, _), (top, left)) in enumerate(
                zip(samples, boxes, strict=True)
            )
        ]
        (folder / "boxes.csv").write_text("\n".join(["path,top,left", *lines]) + "\n")

    _check_enough(images, len(TEXTURES))
    make_folder(root, _settings("textures", images, size, seed), "textures.json", write)


def _needle_of(difficulty: str) -> Callable[..., None]:
    def make(root: Path, *, images: int, size: int, seed: int = 0) -> None:
        make_needle(root, difficulty=difficulty, images=images, size=size, seed=seed)

    return make


TASKS: dict[str, Callable[..., None]] = {
    "digits": make_digits,
    "faces": make_faces,
    "textures": make_textures,
    **{f"needle-{difficulty}": _needle_of(difficulty) for difficulty in NEEDLE_PX},
}


def make_task(name: str, root: Path, *, images: int, size: int, seed: int = 0) -> None:
    """Write task ``name`` of ``TASKS`` into ``root``: ``images`` over all splits and classes, each
    ``size`` pixels wide and high.  Raises ValueError for an unknown name."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    TASKS[name](root, images=images, size=size, seed=seed)


def _write(
    root: Path,
    name: str,
    planes: Plane,
    labels: npt.NDArray[np.str_],
    images: int,
    size: int,
    seed: int,
) -> None:
    """Divide each class in its own order into splits, and draw ``images`` of them by ``seed``."""
    classes = sorted(set(labels.tolist()))
    if images > len(planes):
        raise ValueError(f"{name} has {len(planes)} images, got images={images}")
    _check_enough(images, len(classes))
    rng = np.random.default_rng(seed)
    samples = [
        (split, label, planes[row])
        for label in classes
        for split, row in _divided(np.flatnonzero(labels == label), images / len(planes), rng)
    ]
    make_folder(
        root,
        _settings(name, images, size, seed),
        f"{name}.json",
        lambda folder: _save(folder, samples, size),
    )


def _divided(
    rows: npt.NDArray[np.int64], share: float, rng: np.random.Generator
) -> Iterator[tuple[str, int]]:
    """``share`` of the rows of each stretch of one class, at least one a split."""
    bounds = [round(len(rows) * part) for part in np.cumsum((0.0, *SHARES))]
    for split, first, last in zip(SPLITS, bounds, bounds[1:], strict=False):
        count = max(1, round((last - first) * share))
        for row in sorted(rng.choice(rows[first:last], count, replace=False).tolist()):
            yield split, row


def _bands(height: int) -> list[tuple[int, int]]:
    """First and last row of each split's part of a photograph."""
    bounds = [round(height * part) for part in np.cumsum((0.0, *SHARES))]
    return list(itertools.pairwise(bounds))


def _save(folder: Path, samples: list[Sample], size: int) -> None:
    for serial, (split, label, plane) in enumerate(samples):
        (folder / split / label).mkdir(parents=True, exist_ok=True)
        enlarged = Image.fromarray(plane).resize((size, size), Image.Resampling.BICUBIC)
        enlarged.convert("RGB").save(folder / _name(serial, split, label))


def _name(serial: int, split: str, label: str) -> str:
    return f"{split}/{label}/{serial:04d}.png"


def _check_enough(images: int, classes: int) -> None:
    if images * min(SHARES) < classes:
        raise ValueError(f"{images} images leave a class without an image in some split")


def _settings(name: str, images: int, size: int, seed: int) -> dict[str, Any]:
    return {"version": 1, "task": name, "images": images, "size": size, "seed": seed}
