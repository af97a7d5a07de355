"""Side augmentation: the same distribution and the same pixels as torchvision's transforms."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from images.published_augmentation import in_published_order, make_image
from torchvision.transforms import v2

from fpt_fast.config import AugmentConfig
from fpt_fast.images import (
    AugmentationDraw,
    SideAugmentation,
    choose,
    hashed_uniform,
    mix,
    to_network_input,
)
from fpt_fast.records import Preprocessing

UNIT = Preprocessing((16, 24), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
SQUARE = dataclasses.replace(UNIT, size=(16, 16))
PUBLISHED = AugmentConfig()
DRAWS = 4000
# The 99.9 % point of the two-sample Kolmogorov-Smirnov distance, twice DRAWS samples.
DISTANCE = 1.95 * math.sqrt(2 / DRAWS)


def draws(
    height: int,
    width: int,
    config: AugmentConfig = PUBLISHED,
    size: tuple[int, int] = (16, 16),
) -> list[AugmentationDraw]:
    """As the loader draws them: half of them of other images, half of other epochs."""
    rows = torch.arange(DRAWS // 2)
    sizes = torch.full_like(rows, height), torch.full_like(rows, width)
    return [
        chosen.of(i)
        for epoch in (0, 1)
        for chosen in [choose(hashed_uniform(mix(7, epoch), rows), *sizes, config, size)]
        for i in rows.tolist()
    ]


def distance(left: list[float], right: list[float]) -> float:
    """Largest difference between two empirical distribution functions."""
    values = np.sort(np.concatenate([left, right]))
    cdfs = [
        np.searchsorted(np.sort(side), values, side="right") / len(side) for side in (left, right)
    ]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


@pytest.mark.parametrize(("height", "width"), [(480, 640), (100, 100), (300, 1000)])
def test_crops_are_distributed_as_torchvisions(height: int, width: int) -> None:
    theirs_of = v2.RandomResizedCrop(16, scale=PUBLISHED.crop_area, ratio=PUBLISHED.crop_ratio)
    image = torch.empty(3, height, width)
    theirs = [theirs_of.make_params([image]) for _ in range(DRAWS)]
    ours = [draw.crop for draw in draws(height, width)]
    for top, left, h, w in ours:
        assert top >= 0 and top + h <= height and left >= 0 and left + w <= width
    for name, mine in {
        "area": ([h * w for _, _, h, w in ours], [p["height"] * p["width"] for p in theirs]),
        "ratio": ([w / h for _, _, h, w in ours], [p["width"] / p["height"] for p in theirs]),
        "top": ([top for top, *_ in ours], [p["top"] for p in theirs]),
        "left": ([left for _, left, *_ in ours], [p["left"] for p in theirs]),
    }.items():
        assert distance(*mine) <= DISTANCE, name


def test_crop_of_an_image_too_long_for_any_is_the_central_one() -> None:
    theirs = v2.RandomResizedCrop(16, scale=(0.8, 1.0), ratio=(0.7, 1.3))
    for height, width in ((10, 500), (500, 10), (1, 1), (1, 3000)):
        expected = theirs.make_params([torch.empty(3, height, width)])
        crop = SideAugmentation(PUBLISHED, SQUARE).draw(height, width, torch.Generator()).crop
        assert crop == tuple(expected[name] for name in ("top", "left", "height", "width"))


def test_crops_of_a_tall_input_are_tall() -> None:
    # With the published ratios every crop of an image this tall would be the central one.
    crops = [draw.crop for draw in draws(1000, 400, size=(160, 64))]
    ratios = [w / h for _, _, h, w in crops]
    assert min(ratios) >= 0.27 and max(ratios) <= 0.53
    assert min(h * w for _, _, h, w in crops) >= 0.79 * 400_000
    assert max(h for _, _, h, _ in crops) > 990
    assert len(set(crops)) > DRAWS / 2


def test_flips_and_factors_are_distributed_as_torchvisions() -> None:
    jitter = v2.ColorJitter(brightness=PUBLISHED.brightness, contrast=PUBLISHED.contrast)
    theirs = [jitter.make_params([]) for _ in range(DRAWS)]
    ours = draws(100, 100)
    for name in ("brightness", "contrast"):
        mine = [getattr(draw, name) for draw in ours]
        assert min(mine) >= 0.8 and max(mine) <= 1.2
        assert distance(mine, [float(p[f"{name}_factor"]) for p in theirs]) <= DISTANCE
    # Four standard deviations of a share of one half.
    bound = 4 * 0.5 / math.sqrt(DRAWS)
    contrast_first = [list(p["fn_idx"]).index(1) < list(p["fn_idx"]).index(0) for p in theirs]
    for share in (
        np.mean(contrast_first),
        np.mean([draw.contrast_first for draw in ours]),
        np.mean([draw.flip_horizontally for draw in ours]),
    ):
        assert abs(share - 0.5) <= bound
    assert not any(draw.flip_vertically for draw in ours)
    flipped = draws(100, 100, AugmentConfig(horizontal_flip=0.0, vertical_flip=0.25))
    assert not any(draw.flip_horizontally for draw in flipped)
    assert abs(np.mean([draw.flip_vertically for draw in flipped]) - 0.25) <= bound


def test_choices_do_not_depend_on_each_other() -> None:
    columns = np.array(
        [
            (d.flip_horizontally, d.brightness, d.contrast, d.contrast_first, d.crop[2] * d.crop[3])
            for d in draws(400, 400)
        ],
        dtype=np.float64,
    )
    correlation = np.corrcoef(columns.T) - np.eye(5)
    assert np.abs(correlation).max() <= 4 / math.sqrt(DRAWS)


def test_hashed_numbers_are_uniform_and_unrelated() -> None:
    """Over images, counters and epochs; a number is the same in any company."""
    here, there = (hashed_uniform(mix(0, epoch), torch.arange(4000)) for epoch in (0, 1))
    assert here.shape == (4000, 45) and float(here.min()) >= 0 and float(here.max()) < 1
    for column in range(0, 45, 7):
        uniform = np.sort(here[:, column].numpy())
        steps = np.arange(1, 4001) / 4000
        assert np.abs(uniform - steps).max() <= 1.95 / math.sqrt(4000)
    bound = 5 / math.sqrt(4000)
    inside = np.corrcoef(here.numpy().T) - np.eye(45)
    assert np.abs(inside).max() <= bound
    for left, right in ((here[:, 3], there[:, 3]), (here[1:, 3], here[:-1, 3])):
        assert abs(np.corrcoef(left.numpy(), right.numpy())[0, 1]) <= bound
    some = torch.tensor([17, 3])
    assert torch.equal(hashed_uniform(mix(0, 0), some), here[some])


@pytest.mark.parametrize("kind", ["mid", "bright", "dark", "full"])
@pytest.mark.parametrize("depth", [8, 16])
@pytest.mark.parametrize("grey", [False, True])
def test_pixels_agree_with_the_published_order(kind: str, depth: int, grey: bool) -> None:
    """Within the rounding of 8-bit levels (one after the table, one after resizing, the first
    magnified by at most 1.2 squared); 16 bits within 1e-4, torchvision's sum of grey weights."""
    image = make_image(kind)
    if grey:
        image = image[:1].expand(3, -1, -1)
    if depth == 16:
        image = (image.to(torch.int32) * 257).to(torch.uint16)
    augment = SideAugmentation(AugmentConfig(vertical_flip=0.5), UNIT)
    generator = torch.Generator().manual_seed(2)
    for _ in range(25):
        draw = augment.draw(*image.shape[1:], generator)
        out = augment.apply(image, draw)
        assert out.shape == (3, *UNIT.size) and out.dtype == torch.float32 and out.is_contiguous()
        expected = in_published_order(image, draw, UNIT.size)
        bound = 1.5 / 255 if depth == 8 else 1e-4
        assert (out - expected).abs().max() <= bound
        assert (out - expected).mean().abs() <= (0.2 / 255 if depth == 8 else 1e-4)


@pytest.mark.parametrize("first", ["brightness", "contrast"])
def test_order_of_the_jitter_matters_and_is_kept(first: str) -> None:
    image = make_image("full")
    draw = AugmentationDraw(False, False, 1.2, 0.8, first == "contrast", (0, 0, 90, 120))
    other = AugmentationDraw(False, False, 1.2, 0.8, first != "contrast", (0, 0, 90, 120))
    out = SideAugmentation(PUBLISHED, UNIT).apply(image, draw)
    assert (out - in_published_order(image, draw, UNIT.size)).abs().max() <= 1.5 / 255
    assert (out - in_published_order(image, other, UNIT.size)).abs().max() > 3 / 255


def test_same_generator_same_result() -> None:
    image = make_image("full")
    augment = SideAugmentation(PUBLISHED, UNIT)
    first, again, other = (
        augment(image, torch.Generator().manual_seed(seed)) for seed in (5, 5, 6)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_takes_the_same_count_of_numbers_for_every_image() -> None:
    states = []
    for shape in ((90, 120), (6, 600)):
        generator = torch.Generator().manual_seed(0)
        SideAugmentation(PUBLISHED, UNIT)(make_image("mid", *shape), generator)
        states.append(generator.get_state())
    assert torch.equal(*states)


def test_without_any_augmentation_it_is_the_network_input() -> None:
    nothing = AugmentConfig(
        horizontal_flip=0.0, brightness=0.0, contrast=0.0, crop_area=(1.0, 1.0), crop_ratio=(1, 1)
    )
    preprocessing = Preprocessing((16, 24), (0.4, 0.3, 0.1), (0.2, 0.3, 0.1))
    image = make_image("full", 60, 90)
    out = SideAugmentation(nothing, preprocessing)(image, torch.Generator())
    torch.testing.assert_close(out, to_network_input(image, preprocessing), rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2000), (2000, 1), (5, 3)])
def test_tiny_and_long_images(shape: tuple[int, int]) -> None:
    image = torch.randint(0, 256, (3, *shape), dtype=torch.uint8)
    out = SideAugmentation(PUBLISHED, UNIT)(image, torch.Generator().manual_seed(0))
    assert out.shape == (3, 16, 24) and out.isfinite().all() and 0 <= out.min() <= out.max() <= 1


def test_image_is_not_written_to() -> None:
    image = make_image("full")
    before = image.clone()
    for seed in range(8):
        SideAugmentation(PUBLISHED, UNIT)(image, torch.Generator().manual_seed(seed))
    assert torch.equal(image, before)


def test_other_tensors_are_refused() -> None:
    with pytest.raises(ValueError, match=r"image must be \[3, h, w\]"):
        SideAugmentation(PUBLISHED, UNIT)(torch.zeros(3, 8, 8), torch.Generator())
