"""Network input against the published pipeline: Pillow's resize, then scale and normalise."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from fpt_fast.images import read_image, to_network_input
from fpt_fast.records import Preprocessing

MEAN, STD = (0.42, 0.26, 0.13), (0.29, 0.2, 0.14)


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    """Noise over a gradient: resizing has something to smooth and an edge to get wrong."""
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 150, width)[None, :, None]
    return (slope + rng.integers(0, 106, (height, width, channels))).astype(np.uint8)


def published(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The pipeline of the published code, by way of 8-bit Pillow."""
    steps = [
        v2.Resize(size),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(MEAN, STD),
    ]
    return v2.Compose(steps)(image.convert("RGB"))


@pytest.mark.parametrize("size", [(32, 32), (48, 20), (97, 131), (128, 128), (300, 200)])
@pytest.mark.parametrize("channels", [1, 3])
def test_agrees_with_pillow(tmp_path: Path, size: tuple[int, int], channels: int) -> None:
    """Within 1.01 of 255 levels: both round to 8 bits after resizing, with their own weights."""
    source = noise(97, 131, channels)
    image = Image.fromarray(source if channels == 3 else source[..., 0])
    image.save(tmp_path / "x.png")
    out = to_network_input(read_image(tmp_path / "x.png"), Preprocessing(size, MEAN, STD))
    levels = (out - published(image, size)) * torch.tensor(STD).view(3, 1, 1) * 255
    assert out.shape == (3, *size) and out.dtype == torch.float32 and out.is_contiguous()
    assert levels.abs().max() <= 1.01
    assert levels.abs().mean() <= 0.1


def test_scale_is_exact_without_resizing() -> None:
    image = torch.from_numpy(noise(9, 7)).permute(2, 0, 1)
    out = to_network_input(image, Preprocessing((9, 7), MEAN, STD))
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    torch.testing.assert_close(out.double(), (image / 255.0 - mean) / std, rtol=0, atol=2e-6)


def test_16_bits_are_scaled_by_65535_and_keep_their_low_bits() -> None:
    levels = torch.tensor([0, 1, 255, 256, 32768, 65535]).view(1, 1, 6).expand(3, -1, -1)
    unit = Preprocessing((1, 6), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    out = to_network_input(levels.to(torch.uint16), unit)
    torch.testing.assert_close(out, levels / 65535, rtol=0, atol=1e-7)


@pytest.mark.parametrize("size", [(8, 8), (40, 50)])
def test_16_and_8_bits_agree(size: tuple[int, int]) -> None:
    shallow = torch.from_numpy(noise(30, 33)).permute(2, 0, 1)
    deep = (shallow.to(torch.int32) * 257).to(torch.uint16)
    preprocessing = Preprocessing(size, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    out = to_network_input(shallow, preprocessing)
    torch.testing.assert_close(to_network_input(deep, preprocessing), out, rtol=0, atol=1.01 / 255)


def test_shared_grey_equals_three_equal_channels() -> None:
    plane = torch.from_numpy(noise(30, 33, 1)).permute(2, 0, 1)
    preprocessing = Preprocessing((16, 24), MEAN, STD)
    shared = to_network_input(plane.expand(3, -1, -1), preprocessing)
    torch.testing.assert_close(
        to_network_input(plane.repeat(3, 1, 1), preprocessing),
        shared,
        rtol=0,
        atol=1.01 / 255 / 0.14,
    )


@pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (5, 3)])
def test_small_and_long_images_are_scaled_up_or_squashed(shape: tuple[int, int]) -> None:
    image = torch.from_numpy(noise(*shape)).permute(2, 0, 1)
    unit = Preprocessing((16, 16), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    expected = F.interpolate(image[None].double(), size=(16, 16), mode="bilinear", antialias=True)[
        0
    ]
    out = to_network_input(image, unit)
    torch.testing.assert_close(out.double() * 255, expected, rtol=0, atol=1.01)


@pytest.mark.parametrize(
    "image",
    [
        torch.zeros(3, 4, 4),
        torch.zeros(1, 4, 4, dtype=torch.uint8),
        torch.zeros(4, 4, dtype=torch.uint8),
        torch.zeros(3, 0, 4, dtype=torch.uint8),
    ],
)
def test_other_tensors_are_refused(image: Tensor) -> None:
    with pytest.raises(ValueError, match="image must"):
        to_network_input(image, Preprocessing((8, 8), MEAN, STD))


def test_a_std_of_zero_is_refused() -> None:
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="standard deviations above 0"):
        to_network_input(image, Preprocessing((8, 8), MEAN, (0.1, 0.0, 0.1)))
