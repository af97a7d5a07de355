"""Kept tokens and prompt attention, from their index to the patches of a picture."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from token_examples import looking_example, make_example

from fpt_fast.report.maps import attention_by_head, attention_share, kept_by_head, kept_share
from fpt_fast.report.tokens import draw_attention, draw_tokens


def test_kept_share_counts_layers_and_heads() -> None:
    share = kept_share(make_example())
    assert share.tolist() == [[1.0, 0.25, 0.0], [0.0, 0.0, 0.5]]
    none = kept_share(make_example(prefix_tokens=0, grid=(1, 7)))
    assert none.tolist() == [[0.25, 1.0, 0.25, 0.0, 0.0, 0.0, 0.5]]


def test_tokens_are_drawn_where_they_are() -> None:
    picture = draw_tokens(make_example())
    plain = np.asarray(Image.open(io.BytesIO(picture.plain)).convert("RGB"))
    marked = np.asarray(Image.open(io.BytesIO(picture.marked)).convert("RGB")).astype(int)
    assert plain.shape == marked.shape == (16, 24, 3)
    assert (picture.lowest, picture.highest, picture.outlined) == (0.0, 1.0, 1)
    brightness = marked.sum(axis=2)[4::8, 4::8]  # the middle of each patch
    order = np.argsort(-brightness, axis=None)
    assert order[:3].tolist() == [0, 5, 1]
    assert len({int(brightness[i]) for i in ((0, 2), (1, 0), (1, 1))}) == 1
    # The frame of the one patch kept most: white on its border, not in its middle.
    white = (marked == 255).all(axis=2)
    assert white[0, :8].all()
    assert white[:8, 0].all()
    assert white[7, :8].all()
    assert white[:8, 7].all()
    assert white.sum() == 28


def test_attention_falls_on_the_patches_of_the_tokens() -> None:
    example = looking_example()
    by_head = attention_by_head(example)
    # Layer 0, head 0 keeps the class token and patch 0; the prompts' mean is 0.75 and 0.25.
    assert by_head[0, 0].tolist() == [[0.25, 0.0, 0.0], [0.0, 0.0, 0.0]]
    assert by_head[0, 1].tolist() == [[0.5, 0.0, 0.0], [0.0, 0.0, 0.5]]
    assert by_head[1, 0].tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    assert by_head[1, 1].tolist() == [[0.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    assert attention_share(example).tolist() == [[0.3125, 0.125, 0.0], [0.0, 0.0, 0.375]]
    assert kept_by_head(example)[1, 0].tolist() == [[True, True, False], [False, False, False]]


def test_attention_is_drawn() -> None:
    example = looking_example()
    picture = draw_attention(example)
    assert (picture.highest, picture.lowest) == (0.375, 0.0)
    marked = np.asarray(Image.open(io.BytesIO(picture.marked)).convert("RGB")).astype(int)
    assert int(marked.sum(axis=2)[4::8, 4::8].argmax()) == 5
    with pytest.raises(ValueError, match="no prompt weights"):
        draw_attention(make_example())
    with pytest.raises(ValueError, match=r"must be \[2, 2, prompts, 2\], got \(2, 2, 3\)"):
        draw_attention(make_example(weights=torch.zeros(2, 2, 3)))


def test_large_and_odd_images_are_drawn() -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3, 700, 1111), generator=generator).to(torch.uint8)
    picture = draw_tokens(make_example(pixels=pixels))
    assert max(Image.open(io.BytesIO(picture.marked)).size) == 512
    even = torch.arange(1, 7, dtype=torch.int32).repeat(2, 2, 1)
    assert draw_tokens(make_example(index=even)).outlined == 0


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"index": torch.tensor([[[7]]])}, r"tokens in 0..6 .* in 7..7"),
        ({"index": torch.tensor([[[-1]]])}, r"in -1..-1"),
        ({"index": torch.zeros(1, 1, 0, dtype=torch.int32)}, r"got \(1, 1, 0\) values"),
        ({"pixels": torch.zeros(3, 4, 4)}, "u8, got .* torch.float32"),
        ({"pixels": torch.zeros(4, 4, dtype=torch.uint8)}, r"\[3, h, w\] u8, got \(4, 4\)"),
    ],
)
def test_examples_must_fit(changes: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        draw_tokens(make_example(**changes))
