"""Padding by hand: which patches are padding, which of the kept tokens lie there, what helps."""

import pytest
import torch

from fpt_fast.doctor import find_in_padding
from fpt_fast.doctor.padding_rules import least_padded, padding_of
from fpt_fast.images import to_network_input
from fpt_fast.records import Preprocessing

INPUT, PATCH = (48, 48), (8, 8)
# A data set without a shape that most images have.
MIXED = [(700, 512)] * 28 + [(800, 560)] * 23 + [(640, 480)] * 21 + [(600, 500)] * 18


@pytest.mark.parametrize("size", [(60, 20), (20, 60), (50, 50), (47, 33), (31, 90)], ids=str)
def test_padding_is_where_the_input_is_black(size: tuple[int, int]) -> None:
    white = torch.full((3, *size), 255, dtype=torch.uint8)
    plain = Preprocessing(INPUT, (0.0,) * 3, (1.0,) * 3, "pad")
    patches = to_network_input(white, plain)[0].unfold(0, 8, 8).unfold(1, 8, 8)
    # Scaling blurs the image's edge into a neighbouring patch; 31x90 has a half-covered pixel.
    assert torch.equal(padding_of(size, INPUT, PATCH), patches.amax((2, 3)) < 0.4)


def test_what_selection_keeps_of_the_padding_is_counted() -> None:
    # Of 60x20 two thirds are padding: columns 0, 1 and 4, 5 of 6.  One prefix token comes first.
    assert padding_of((60, 20), INPUT, PATCH)[0].tolist() == [True, True, False, False, True, True]
    in_padding, in_image, prefix = 1, 3, 0
    first = torch.tensor([[in_padding, in_image], [in_padding, in_padding + 6]])
    second = torch.tensor([[in_image, prefix], [in_image, in_padding]])
    kept = torch.stack([first, second])[None]  # [1, 2 layers, 2 heads, 2]
    [found] = find_in_padding([(60, 20)], INPUT, PATCH, kept=kept, prefix_tokens=1, layers=(4, 5))
    # Three quarters of the first layer's, a third of the second's: its prefix token is no patch.
    assert found.what.startswith("54% of the kept tokens lie in the black padding of --fit pad")
    assert "takes 67% of the input" in found.what and found.severity == "warning"
    assert found.where == ("layer 4: 75%", "layer 5: 33%")
    assert "--input-size 80x32 has about as many patches" in found.advice


def test_little_in_the_padding_is_no_warning() -> None:
    kept = torch.full((1, 1, 1, 3), 3)
    [found] = find_in_padding([(60, 20)], INPUT, PATCH, kept=kept, prefix_tokens=1, layers=(0,))
    assert found.severity == "note" and found.what.startswith("0% of the kept") and not found.where
    full = {"kept": kept, "prefix_tokens": 1, "layers": (0,)}
    assert list(find_in_padding([(50, 50)], INPUT, PATCH, **full)) == []


def test_before_preloading_its_share_of_the_input_is_told() -> None:
    [found] = find_in_padding([(60, 20), (60, 20), (50, 50)], INPUT, PATCH)
    assert "takes 44% of it" in found.what and found.severity == "note"
    assert found.advice.startswith("--input-size 72x32 has about as many patches")
    assert "padding takes 15% of it" in found.advice
    assert list(find_in_padding([(50, 48), (50, 50)], INPUT, PATCH)) == []


SHAPES = [
    ([(60, 20)], (512, 512), (16, 16)),
    ([(10, 10), (1000, 800), (1000, 800)], (512, 512), (16, 16)),
    ([(1, 1000)], (64, 64), (16, 16)),
    ([(1000, 1), (900, 1)], (64, 64), (16, 16)),
    (MIXED, (512, 512), (16, 16)),
    ([(31, 90), (47, 33), (60, 20), (20, 61)], (56, 56), (14, 14)),
]


@pytest.mark.parametrize(("sizes", "input_size", "patch"), SHAPES, ids=str)
def test_the_proposed_input_has_the_least_padding_of_all(
    sizes: list[tuple[int, int]], input_size: tuple[int, int], patch: tuple[int, int]
) -> None:
    patches = (input_size[0] // patch[0]) * (input_size[1] // patch[1])
    padding = {}
    for rows in range(1, patches + 1):
        size = (rows * patch[0], max(1, round(patches / rows)) * patch[1])
        of_each = {image: padding_of(image, size, patch).double().mean() for image in set(sizes)}
        padding[size] = float(torch.stack([of_each[image] for image in sizes]).mean())
    size, least, _ = least_padded(sizes, input_size, patch)
    assert least == pytest.approx(padding[size], abs=1e-6)
    assert least == pytest.approx(min(padding.values()), abs=1e-6)


def test_who_follows_the_advice_is_not_advised_anew() -> None:
    [found] = find_in_padding(MIXED, (512, 512), (16, 16))
    size, padding, _ = least_padded(MIXED, (512, 512), (16, 16))
    height, width = size
    assert f"--input-size {height}x{width} has" in found.advice
    assert f"padding takes {padding:.0%} of it" in found.advice
    assert list(find_in_padding(MIXED, size, (16, 16))) == []
    # Tall and wide ones alike: no shape has less than the square, and none is named.
    [found] = find_in_padding([(60, 30), (30, 60)], INPUT, PATCH)
    assert found.advice.startswith("no shape of about as many patches has much less")
