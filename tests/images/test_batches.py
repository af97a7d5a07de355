"""Batches for preloading: order, grid, errors, and how much is decoded ahead."""

import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fpt_fast.images import ImageError, batches, iter_image_batches, read_image, to_network_input
from fpt_fast.images.parallel import ordered_map
from fpt_fast.records import ImageItem, Preprocessing

PREPROCESSING = Preprocessing((8, 8), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def items(tmp_path: Path) -> list[ImageItem]:
    for number in range(11):
        Image.new("RGB", (9, 12), (20 * number, 0, 0)).save(tmp_path / f"{number:02}.png")
    paths = sorted(tmp_path.glob("*.png"))
    return [ImageItem(f"c/{path.name}", path, 0, "train") for path in paths]


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_order_keys_and_pixels(items: list[ImageItem], workers: int) -> None:
    out = list(iter_image_batches(items, PREPROCESSING, batch_size=4, workers=workers))
    assert [positions for positions, _ in out] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]
    for positions, batch in out:
        assert batch.keys == tuple(items[i].key for i in positions)
        expected = [to_network_input(read_image(items[i].path), PREPROCESSING) for i in positions]
        assert torch.equal(batch.pixels, torch.stack(expected))


def test_skipping_keeps_the_grid(items: list[ImageItem]) -> None:
    skip = {0, 4, 5, 6, 7, 9}
    out = iter_image_batches(items, PREPROCESSING, batch_size=4, skip_positions=skip)
    assert [positions for positions, _ in out] == [[1, 2, 3], [8, 10]]
    everything = iter_image_batches(items, PREPROCESSING, batch_size=4, skip_positions=range(11))
    assert list(everything) == []


def test_skipped_images_are_not_opened(items: list[ImageItem]) -> None:
    items[2].path.unlink()
    out = iter_image_batches(items, PREPROCESSING, batch_size=4, skip_positions=[2])
    assert sum(len(positions) for positions, _ in out) == 10


def test_an_unreadable_image_is_an_error_at_its_turn(items: list[ImageItem]) -> None:
    items[6].path.write_bytes(b"")
    out = iter_image_batches(items, PREPROCESSING, batch_size=4)
    assert next(out)[0] == [0, 1, 2, 3]
    with pytest.raises(ImageError, match="empty") as caught:
        next(out)
    assert caught.value.key == "c/06.png" and caught.value.path == items[6].path


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"batch_size": 4, "workers": 0}])
def test_wrong_arguments(items: list[ImageItem], wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        iter_image_batches(items, PREPROCESSING, **wrong)


def test_decodes_ahead_but_not_without_bound(
    items: list[ImageItem], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []

    def read(item: ImageItem) -> torch.Tensor:
        decoded.append(item.key)
        return read_image(item.path)

    monkeypatch.setattr(batches, "read_item", read)
    many = items * 20
    out = iter_image_batches(many, PREPROCESSING, batch_size=4, workers=2)
    next(out)
    # While the caller holds the first batch, the next one is decoded: and then it stops.
    deadline = time.monotonic() + 10
    while len(decoded) < 8 and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(0.1)
    assert 8 <= len(decoded) <= 4 + 4 + 2
    out.close()
    assert len(decoded) <= 4 + 4 + 2


def test_stopping_early_leaves_no_threads(items: list[ImageItem]) -> None:
    out = iter_image_batches(items * 10, PREPROCESSING, batch_size=2, workers=3)
    next(out)
    assert any(thread.name.startswith("fpt-fast-images") for thread in threading.enumerate())
    out.close()
    assert not any(thread.name.startswith("fpt-fast-images") for thread in threading.enumerate())


def test_ordered_map_keeps_order_when_early_items_are_slow() -> None:
    release = threading.Event()

    def slow_first(number: int) -> int:
        if number == 0:
            assert release.wait(10)
        elif number == 3:
            release.set()
        return number

    assert list(ordered_map(slow_first, range(9), workers=2, ahead=4)) == list(range(9))
