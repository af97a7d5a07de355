"""Decoded images in memory."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fpt_fast.images import DecodedStore, ImageError, read_image, store
from fpt_fast.records import ImageItem

BYTES = 10 * 20 * 3


@pytest.fixture
def items(tmp_path: Path) -> list[ImageItem]:
    rng = np.random.default_rng(0)
    for number in range(6):
        pixels = rng.integers(0, 256, (10, 20, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    return [ImageItem(path.name, path, 0, "train") for path in sorted(tmp_path.glob("*.png"))]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Keys in the order in which files were decoded."""
    keys: list[str] = []

    def read(item: ImageItem) -> torch.Tensor:
        keys.append(item.key)
        return read_image(item.path)

    monkeypatch.setattr(store, "read_item", read)
    return keys


def test_decodes_once(items: list[ImageItem], reads: list[str]) -> None:
    images = DecodedStore()
    for _ in range(3):
        for item in items:
            assert torch.equal(images.get(item), read_image(item.path))
    assert reads == [item.key for item in items]
    assert len(images) == 6 and images.used_bytes == 6 * BYTES


def test_limit_is_kept_and_what_is_held_stays(items: list[ImageItem], reads: list[str]) -> None:
    images = DecodedStore(4 * BYTES + 1)
    for _ in range(3):
        for item in items:
            assert torch.equal(images.get(item), read_image(item.path))
    assert len(images) == 4 and images.used_bytes == 4 * BYTES
    assert len(reads) == 6 + 2 + 2


def test_a_grey_image_takes_one_plane(tmp_path: Path) -> None:
    Image.new("L", (20, 10)).save(tmp_path / "x.png")
    images = DecodedStore()
    assert images.get(ImageItem("x.png", tmp_path / "x.png", 0, "train")).shape == (3, 10, 20)
    assert images.used_bytes == 200


def test_limit_of_0_keeps_nothing(items: list[ImageItem]) -> None:
    images = DecodedStore(0)
    assert images.get(items[0]).shape == (3, 10, 20)
    assert len(images) == 0 and images.used_bytes == 0
    with pytest.raises(ValueError, match="limit_bytes must be at least 0, got -1"):
        DecodedStore(-1)


def test_default_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 0 < DecodedStore().limit_bytes <= 4 * 2**30
    group = tmp_path / "memory.max"
    monkeypatch.setattr(store, "_CGROUP_LIMIT", group)
    group.write_text("1048576\n")
    assert DecodedStore().limit_bytes == 262144
    group.write_text("max\n")
    assert DecodedStore().limit_bytes > 262144


def test_clear(items: list[ImageItem], reads: list[str]) -> None:
    images = DecodedStore()
    images.get(items[0])
    images.clear()
    assert len(images) == 0 and images.used_bytes == 0
    images.get(items[0])
    assert len(reads) == 2


def test_unreadable(tmp_path: Path) -> None:
    images = DecodedStore()
    with pytest.raises(ImageError) as caught:
        images.get(ImageItem("c/x.png", tmp_path / "x.png", 0, "train"))
    assert caught.value.key == "c/x.png" and len(images) == 0


def test_threads_share_it(items: list[ImageItem]) -> None:
    """Two threads that want one image at once must not count it twice."""
    images = DecodedStore(5 * BYTES)
    barrier = threading.Barrier(4)

    def work(start: int) -> None:
        barrier.wait()
        for step in range(60):
            item = items[(start + step) % 6]
            assert images.get(item).shape == (3, 10, 20)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, (0, 0, 1, 3)))
    assert len(images) == 5 and images.used_bytes == 5 * BYTES
