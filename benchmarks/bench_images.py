"""Decoding, network input and side augmentation of a 1600 x 1200 image, one thread."""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from benchmarks.beside import alternate, clock
from benchmarks.counts import Count
from fpt_fast.config import AugmentConfig
from fpt_fast.images import SideAugmentation, read_image, to_network_input
from fpt_fast.records import Preprocessing

HEIGHT, WIDTH = 1200, 1600
ROUNDS = 9
MEAN, STD = (0.42, 0.26, 0.13), (0.29, 0.2, 0.14)
FROZEN = Preprocessing((512, 512), MEAN, STD)
SIDE = Preprocessing((128, 128), MEAN, STD)

FORMATS: dict[str, dict[str, Any]] = {
    "jpg": {"quality": 90},
    "png": {},
    "tif": {},
    "bmp": {},
    "webp": {"quality": 90},
}


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def picture() -> Image.Image:
    """Smooth, with every level of each channel, so that colour jitter clamps."""
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def as_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def measure(
    benchmark: Any, ours: Callable[[], Tensor], plain: Callable[[], Any], moved: int
) -> Tensor:
    """Both in alternation; returns our last result."""
    return alternate(
        benchmark, ours, plain, dtype="uint8", count=Count(flops=0, bytes=moved), rounds=ROUNDS
    )


@pytest.mark.parametrize("extension", FORMATS)
def bench_read_image(benchmark: Any, tmp_path: Path, extension: str) -> None:
    """Beside Pillow, as the published code decodes."""
    path = tmp_path / f"x.{extension}"
    picture().save(path, **FORMATS[extension])

    def plain() -> NDArray[np.uint8]:
        with Image.open(path) as image:
            return np.array(image.convert("RGB"))

    moved = path.stat().st_size + 3 * HEIGHT * WIDTH
    benchmark.group = "decode 1600 x 1200"
    image = measure(benchmark, lambda: read_image(path), plain, moved)
    assert image.shape == (3, HEIGHT, WIDTH)
    difference = plain().astype(int) - image.permute(1, 2, 0).numpy()
    assert abs(difference).max() <= 2
    if benchmark.enabled:  # nobody decodes in less than it takes to find format and orientation
        benchmark.extra_info["header_seconds"] = median(
            clock(lambda: open_header(path)) for _ in range(ROUNDS)
        )


def open_header(path: Path) -> None:
    with Image.open(path) as image:
        image.getexif()


def bench_read_image_png_16_bit_grey(benchmark: Any, tmp_path: Path) -> None:
    levels = np.array(picture().convert("L")).astype(np.uint16) * 257
    path = tmp_path / "x.png"
    Image.fromarray(levels).save(path)

    def plain() -> NDArray[np.uint16]:
        with Image.open(path) as image:
            return np.array(image)

    benchmark.group = "decode 1600 x 1200"
    moved = path.stat().st_size + levels.nbytes
    image = measure(benchmark, lambda: read_image(path), plain, moved)
    assert image.dtype == torch.uint16 and np.array_equal(image[0].numpy(), levels)


@pytest.mark.parametrize("kind", ["rgb", "grey", "grey 16 bit"])
def bench_to_network_input(benchmark: Any, kind: str) -> None:
    """Beside torchvision on three channels, as a script that knows nothing of grey images."""
    image = as_tensor(picture())
    if kind != "rgb":
        image = image[:1].contiguous().expand(3, -1, -1)
    if kind == "grey 16 bit":
        image = (image[:1].to(torch.int32) * 257).to(torch.uint16).expand(3, -1, -1)
    resize = v2.Resize(FROZEN.size, antialias=True)
    normalise = v2.Normalize(MEAN, STD)

    def plain() -> Tensor:
        out: Tensor = normalise(resize(image.float() / (65535 if image.itemsize == 2 else 255)))
        return out

    moved = image.untyped_storage().nbytes() + 4 * 3 * 512 * 512
    benchmark.group = "network input, 512 px"
    out = measure(benchmark, lambda: to_network_input(image, FROZEN), plain, moved)
    assert out.shape == (3, 512, 512)
    torch.testing.assert_close(out, plain(), rtol=0, atol=0.05)


def bench_side_augmentation(benchmark: Any) -> None:
    """Beside the published recipe as torchvision's transforms do it, on the full image."""
    image = as_tensor(picture())
    ours, generator = SideAugmentation(AugmentConfig(), SIDE), torch.Generator().manual_seed(0)
    theirs = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.RandomResizedCrop(SIDE.size, scale=(0.8, 1.0), ratio=(0.7, 1.3)),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    moved = image.numel() + 4 * 3 * 128 * 128
    benchmark.group = "side augmentation, 128 px"
    out = measure(benchmark, lambda: ours(image, generator), lambda: theirs(image), moved)
    assert out.shape == (3, 128, 128) and out.isfinite().all()
