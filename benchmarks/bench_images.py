"""Decoding, network input and side augmentation of a 1600 x 1200 image, one thread."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fpt_fast.config import AugmentConfig
from fpt_fast.images import SideAugmentation, read_image, to_network_input
from fpt_fast.records import Preprocessing

HEIGHT, WIDTH = 1200, 1600
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


@pytest.mark.parametrize("extension", FORMATS)
def bench_read_image(benchmark: Any, tmp_path: Path, extension: str) -> None:
    path = tmp_path / f"x.{extension}"
    picture().save(path, **FORMATS[extension])
    image = benchmark(read_image, path)
    assert image.shape == (3, HEIGHT, WIDTH)
    with Image.open(path) as plain:
        difference = np.array(plain.convert("RGB")).astype(int) - image.permute(1, 2, 0).numpy()
    assert abs(difference).max() <= 2
    benchmark.extra_info["bytes"] = path.stat().st_size + image.numel()


def bench_read_image_png_16_bit_grey(benchmark: Any, tmp_path: Path) -> None:
    levels = np.array(picture().convert("L")).astype(np.uint16) * 257
    path = tmp_path / "x.png"
    Image.fromarray(levels).save(path)
    image = benchmark(read_image, path)
    assert image.dtype == torch.uint16 and np.array_equal(image[0].numpy(), levels)
    benchmark.extra_info["bytes"] = path.stat().st_size + levels.nbytes


@pytest.mark.parametrize("kind", ["rgb", "grey", "grey 16 bit"])
def bench_to_network_input(benchmark: Any, kind: str) -> None:
    image = as_tensor(picture())
    if kind != "rgb":
        image = image[:1].contiguous().expand(3, -1, -1)
    if kind == "grey 16 bit":
        image = (image[:1].to(torch.int32) * 257).to(torch.uint16).expand(3, -1, -1)
    out = benchmark(to_network_input, image, FROZEN)
    assert out.shape == (3, 512, 512) and out.isfinite().all()
    benchmark.extra_info["bytes"] = image.untyped_storage().nbytes() + 4 * out.numel()


@pytest.mark.parametrize("kind", ["ours", "torchvision"])
def bench_side_augmentation(benchmark: Any, kind: str) -> None:
    """``torchvision`` is the published recipe as its transforms do it, on the full image."""
    image = as_tensor(picture())
    if kind == "ours":
        ours, generator = SideAugmentation(AugmentConfig(), SIDE), torch.Generator().manual_seed(0)
        out = benchmark(ours, image, generator)
    else:
        theirs = v2.Compose(
            [
                v2.RandomHorizontalFlip(),
                v2.ColorJitter(brightness=0.2, contrast=0.2),
                v2.RandomResizedCrop(SIDE.size, scale=(0.8, 1.0), ratio=(0.7, 1.3)),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
            ]
        )
        out = benchmark(theirs, image)
    assert out.shape == (3, 128, 128) and out.isfinite().all()
    benchmark.extra_info["bytes"] = image.numel() + 4 * out.numel()


def bench_open_header_only(benchmark: Any) -> None:
    """Floor of every decode: what finding format, size and orientation costs."""
    buffer = io.BytesIO()
    picture().save(buffer, "JPEG")
    data = buffer.getvalue()

    def open_header() -> tuple[int, int]:
        with Image.open(io.BytesIO(data)) as image:
            image.getexif()
            return image.size

    assert benchmark(open_header) == (WIDTH, HEIGHT)
    benchmark.extra_info["bytes"] = len(data)
