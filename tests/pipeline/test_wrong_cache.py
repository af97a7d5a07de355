"""A cache that does not fit is refused with the difference, and never used."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import files_of, write_backbone

from fpt_fast.cache import CacheMismatch
from fpt_fast.config import ConfigError
from fpt_fast.pipeline import PreloadSettings, TrainSettings, predict, preload, train
from helpers import write_image_set

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"backbone": "vit_base_patch16_384"}, "backbone"),
        ({"token_ratio": 0.3}, "token_ratio"),
        ({"layers": "1-3"}, "layers"),
        ({"importance": "class_token"}, "importance"),
        ({"input_size": "56"}, "input_size"),
        ({"method": "fpt"}, "layers"),
    ],
    ids=str,
)
def test_training_on_features_of_other_settings_is_refused(
    changes: dict[str, object], named: str, preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings())
    with pytest.raises(CacheMismatch, match=named):
        train(train_settings(**changes))


def test_layers_of_ones_own_need_to_be_said(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings(layers="1,3"))
    with pytest.raises(CacheMismatch, match="--layers 1,3"):
        train(train_settings())
    result = train(train_settings(layers="1,3", overwrite=True, epochs=1))
    assert len(result.history.epochs) == 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_ratio": 0.3}, "token_ratio"),
        ({"layers": "1-3"}, "layers"),
        ({"importance": "class_token"}, "importance"),
        ({"input_size": "56"}, "input_size"),
        ({"mean": (0.4, 0.4, 0.4), "std": (0.2, 0.2, 0.2)}, "mean"),
        ({"position_interpolation": "bicubic_scale"}, "position_interpolation"),
    ],
    ids=str,
)
def test_preloading_other_settings_into_a_cache_is_refused(
    changes: dict[str, object], named: str, preload_settings: MakePreload
) -> None:
    settings = preload_settings()
    preload(settings)
    before = files_of(settings.cache)
    with pytest.raises(CacheMismatch, match=named):
        preload(dataclasses.replace(settings, **changes))
    assert files_of(settings.cache) == before


def test_no_image_is_measured_for_a_cache_that_cannot_fit(
    preload_settings: MakePreload, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = preload_settings()
    preload(settings)

    def measure(*_: object, **__: object) -> None:
        raise AssertionError("the images were measured before the cache was found not to fit")

    monkeypatch.setattr("fpt_fast.pipeline.planning.measure_statistics", measure)
    with pytest.raises(CacheMismatch, match=r"input_size: the cache has \[48, 48\], asked for"):
        preload(dataclasses.replace(settings, input_size="56", normalization="auto"))


def test_a_run_is_not_made_longer(preload_settings: MakePreload, train_settings: MakeTrain) -> None:
    preload(preload_settings())
    train(train_settings(epochs=1))
    with pytest.raises(ValueError, match="config.epochs: 1 -> 3.*cannot be made longer.*anew"):
        train(train_settings(epochs=3, resume=True))
    with pytest.raises(ValueError, match="restore them or choose another run_dir"):
        train(train_settings(epochs=1, seed=1, resume=True))


def test_other_weights_under_the_same_name_are_refused(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path, data: Path
) -> None:
    preload(preload_settings())
    result = train(train_settings(epochs=1))

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["vit.encoder.layer.0.intermediate.dense.weight"][0, 0] += 1e-3

    other = write_backbone(tmp_path / "other" / "golden-vit", nudge)
    with pytest.raises(CacheMismatch, match="weights_hash"):
        preload(preload_settings(backbone=str(other)))
    with pytest.raises(CacheMismatch, match="other weights"):
        predict(run=result.run, images=(data,), output=tmp_path / "o.csv", backbone=str(other))
    assert not (tmp_path / "o.csv").exists()


def test_images_that_the_cache_lacks_are_named(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    grown = write_image_set(tmp_path / "grown", counts={"train": 5, "val": 2, "test": 2})
    with pytest.raises(ValueError, match=r"lacks 3 of 27 images .*train/healthy/4\.png"):
        train(train_settings(data=grown))


def test_settings_that_a_cache_has_settled_are_not_ignored(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings())
    with pytest.raises(ConfigError, match="--augment-input: with a cache this is settled"):
        train(train_settings(augment_input=True))
    with pytest.raises(CacheMismatch, match="mean: the cache has 0.5000 .*, .* for 0.48"):
        train(train_settings(normalization="messidor2"))


def test_no_cache_where_one_is_expected(train_settings: MakeTrain) -> None:
    with pytest.raises((ValueError, OSError), match="preload"):
        train(train_settings())


def test_a_live_pass_needs_a_backbone(train_settings: MakeTrain) -> None:
    with pytest.raises(ConfigError, match="--backbone"):
        train(train_settings(cache="none"))


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_size": "50"}, "nearest"),
        ({"input_size": "big"}, "512"),
        ({"token_ratio": 0.001}, "token_ratio"),
        ({"layers": "2-9"}, "depth"),
        ({"normalization": "messidor3"}, "messidor2"),
        ({"mean": (0.5, 0.5, 0.5)}, "--std"),
        ({"backbone": "no_such_model"}, "no_such_model"),
    ],
    ids=str,
)
def test_settings_that_cannot_work_are_refused_before_work(
    change: dict[str, object], named: str, preload_settings: MakePreload
) -> None:
    settings = preload_settings(**change)
    with pytest.raises(ValueError, match=named):
        preload(settings)
    assert not settings.cache.exists() or not any(settings.cache.iterdir())


def test_a_cache_directory_that_is_something_else_is_refused(
    preload_settings: MakePreload, data: Path, tmp_path: Path
) -> None:
    before = files_of(data)
    with pytest.raises(ConfigError, match="folder of the images"):
        preload(preload_settings(cache=data))
    assert files_of(data) == before
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is a file"):
        preload(preload_settings(cache=tmp_path / "notes.txt"))


def test_a_batch_size_of_nothing_is_refused(preload_settings: MakePreload) -> None:
    with pytest.raises(ConfigError, match="batch_size must be at least 1"):
        preload(preload_settings(batch_size=0))
