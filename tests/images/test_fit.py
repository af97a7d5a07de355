"""Padding to the input's shape instead of stretching, through every path that makes inputs."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from images.files import png16
from PIL import Image

from fpt_fast.config import AugmentConfig
from fpt_fast.images import (
    DecodedStore,
    SideAugmentation,
    SideBatches,
    fit_image,
    measure_statistics,
    read_image,
    shrink_images,
    to_network_input,
)
from fpt_fast.images.transforms import padded_size, size_within
from fpt_fast.loader import FeatureLoader, NoFeatures
from fpt_fast.records import ImageItem, Preprocessing

PAD = Preprocessing((48, 32), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "pad")


def write(folder: Path, *sizes: tuple[int, int], deep: bool = False) -> list[ImageItem]:
    rng = np.random.default_rng(0)
    items = []
    for number, (height, width) in enumerate(sizes):
        path = folder / f"{number}.png"
        coarse = rng.integers(60, 200, (4, 4, 3)).astype(np.uint8)
        image = np.asarray(
            Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
        )
        if deep:
            path.write_bytes(png16(image.astype(np.uint16) * 257))
        else:
            Image.fromarray(image).save(path)
        items.append(ImageItem(path.name, path, number % 2, "train"))
    return items


@pytest.mark.parametrize(
    ("image", "size"),
    [((400, 100), (64, 64)), ((100, 400), (64, 64)), ((301, 77), (48, 32)), ((1, 9), (48, 32))],
)
def test_padding_is_black_centred_and_no_larger_than_needed(
    image: tuple[int, int], size: tuple[int, int]
) -> None:
    height, width = image
    rows, columns = padded_size(image, size)
    assert rows >= height and columns >= width and (rows == height or columns == width)
    assert abs(rows / size[0] - columns / size[1]) <= 1 / min(size)
    pixels = torch.full((1, height, width), 200, dtype=torch.uint8).expand(3, -1, -1)
    padded = fit_image(pixels, dataclasses.replace(PAD, size=size))
    assert padded.shape == (3, rows, columns) and padded.stride(0) == 0
    assert int((padded[0] == 200).sum()) == height * width
    top, left = (rows - height) // 2, (columns - width) // 2
    assert torch.equal(padded[:, top : top + height, left : left + width], pixels)


@pytest.mark.parametrize("deep", [False, True])
def test_a_circle_stays_a_circle(tmp_path: Path, deep: bool) -> None:
    y, x = np.mgrid[:300, :100]
    disc = ((y - 150) ** 2 + (x - 50) ** 2 < 40**2).astype(np.uint8) * 255
    image = torch.from_numpy(disc.astype(np.uint16) * 257 if deep else disc)[None].expand(3, -1, -1)
    for fit, ratio in (("pad", 1.0), ("stretch", 1 / 3)):
        out = to_network_input(image, Preprocessing((60, 60), (0.0,) * 3, (1.0,) * 3, fit))
        inside = out[0] > 0.5
        tall, wide = inside.any(dim=1).sum(), inside.any(dim=0).sum()
        assert abs(float(tall / wide) - ratio) < 0.1


def test_an_image_of_the_shape_is_not_touched() -> None:
    image = torch.zeros((3, 96, 64), dtype=torch.uint8)
    assert fit_image(image, PAD).shape == image.shape
    stretched = dataclasses.replace(PAD, fit="stretch")
    assert torch.equal(to_network_input(image, PAD), to_network_input(image, stretched))


def test_statistics_are_of_the_image_without_its_padding(tmp_path: Path) -> None:
    for number, level in enumerate((100, 200)):
        Image.fromarray(np.full((300, 50, 3), level, np.uint8)).save(tmp_path / f"{number}.png")
    items = [ImageItem(f"{i}.png", tmp_path / f"{i}.png", 0, "train") for i in (0, 1)]
    mean, std = measure_statistics(items, size=(64, 64), fit="pad")
    assert mean == pytest.approx((150 / 255,) * 3) and std == pytest.approx((50 / 255,) * 3)
    assert size_within((300, 50), (64, 64)) == (64, 11)


@pytest.mark.parametrize("augmented", [False, True])
@pytest.mark.parametrize("deep", [False, True])
def test_stored_side_images_are_padded_like_exact_ones(
    tmp_path: Path, augmented: bool, deep: bool
) -> None:
    items = write(tmp_path, (200, 60), (60, 200), (96, 64), (333, 100), deep=deep)
    config = AugmentConfig(brightness=0.0, contrast=0.0) if augmented else None
    stored = SideBatches(shrink_images(items, PAD, augmented=augmented), PAD, config)
    rows = torch.arange(len(items))
    made = stored(rows, seed=3)
    assert made.shape == (4, 3, 48, 32)
    for i, item in enumerate(items):
        image = read_image(item.path)
        if config is None:
            expected = to_network_input(image, PAD)
            assert torch.equal(made[i], expected)
        else:
            exact = SideAugmentation(config, PAD)
            expected = exact.apply(fit_image(image, PAD), stored.draw(rows, 3).of(i))
            # Two filters instead of one: most of the difference is at the padding's edge.
            assert float((made[i] - expected).abs().mean()) < 0.02


def test_a_loader_pads_the_side_input_alike_however_it_is_made(tmp_path: Path) -> None:
    items = write(tmp_path, (200, 60), (60, 200))

    def batch(stored: bool) -> torch.Tensor:
        sides = shrink_images(items, PAD, augmented=True) if stored else None
        config = AugmentConfig(brightness=0.0, contrast=0.0)
        loader = FeatureLoader(
            items, NoFeatures(), PAD, batch_size=2, store=DecodedStore(), side_images=sides,
            augmentation=config, seed=4,
        )  # fmt: skip
        return next(iter(loader)).side_pixels

    assert float((batch(True) - batch(False)).abs().mean()) < 0.02


def test_a_kept_file_of_stretched_images_is_not_taken_for_padded_ones(tmp_path: Path) -> None:
    (tmp_path / "sides").mkdir()
    items = write(tmp_path, (200, 60))
    kept = {"augmented": False, "directory": tmp_path / "sides"}
    stretched = shrink_images(items, dataclasses.replace(PAD, fit="stretch"), **kept)
    padded = shrink_images(items, PAD, **kept)
    assert not torch.equal(stretched.levels, padded.levels)
    assert torch.equal(shrink_images(items, PAD, **kept).levels, padded.levels)
    assert len(list((tmp_path / "sides").iterdir())) == 2
