"""The authors' preloaded features, image by image."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fpt_fast.cache import RecordLayout
from fpt_fast.compat.features import (
    REFERENCE_DIFFERENCES,
    ReferenceFeaturesError,
    read_reference_features,
)
from fpt_fast.records import ImageItem, ImageSet

LAYOUT = RecordLayout(layers=2, heads=3, kept=4, head_width=8)
SHAPE = (2, 3, 4, 8)


def image_set(*keys: str) -> ImageSet:
    root = Path("data")
    items = tuple(ImageItem(key, root / key, 0, "train") for key in sorted(keys))
    return ImageSet(root, ("a", "b"), items)


def write(folder: Path, stem: str, **changes: torch.Tensor) -> dict[str, torch.Tensor]:
    folder.mkdir(exist_ok=True)
    states = {"key_states": torch.randn(SHAPE), "value_states": torch.randn(SHAPE)} | changes
    save_file(states, folder / f"{stem}.safetensors")
    return states


def test_every_image_in_order(tmp_path: Path) -> None:
    images = image_set("train/a/x.png", "train/b/y.jpeg", "test/a/z.v2.png")
    states = {stem: write(tmp_path / "f", stem) for stem in ("x", "y", "z.v2", "unused")}
    got = list(read_reference_features(tmp_path / "f", images, LAYOUT))
    assert [position for position, _ in got] == [0, 1, 2]
    for (position, tokens), stem in zip(got, ("z.v2", "x", "y"), strict=True):
        assert images.items[position].path.stem == stem
        assert tokens.kv.shape == (1, 2, 2, 3, 4, 8)
        assert tokens.kv.dtype == torch.float16
        assert torch.equal(tokens.kv[0, :, 0], states[stem]["key_states"].half())
        assert torch.equal(tokens.kv[0, :, 1], states[stem]["value_states"].half())
        assert tokens.index.shape == (1, 2, 3, 4)
        assert tokens.index.dtype == torch.int32
        assert bool((tokens.index == -1).all())


def test_shared_stems_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    images = image_set("train/a/x.png", "val/b/x.jpg", "train/a/y.png")
    write(tmp_path / "f", "x")
    write(tmp_path / "f", "y")
    with pytest.raises(ReferenceFeaturesError) as caught:
        read_reference_features(tmp_path / "f", images, LAYOUT)
    assert "2 images share their file stem" in str(caught.value)
    assert "train/a/x.png, val/b/x.jpg" in str(caught.value)
    assert "y.png" not in str(caught.value)


def test_killed_preload_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    images = image_set(*(f"train/a/{i}.png" for i in range(9)))
    write(tmp_path / "f", "0")
    with pytest.raises(ReferenceFeaturesError, match=r"8 of 9 images have no file .* \.\.\.;"):
        read_reference_features(tmp_path / "f", images, LAYOUT)
    with pytest.raises(FileNotFoundError, match="not a folder"):
        read_reference_features(tmp_path / "g", images, LAYOUT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value_states": torch.zeros(2, 3, 5, 8)}, "value_states must be"),
        ({"key_states": torch.zeros(SHAPE, dtype=torch.int32)}, "floating-point dtype"),
        ({"key_states": torch.full(SHAPE, torch.nan)}, "holds NaN"),
        ({"value_states": torch.full(SHAPE, torch.inf)}, "holds NaN, infinity"),
        ({"value_states": torch.full(SHAPE, 70_000.0)}, "largest of f16"),
    ],
)
def test_features_that_cannot_be_kept(
    tmp_path: Path, changes: dict[str, torch.Tensor], message: str
) -> None:
    write(tmp_path / "f", "x", **changes)
    with pytest.raises(ReferenceFeaturesError, match=message) as caught:
        list(read_reference_features(tmp_path / "f", image_set("train/a/x.png"), LAYOUT))
    assert "train/a/x.png" in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 64])
def test_damaged_files(tmp_path: Path, content: bytes) -> None:
    write(tmp_path / "f", "x")
    (tmp_path / "f" / "x.safetensors").write_bytes(content)
    with pytest.raises(ReferenceFeaturesError, match="lacks a sound key_states"):
        list(read_reference_features(tmp_path / "f", image_set("train/a/x.png"), LAYOUT))


def test_file_without_values(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()
    save_file({"key_states": torch.zeros(SHAPE)}, tmp_path / "f" / "x.safetensors")
    with pytest.raises(ReferenceFeaturesError, match="lacks a sound value_states"):
        list(read_reference_features(tmp_path / "f", image_set("train/a/x.png"), LAYOUT))


def test_differences_are_said() -> None:
    text = " ".join(REFERENCE_DIFFERENCES)
    for part in ("f16", "unverified", "which tokens were kept", "order", "stem"):
        assert part in text
