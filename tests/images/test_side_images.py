"""Side images shrunk once: the inputs that the exact path makes, within stated bounds.

The oracle is torchvision on the original image, in f64; pictures are scikit-learn's photographs.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from images.published_augmentation import in_published_order, make_image
from PIL import Image
from sklearn.datasets import load_sample_images
from torch import Tensor
from torchvision.transforms import v2

from fpt_fast.config import AugmentConfig, ConfigError
from fpt_fast.images import (
    SideAugmentation,
    SideBatches,
    SideImages,
    read_image,
    shrink_images,
    side_images,
    to_network_input,
)
from fpt_fast.images.draws import AugmentationDraws
from fpt_fast.ops import native_images
from fpt_fast.ops.native_reasons import native_levels, native_missing
from fpt_fast.records import ImageItem, Preprocessing

UNIT = Preprocessing((64, 80), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
PUBLISHED = AugmentConfig(vertical_flip=0.5)
LEVEL = 1 / 255
NATIVE_LEVELS = [] if native_missing() else native_levels().split(", ")


@cache
def photographs() -> tuple[Tensor, ...]:
    """A temple and a flower, [3, 427, 640] u8, and a tall part of each."""
    images = [torch.tensor(image).permute(2, 0, 1) for image in load_sample_images().images]
    return (*images, *(image[:, :, 100:400] for image in images))


def write(folder: Path, images: Sequence[Tensor]) -> list[ImageItem]:
    items = []
    for i, image in enumerate(images):
        path = folder / f"{i}.png"
        pixels = image[0].numpy() if image.dtype == torch.uint16 else image.permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(path)
        items.append(ImageItem(path.name, path, 0, "train"))
    return items


def compare(
    folder: Path, images: Sequence[Tensor], *, preprocessing: Preprocessing = UNIT
) -> list[tuple[Tensor, Tensor]]:
    """(ours from shrunk images, torchvision's from the originals) with the same choices."""
    items = write(folder, images)
    shrunk = shrink_images(items, preprocessing, augmented=True)
    batches = SideBatches(shrunk, preprocessing, PUBLISHED)
    rows = torch.arange(len(items))
    pairs = []
    for seed in range(8):
        draws = batches.draw(rows, seed)
        ours = batches.augment(rows, draws)
        for i, image in enumerate(images):
            theirs = in_published_order(image, draws.of(i), preprocessing.size)
            pairs.append((ours[i], theirs))
    return pairs


def test_photographs_agree_with_torchvision_on_the_originals(tmp_path: Path) -> None:
    """Mean error at most 1.7 of 255 levels in every image and 0.8 over all, drift of the mean at
    most 0.7 (where highlights are clamped) and 0.15, contrast kept within 1.5 %."""
    errors, drifts = [], []
    for ours, theirs in compare(tmp_path, photographs()):
        assert ours.shape == (3, *UNIT.size) and ours.dtype == torch.float32
        errors.append(float((ours - theirs).abs().mean()))
        drifts.append(float((ours - theirs).mean()))
        assert errors[-1] <= 1.7 * LEVEL and abs(drifts[-1]) <= 0.7 * LEVEL
        assert abs(float(ours.std() / theirs.std()) - 1) <= 0.015
    assert np.mean(errors) <= 0.8 * LEVEL and abs(np.mean(drifts)) <= 0.15 * LEVEL


@pytest.mark.parametrize("kind", ["mid", "bright", "dark", "full"])
@pytest.mark.parametrize("depth", [8, 16])
def test_images_too_small_to_shrink_lose_nothing(tmp_path: Path, kind: str, depth: int) -> None:
    """Rounding of f32 alone: neither filter nor 8 bits come between; clamped or not."""
    image = make_image(kind, 96, 120)
    if depth == 16:
        image = (image[:1].to(torch.int32) * 257).to(torch.uint16).expand(3, -1, -1)
    for ours, theirs in compare(tmp_path, [image]):
        assert float((ours - theirs).abs().max()) <= 2e-4


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    """12-bit data in a 16-bit file: in 8 bits, 16 levels would be left of it."""
    ramp = torch.linspace(0, 4095, 300).to(torch.int32).expand(200, 300)
    image = ramp.to(torch.uint16)[None].expand(3, -1, -1)
    for ours, theirs in compare(tmp_path, [image]):
        assert float((ours - theirs).abs().max()) <= 0.01 * 4095 / 65535


def test_mixed_depths_share_a_scale(tmp_path: Path) -> None:
    grey = make_image("full", 96, 120)[:1].expand(3, -1, -1)
    deep = (grey.to(torch.int32) * 257).to(torch.uint16)
    for images in ([grey, deep], [deep, grey]):
        shrunk = shrink_images(write(tmp_path, images), UNIT, augmented=True)
        assert shrunk.levels.dtype == torch.uint16 and shrunk.full_scale == 65535.0
        assert torch.equal(shrunk.levels[0].int(), shrunk.levels[1].int())


def test_inputs_are_distributed_as_torchvisions(tmp_path: Path) -> None:
    """Moments of each channel over 600 augmented inputs against torchvision's own pipeline."""
    images = photographs()[:2]
    shrunk = shrink_images(write(tmp_path, images), UNIT, augmented=True)
    batches = SideBatches(shrunk, UNIT, AugmentConfig())
    ours = torch.cat([batches(torch.tensor([0, 1]), seed) for seed in range(300)])
    published = v2.Compose(
        [
            v2.RandomHorizontalFlip(),
            v2.ColorJitter(brightness=0.2, contrast=0.2),
            v2.RandomResizedCrop(UNIT.size, scale=(0.8, 1.0), ratio=(0.7, 1.3)),
            v2.ToDtype(torch.float32, scale=True),
        ]
    )
    theirs = torch.stack([published(image) for _ in range(300) for image in images])
    for statistic in (
        lambda x: x.mean(dim=(2, 3)),  # [images, 3]
        lambda x: x.std(dim=(2, 3)),
        lambda x: x[..., :40].mean(dim=(2, 3)) - x[..., 40:].mean(dim=(2, 3)),  # flips
        lambda x: x[..., :32, :].mean(dim=(2, 3)) - x[..., 32:, :].mean(dim=(2, 3)),
    ):
        mine, other = statistic(ours), statistic(theirs)
        # Four standard errors of a difference of two means, and one level of bias.
        error = 4 * (mine.var(dim=0) / len(mine) + other.var(dim=0) / len(other)).sqrt()
        assert ((mine.mean(dim=0) - other.mean(dim=0)).abs() <= error + LEVEL).all()
        ratio = mine.std(dim=0) / other.std(dim=0)
        assert ((ratio > 0.85) & (ratio < 1.15)).all()


def test_an_image_does_not_depend_on_its_company(tmp_path: Path) -> None:
    shrunk = shrink_images(write(tmp_path, photographs()), UNIT, augmented=True)
    batches = SideBatches(shrunk, UNIT, PUBLISHED)
    together = batches(torch.tensor([3, 1, 0, 2, 1]), 9)
    for i, row in enumerate((3, 1, 0, 2, 1)):
        assert torch.equal(batches(torch.tensor([row]), 9)[0], together[i])
    assert not torch.equal(batches(torch.tensor([3]), 10)[0], together[0])


@pytest.mark.parametrize("deep", [False, True])
def test_without_augmentation_it_is_the_exact_input(tmp_path: Path, deep: bool) -> None:
    images = list(photographs())
    if deep:
        images = [(i[:1].to(torch.int32) * 201).to(torch.uint16).expand(3, -1, -1) for i in images]
    items = write(tmp_path, images)
    preprocessing = Preprocessing((64, 80), (0.4, 0.3, 0.1), (0.2, 0.3, 0.1))
    batches = SideBatches(shrink_images(items, preprocessing, augmented=False), preprocessing)
    for i, inputs in enumerate(batches(torch.arange(4), 0)):
        assert torch.equal(inputs, to_network_input(read_image(items[i].path), preprocessing))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (5, 3), (3, 700)])
def test_tiny_and_long_images(tmp_path: Path, shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    for ours, _ in compare(tmp_path, [image]):
        assert ours.isfinite().all() and ours.min() >= 0 and ours.max() <= 1 + 1e-6


def test_only_what_was_shrunk_for_it_is_used(tmp_path: Path) -> None:
    items = write(tmp_path, photographs()[:1])
    shrunk = shrink_images(items, UNIT, augmented=True)
    with pytest.raises(ValueError, match=r"size \(64, 80\), got \(128, 160\)"):
        SideBatches(shrunk, UNIT)
    plain = SideBatches(shrink_images(items, UNIT, augmented=False), UNIT)
    with pytest.raises(ValueError, match="nothing to draw"):
        plain.draw(torch.tensor([0]), 0)


def count_decodes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    decoded: list[str] = []
    original = side_images.read_item

    def counting(item: ImageItem) -> Tensor:
        decoded.append(item.key)
        return original(item)

    monkeypatch.setattr(side_images, "read_item", counting)
    return decoded


def equal(left: SideImages, right: SideImages) -> bool:
    return all(torch.equal(getattr(left, n), getattr(right, n)) for n in side_images._TENSORS)


def test_kept_on_disk_and_used_for_the_same_images_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    items, folder = write(tmp_path, photographs()[:2]), tmp_path / "kept"
    decoded = count_decodes(monkeypatch)

    def shrink(**changes: Any) -> SideImages:
        decoded.clear()
        return shrink_images(items, UNIT, **{"augmented": True, "directory": folder, **changes})

    first = shrink()
    assert len(decoded) == 2
    assert equal(shrink(), first) and not decoded
    (file,) = folder.iterdir()
    # Other pixels under a known name, another form: another file.
    shrink(augmented=False)
    assert len(decoded) == 2 and len(list(folder.iterdir())) == 2
    Image.fromarray(photographs()[1].permute(1, 2, 0).numpy()).save(items[0].path)
    other = shrink()
    assert len(decoded) == 2 and not equal(other, first)
    # A file under a name that is not its own, and a flipped bit: made anew, and said.
    (changed,) = (p for p in folder.iterdir() if side_images_of(p) == side_images_of_images(other))
    changed.write_bytes(file.read_bytes())
    assert equal(shrink(), other) and len(decoded) == 2
    assert "other images or settings" in caplog.text
    content = bytearray(changed.read_bytes())
    content[-5000] ^= 1
    changed.write_bytes(content)
    assert equal(shrink(), other) and len(decoded) == 2
    assert "does not match its checksum" in caplog.text
    changed.write_bytes(b"no safetensors")
    assert equal(shrink(), other) and len(decoded) == 2
    assert "cannot be read" in caplog.text
    assert equal(shrink(), other) and not decoded
    assert all(path.name.startswith("side-") for path in folder.iterdir())


def side_images_of(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["checksum"])


def side_images_of_images(images: SideImages) -> str:
    return side_images._checksum(images)


def test_more_than_the_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = write(tmp_path, photographs()[:2])
    monkeypatch.setattr(side_images, "memory_bytes", lambda: 2 * 2 * 3 * 128 * 160 - 2)
    with pytest.raises(ConfigError, match="--side-images exact"):
        shrink_images(items, UNIT, augmented=True)
    shrink_images(items, UNIT, augmented=False)


def test_exact_and_stored_make_the_same_choices(tmp_path: Path) -> None:
    """The exact path, given the same draws, differs by the filters and by its 8-bit rounding."""
    items = write(tmp_path, photographs())
    batches = SideBatches(shrink_images(items, UNIT, augmented=True), UNIT, PUBLISHED)
    rows = torch.arange(4)
    draws: AugmentationDraws = batches.draw(rows, 5)
    exact = SideAugmentation(PUBLISHED, UNIT)
    for i, stored in enumerate(batches.augment(rows, draws)):
        made = exact.apply(read_image(items[i].path), draws.of(i))
        assert float((stored - made).abs().mean()) <= 1.2 * LEVEL
        flipped = exact.apply(read_image(items[i].path).flip(2), draws.of(i))
        assert float((stored - flipped).abs().mean()) > 10 * LEVEL


@pytest.mark.parametrize("size", [(64, 80), (33, 7)], ids=str)
@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("level", NATIVE_LEVELS)
def test_the_extension_resamples_as_torch_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    level: str,
    deep: bool,
    size: tuple[int, int],
) -> None:
    """Rounding of f32 alone, of clamped levels too; at sizes that no vector divides; rows that are
    a column of something."""
    images = [*photographs(), make_image("bright", 96, 21)]
    if deep:
        images = [(i[:1].to(torch.int32) * 257).to(torch.uint16).expand(3, -1, -1) for i in images]
    preprocessing = Preprocessing(size, (0.4, 0.3, 0.1), (0.2, 0.3, 0.1))
    shrunk = shrink_images(write(tmp_path, images), preprocessing, augmented=True)
    batches = SideBatches(shrunk, preprocessing, PUBLISHED)
    rows = torch.tensor([[4, 0, 0, 3, 1, 2]]).expand(2, -1).t().contiguous()[:, 0]
    draws = batches.draw(rows, 3)
    monkeypatch.setenv("FPT_NATIVE_LEVEL", level)
    assert native_images.can_resample_images(shrunk.levels)
    ours = batches.augment(rows, draws)
    monkeypatch.setattr("fpt_fast.images.side_batches.can_resample_images", lambda _: False)
    torch.testing.assert_close(ours, batches.augment(rows, draws), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("level", NATIVE_LEVELS[:1])
def test_what_the_extension_would_read_out_of_bounds_is_refused(level: str) -> None:
    good = {
        "levels": torch.zeros(2, 3, 5, 7, dtype=torch.uint8),
        "rows": torch.tensor([1]),
        "tones": torch.ones(4, 1),
        "vertical": (torch.full((1, 4, 2), 4), torch.ones(1, 4, 2)),
        "horizontal": (torch.full((1, 6, 3), 6), torch.ones(1, 6, 3)),
        "normalisation": torch.ones(2, 3),
    }
    assert native_images.resample_images(**good).shape == (1, 3, 4, 6)  # type: ignore[arg-type]
    for change, message in (
        ({"rows": torch.tensor([2])}, r"rows must be in 0..1, got 2"),
        (
            {"vertical": (torch.full((1, 4, 2), 5), torch.ones(1, 4, 2))},
            "row_index must be in 0..4",
        ),
        (
            {"horizontal": (torch.full((1, 6, 3), -1), torch.ones(1, 6, 3))},
            "column_index must be in",
        ),
        ({"horizontal": (torch.full((1, 6, 3), 6), torch.ones(1, 6, 2))}, "column_weight must be"),
        ({"tones": torch.ones(1, 4)}, "tones must be"),
        ({"normalisation": torch.ones(3, 2).t()}, "normalisation must be .*, not contiguous"),
        ({"levels": torch.zeros(2, 3, 5, 7)}, "levels must be contiguous and of dtype"),
        ({"levels": torch.zeros(2, 1, 5, 7, dtype=torch.uint8)}, "levels must be"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native_images.resample_images(**{**good, **change})  # type: ignore[arg-type]
