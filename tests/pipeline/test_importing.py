"""Features preloaded by the authors' code become a cache that trains."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_run import files_of

from fpt_fast.cache import CacheMismatch, CacheReader
from fpt_fast.pipeline import (
    PreloadSettings,
    TrainSettings,
    convert,
    import_reference,
    preload,
    train,
)
from helpers import class_image, write_image


@pytest.fixture
def unique_data(tmp_path: Path) -> Path:
    """Images whose names differ, as the authors' code needs them."""
    import numpy as np

    rng = np.random.default_rng(0)
    number = 0
    for split, count in (("train", 3), ("val", 1), ("test", 1)):
        for label, name in enumerate(("a", "b")):
            for _ in range(count):
                path = tmp_path / "unique" / split / name / f"image{number}.png"
                write_image(path, class_image(label, (48, 48), rng))
                number += 1
    return tmp_path / "unique"


def write_reference(cache: Path, folder: Path) -> Path:
    """The authors' files from a cache of ours: NAME.safetensors with f32 keys and values."""
    folder.mkdir()
    with CacheReader(cache) as reader:
        for row, key in enumerate(reader.keys):
            kv = reader.read([row]).kv[0].float()  # [L, 2, H, K, D]
            states = {
                "key_states": kv[:, 0].contiguous(),
                "value_states": kv[:, 1].contiguous(),
            }
            save_file(states, folder / f"{Path(key).stem}.safetensors")
    return folder


def test_imported_features_train_like_our_own(
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Callable[..., TrainSettings],
    unique_data: Path,
    backbone: Path,
    tmp_path: Path,
) -> None:
    own = preload_settings(
        data=unique_data, cache=tmp_path / "own", position_interpolation="bicubic_scale"
    )
    preload(own)
    folder = write_reference(own.cache, tmp_path / "reference")
    imported = import_reference(
        features=folder,
        data=unique_data,
        cache=tmp_path / "imported",
        backbone=str(backbone),
        input_size="48",
        normalization="backbone",
    )
    assert imported.images == 10
    assert imported.differences
    with CacheReader(own.cache) as ours, CacheReader(tmp_path / "imported") as theirs:
        assert ours.keys == theirs.keys
        rows = range(len(ours.keys))
        assert torch.equal(ours.read(rows).kv, theirs.read(rows).kv)
        assert bool((theirs.read(rows).index == -1).all())
    losses = [
        [epoch.loss for epoch in train(settings).history.epochs]
        for settings in (
            train_settings(data=unique_data, cache=str(own.cache), run=tmp_path / "a"),
            train_settings(data=unique_data, cache=str(tmp_path / "imported"), run=tmp_path / "b"),
        )
    ]
    assert losses[0] == losses[1]
    # Features of our own are never added to an imported cache.
    before = files_of(tmp_path / "imported")
    with pytest.raises(CacheMismatch, match="imported_from"):
        preload(preload_settings(data=unique_data, cache=tmp_path / "imported"))
    assert files_of(tmp_path / "imported") == before


def test_features_of_other_shapes_are_refused(
    preload_settings: Callable[..., PreloadSettings],
    unique_data: Path,
    backbone: Path,
    tmp_path: Path,
) -> None:
    own = preload_settings(data=unique_data, cache=tmp_path / "own")
    preload(own)
    folder = write_reference(own.cache, tmp_path / "reference")
    with pytest.raises(ValueError, match=r"image8.*token ratio"):
        import_reference(
            features=folder,
            data=unique_data,
            cache=tmp_path / "imported",
            backbone=str(backbone),
            input_size="48",
            normalization="backbone",
            token_ratio=0.4,
        )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_imported_in_8_bits(
    preload_settings: Callable[..., PreloadSettings],
    unique_data: Path,
    backbone: Path,
    tmp_path: Path,
    dtype: str,
) -> None:
    own = preload_settings(data=unique_data, cache=tmp_path / "own")
    preload(own)
    settings = {
        "features": write_reference(own.cache, tmp_path / "reference"),
        "data": unique_data,
        "backbone": str(backbone),
        "input_size": "48",
        "normalization": "backbone",
    }
    import_reference(cache=tmp_path / "f16", **settings)
    import_reference(cache=tmp_path / "direct", dtype=dtype, **settings)
    convert(source=tmp_path / "f16", target=tmp_path / "converted", dtype=dtype)
    assert files_of(tmp_path / "direct") == files_of(tmp_path / "converted")
