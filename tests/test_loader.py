"""Batches: what they hold depends on seed, epoch and image, and on nothing else."""

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout
from fpt_fast.config import AugmentConfig
from fpt_fast.images import DecodedStore, ImageError, load_image_set, shrink_images
from fpt_fast.loader import CachedFeatures, FeatureLoader, NoFeatures
from fpt_fast.ops import quantise_kv
from fpt_fast.records import FeatureBatch, ImageItem, Preprocessing, SelectedTokens
from fpt_fast.trainer.batches import move_batch

SIDE = Preprocessing((16, 16), (0.5, 0.5, 0.5), (0.25, 0.25, 0.25))


@pytest.fixture
def items(image_folder: Path) -> tuple[ImageItem, ...]:
    return load_image_set(image_folder).of_split("train")


@pytest.fixture
def make_loader(items: tuple[ImageItem, ...]) -> Callable[..., FeatureLoader]:
    def make(**changes: object) -> FeatureLoader:
        values: dict[str, object] = {
            "batch_size": 5,
            "store": DecodedStore(),
            "augmentation": AugmentConfig(),
            "shuffle": True,
            "seed": 3,
            **changes,
        }
        features = values.pop("features", NoFeatures())
        return FeatureLoader(items, features, SIDE, **values)  # type: ignore[arg-type]

    return make


def epoch(loader: FeatureLoader, number: int) -> list[FeatureBatch]:
    loader.set_epoch(number)
    return list(loader)


def pixels(batches: Sequence[FeatureBatch]) -> Tensor:
    return torch.cat([batch.side_pixels for batch in batches])


def keys(batches: Sequence[FeatureBatch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def test_every_image_once_and_the_last_batch_is_kept(
    make_loader: Callable[..., FeatureLoader], items: tuple[ImageItem, ...]
) -> None:
    loader = make_loader()
    batches = epoch(loader, 0)
    assert [len(batch.keys) for batch in batches] == [5, 5, 2]
    assert len(loader) == 3
    assert sorted(keys(batches)) == [item.key for item in items]
    label_of = {item.key: item.label for item in items}
    for batch in batches:
        assert batch.labels.tolist() == [label_of[key] for key in batch.keys]
        assert batch.side_pixels.shape == (len(batch.keys), 3, 16, 16)
        assert batch.kv is None


def test_threads_change_nothing(make_loader: Callable[..., FeatureLoader]) -> None:
    one, many = epoch(make_loader(workers=1), 4), epoch(make_loader(workers=5), 4)
    assert keys(one) == keys(many)
    assert torch.equal(pixels(one), pixels(many))


def test_epochs_differ_and_repeat(make_loader: Callable[..., FeatureLoader]) -> None:
    loader = make_loader()
    first, second, first_again = (epoch(loader, number) for number in (0, 1, 0))
    assert keys(first) != keys(second)
    assert keys(first) == keys(first_again)
    assert torch.equal(pixels(first), pixels(first_again))
    # The augmentation differs between epochs for one and the same image.
    at = {key: i for i, key in enumerate(keys(second))}
    moved = pixels(second)[[at[key] for key in keys(first)]]
    assert not torch.equal(pixels(first), moved)


def test_seeds_differ(make_loader: Callable[..., FeatureLoader]) -> None:
    assert keys(epoch(make_loader(seed=0), 0)) != keys(epoch(make_loader(seed=1), 0))


def test_without_shuffling_and_augmentation_epochs_are_equal(
    make_loader: Callable[..., FeatureLoader], items: tuple[ImageItem, ...]
) -> None:
    loader = make_loader(shuffle=False, augmentation=None)
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert keys(first) == [item.key for item in items]
    assert torch.equal(pixels(first), pixels(second))


def test_stored_side_images_make_the_same_choices_and_decode_nothing(
    make_image_set: Callable[..., Path],
) -> None:
    """These images are no larger than twice the input: nothing is lost but 8-bit rounding."""
    items = load_image_set(make_image_set("small", size=(32, 28))).of_split("train")
    shrunk = shrink_images(items, SIDE, augmented=True)

    def make(**changes: Any) -> FeatureLoader:
        values = {"batch_size": 5, "store": DecodedStore(), "shuffle": True, "seed": 3, **changes}
        return FeatureLoader(items, NoFeatures(), SIDE, augmentation=AugmentConfig(), **values)

    expected = {number: epoch(make(), number) for number in (0, 3)}
    for item in items:
        item.path.unlink()
    with pytest.raises(ImageError):
        epoch(make(), 0)
    for number, exact in expected.items():
        made = epoch(make(side_images=shrunk), number)
        assert keys(made) == keys(exact)
        assert torch.equal(pixels(made), pixels(epoch(make(side_images=shrunk, workers=1), number)))
        # In units of the input's deviation, which is a quarter of full scale here.
        assert float((pixels(made) - pixels(exact)).abs().max()) <= 4 * 1.5 / 255
    with pytest.raises(ValueError, match="those of the 12 items, got 0"):
        make(side_images=shrink_images((), SIDE, augmented=True))


@pytest.mark.parametrize("augmented", [True, False])
def test_the_side_input_made_later_is_the_one_made_at_once(
    make_loader: Callable[..., FeatureLoader], items: tuple[ImageItem, ...], augmented: bool
) -> None:
    """Batches then bring which image and which seed; the bits are the same."""
    stored = shrink_images(items, SIDE, augmented=augmented)
    changes = {"side_images": stored, "augmentation": AugmentConfig() if augmented else None}
    at_once, later = (
        make_loader(**changes, side_device=device) for device in (None, torch.device("cpu"))
    )
    assert at_once.side_input is None and later.side_input is not None
    for number in (0, 3):
        expected, brought = epoch(at_once, number), epoch(later, number)
        assert keys(brought) == keys(expected)
        for batch, wanted in zip(brought, expected, strict=True):
            assert batch.side_pixels.shape == (len(batch.keys), 2)
            assert torch.equal(later.side_input(batch.side_pixels), wanted.side_pixels)
    with pytest.raises(ValueError, match="side_device needs side_images"):
        make_loader(side_device=torch.device("cpu"))


def test_stored_images_are_exact_without_augmentation(
    make_loader: Callable[..., FeatureLoader], items: tuple[ImageItem, ...]
) -> None:
    stored = shrink_images(items, SIDE, augmented=False)
    exact = epoch(make_loader(augmentation=None), 1)
    made = epoch(make_loader(augmentation=None, side_images=stored), 1)
    assert keys(made) == keys(exact) and torch.equal(pixels(made), pixels(exact))


def test_from_a_step_on_the_batches_are_the_same(
    make_loader: Callable[..., FeatureLoader], items: tuple[ImageItem, ...]
) -> None:
    loader = make_loader()
    whole = epoch(loader, 2)
    for batch in whole[:2]:
        for key in batch.keys:
            next(item for item in items if item.key == key).path.unlink()
    rest = list(make_loader_at(make_loader, 2).iterate_from(2))
    assert keys(rest) == keys(whole[2:]) and torch.equal(pixels(rest), pixels(whole[2:]))
    assert list(make_loader_at(make_loader, 2).iterate_from(3)) == []


def make_loader_at(make_loader: Callable[..., FeatureLoader], number: int) -> FeatureLoader:
    loader = make_loader()
    loader.set_epoch(number)
    return loader


def test_an_epoch_left_early_stops_its_threads(make_loader: Callable[..., FeatureLoader]) -> None:
    batches = iter(make_loader(batch_size=1))
    next(batches)
    batches.close()  # type: ignore[attr-defined]
    assert not [t for t in threading.enumerate() if t.name.startswith("fpt-loader")]


def test_an_unreadable_image_is_named(
    make_loader: Callable[..., FeatureLoader], items: tuple[ImageItem, ...]
) -> None:
    items[3].path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=items[3].path.name):
        epoch(make_loader(), 0)


@pytest.fixture
def make_cache(items: tuple[ImageItem, ...], tmp_path: Path) -> Callable[..., Path]:
    """A cache whose rows are in another order than the items; kv of a row is its number."""

    def make(**changes: Any) -> Path:
        layout = RecordLayout(layers=1, heads=1, kept=2, head_width=8, dtype=changes.pop("dtype"))
        with CacheWriter(
            tmp_path / "cache",
            layout,
            {},
            [item.key for item in reversed(items)],
            quantise=quantise_kv if layout.has_scales else None,
            **changes,
        ) as writer:
            for row in range(len(items)):
                kv = torch.full((1, *layout.kv_shape), row + 1.0)
                writer.write([row], SelectedTokens(kv, torch.zeros(1, 1, 1, 2, dtype=torch.int32)))
            writer.finish()
        return tmp_path / "cache"

    return make


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("in_place", [False, True])
def test_features_follow_their_key(
    make_loader: Callable[..., FeatureLoader],
    make_cache: Callable[..., Path],
    items: tuple[ImageItem, ...],
    dtype: str,
    mode: Any,
    in_place: bool,
) -> None:
    with CacheReader(make_cache(dtype=dtype, records_per_shard=5), mode=mode) as reader:
        features = CachedFeatures(reader, items, in_place=in_place)
        for batch in epoch(make_loader(features=features), 0):
            assert batch.kv is not None
            assert (batch.rows is not None) == (in_place and mode == "mmap")
            assert (batch.k_scales is not None) == (dtype == "int8")
            here = move_batch(batch, torch.device("cpu"))
            assert here.kv is batch.kv  # on the CPU nothing is copied
            kv, k_scales = batch.kv, batch.k_scales
            if batch.rows is not None:
                assert kv.shape[0] == len(items)
                kv = kv[batch.rows]
                k_scales = None if k_scales is None else k_scales[batch.rows]
            keys_ = kv[:, 0, 0, 0, 0, 0].float()
            if k_scales is not None:
                keys_ = keys_ * k_scales[:, 0, 0, 0]
            expected = [reader.keys.index(key) + 1 for key in batch.keys]
            assert keys_.tolist() == pytest.approx(expected)


def test_only_the_rows_of_a_batch_go_to_another_device(
    make_loader: Callable[..., FeatureLoader],
    make_cache: Callable[..., Path],
    items: tuple[ImageItem, ...],
) -> None:
    with CacheReader(make_cache(dtype="int8"), mode="mmap") as reader:
        features = CachedFeatures(reader, items, in_place=True)
        batch = move_batch(epoch(make_loader(features=features), 0)[0], torch.device("meta"))
    assert batch.rows is None
    for tensor in (batch.kv, batch.k_scales, batch.v_scales):
        assert tensor is not None and tensor.is_meta and tensor.shape[0] == 5


@pytest.mark.parametrize("workers", [1, 3])
def test_what_comes_is_announced_in_order(
    make_loader: Callable[..., FeatureLoader], workers: int
) -> None:
    announced: list[list[str]] = []
    lock = threading.Lock()

    class Listens(NoFeatures):
        def announce(self, items: Sequence[ImageItem]) -> None:
            with lock:
                announced.append([item.key for item in items])

    made = [list(batch.keys) for batch in make_loader(features=Listens(), workers=workers)]
    for number, keys_ in enumerate(made):
        coming = made[number + workers] if number + workers < len(made) else []
        assert keys_ + coming in announced


def test_bad_arguments(make_loader: Callable[..., FeatureLoader]) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        make_loader(batch_size=0)
    with pytest.raises(ValueError, match="at least one image"):
        FeatureLoader((), NoFeatures(), SIDE, batch_size=1, store=DecodedStore())
