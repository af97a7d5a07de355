"""Features, images, weights and settings belong together: at every call, not only the first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from small_run import files_of, write_backbone

from fpt_fast.cache import CacheMismatch, CacheReader
from fpt_fast.config import ConfigError
from fpt_fast.images import dataset_preset, load_image_set, measure_statistics
from fpt_fast.pipeline import (
    PreloadSettings,
    TrainSettings,
    UnreadableImages,
    evaluate,
    predict,
    preload,
    repair,
    train,
    training,
)
from fpt_fast.pipeline.run_folder import class_counts
from fpt_fast.trainer import CheckpointError
from helpers import write_image_set

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


def invert_images(data: Path) -> None:
    """Other pixels under the same names."""
    for path in data.rglob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)


class Interrupted(Exception):
    pass


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Make every following training stop after so many epochs (0: none is stopped)."""

    def set_up(epochs: int) -> None:
        class Stop:
            def on_epoch_end(self, record: Any) -> None:
                if record.epoch + 1 == epochs:
                    raise Interrupted

            def on_end(self, history: Any) -> None:
                pass

        monkeypatch.setattr(training, "_callbacks", lambda settings: (Stop(),))

    return set_up


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"token_ratio": 0.5}, "token_ratio"),
        ({"importance": "class_token"}, "importance"),
        ({"input_size": "56"}, "input_size"),
        ({"mean": (0.3, 0.3, 0.3), "std": (0.2, 0.2, 0.2)}, "mean"),
        ({"position_interpolation": "bicubic_scale"}, "position_interpolation"),
    ],
    ids=str,
)
def test_evaluating_on_other_features_is_refused(
    changes: dict[str, Any],
    named: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1)).run
    preload(preload_settings(cache=tmp_path / "other", **changes))
    with pytest.raises(CacheMismatch, match=named):
        evaluate(run=run, cache=str(tmp_path / "other"))


def test_evaluating_by_a_frozen_pass_uses_the_recorded_settings(
    preload_settings: MakePreload, train_settings: MakeTrain, backbone: Path, tmp_path: Path
) -> None:
    preload(preload_settings())
    trained = train(train_settings(epochs=1))
    again = evaluate(run=trained.run, cache="none")
    assert again["auc"] == pytest.approx(trained.metrics["auc"], abs=1e-6)
    moved = tmp_path / "moved"
    backbone.rename(moved)
    assert evaluate(run=trained.run, cache="none", backbone=str(moved))["auc"] == again["auc"]

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["vit.encoder.layer.0.intermediate.dense.weight"][0, 0] += 1e-3

    write_backbone(backbone, nudge)
    with pytest.raises(CacheMismatch, match="other weights"):
        evaluate(run=trained.run, cache="none")


@pytest.mark.parametrize("call", ["preload", "train", "evaluate", "resume"])
def test_images_that_changed_under_their_names_are_refused(
    call: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    interrupt_after: Callable[[int], None],
) -> None:
    settings = preload_settings()
    preload(settings)
    if call == "resume":
        interrupt_after(1)
        with pytest.raises(Interrupted):
            train(train_settings())
    elif call == "evaluate":
        train(train_settings())
    before = files_of(settings.cache)
    invert_images(data)
    with pytest.raises(CacheMismatch, match="24 of 24 images are not those"):
        if call == "preload":
            preload(settings)
        elif call == "evaluate":
            evaluate(run=train_settings().run)
        else:
            train(train_settings(resume=call == "resume"))
    assert files_of(settings.cache) == before


@pytest.mark.parametrize(
    "changes",
    [
        {"augment": False},
        {"num_prompts": 4},
        {"side_size": "32"},
        {"seed": 1},
        {"fusion": False},
        {"side_images": "exact"},
    ],
    ids=str,
)
def test_a_run_is_resumed_with_its_own_settings_only(
    changes: dict[str, Any],
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    interrupt_after: Callable[[int], None],
) -> None:
    preload(preload_settings())
    interrupt_after(1)
    with pytest.raises(Interrupted):
        train(train_settings())
    config = (train_settings().run / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match=next(iter(changes))):
        train(train_settings(resume=True, **changes))
    assert (train_settings().run / "config.yaml").read_bytes() == config
    interrupt_after(0)
    assert len(train(train_settings(resume=True)).history.epochs) == 2


def test_resuming_on_other_features_is_refused(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    interrupt_after: Callable[[int], None],
    tmp_path: Path,
) -> None:
    preload(preload_settings())
    preload(preload_settings(cache=tmp_path / "other", token_ratio=0.5))
    interrupt_after(1)
    with pytest.raises(Interrupted):
        train(train_settings())
    with pytest.raises(CheckpointError, match="token_ratio"):
        train(train_settings(resume=True, cache=str(tmp_path / "other")))


def test_augmenting_the_input_does_something_alone(
    train_settings: MakeTrain, backbone: Path, tmp_path: Path
) -> None:
    live: dict[str, Any] = {
        "cache": "none",
        "backbone": str(backbone),
        "input_size": "48",
        "normalization": "backbone",
        "augment": False,
        "epochs": 1,
    }
    losses = [
        train(train_settings(run=tmp_path / str(flag), augment_input=flag, **live))
        .history.epochs[0]
        .loss
        for flag in (False, True)
    ]
    assert losses[0] != losses[1]


def test_a_run_to_be_replaced_survives_a_new_one_that_cannot_start(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    interrupt_after: Callable[[int], None],
) -> None:
    preload(preload_settings())
    settings = train_settings(epochs=1)
    train(settings)
    before = files_of(settings.run)
    with pytest.raises(ConfigError, match="monitor"):
        train(train_settings(epochs=1, overwrite=True, monitor="nonsense"))
    assert files_of(settings.run) == before
    assert [path.name for path in settings.run.parent.glob(".*")] == []
    interrupt_after(1)
    with pytest.raises(Interrupted):
        train(train_settings(overwrite=True))
    assert not (settings.run / "metrics.json").exists()
    assert [path.name for path in settings.run.parent.glob(".*")] == []


def test_a_run_killed_in_its_first_epoch_or_between_renames_goes_on(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    interrupt_after: Callable[[int], None],
) -> None:
    preload(preload_settings())
    settings = train_settings()
    settings.run.mkdir()
    (settings.run / "config.yaml").write_text("settings: {}")
    (settings.run / "best").mkdir()
    (settings.run / "tensorboard").mkdir()
    interrupt_after(1)
    with pytest.raises(Interrupted):
        train(settings)
    (settings.run / "last").rename(settings.run / "last.old")
    interrupt_after(0)
    assert len(train(train_settings(resume=True)).history.epochs) == 2


def test_skipping_a_whole_class_is_refused(preload_settings: MakePreload, data: Path) -> None:
    for path in (data / "train" / "mild").iterdir():
        path.write_bytes(b"nothing")
    with pytest.raises(UnreadableImages, match="mild"):
        preload(preload_settings(skip_unreadable=True))


def test_measured_normalisation_is_that_of_the_training_images_and_stays(
    preload_settings: MakePreload, data: Path
) -> None:
    settings = preload_settings(normalization="auto")
    preload(settings)
    expected = measure_statistics(load_image_set(data).of_split("train"), size=(48, 48))
    with CacheReader(settings.cache) as reader:
        recorded = reader.fingerprint
    assert recorded["mean"] == pytest.approx(expected[0])
    assert recorded["std"] == pytest.approx(expected[1])
    # A data set that grows keeps the statistics that its cache was begun with.
    grown = write_image_set(data.parent / "grown", counts={"train": 4, "val": 2, "test": 2})
    Image.new("RGB", (48, 40), (250, 10, 10)).save(grown / "train" / "mild" / "new.png")
    assert preload(preload_settings(normalization="auto", data=grown)).computed == 1
    with CacheReader(settings.cache) as reader:
        assert reader.fingerprint["mean"] == recorded["mean"]
        assert len(reader.keys) == 25


def test_settings_reach_what_they_set(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    """Unbalanced data without splits, and every setting at another value than its default."""
    data = tmp_path / "flat"
    for name, count in (("a", 12), ("b", 6), ("c", 3)):
        write_image_set(data, classes=(name,), counts={"": count}, seed=count)
    split = {"data": data, "split_ratios": (0.34, 0.33, 0.33), "split_seed": 5}
    preload(preload_settings(normalization="messidor2", **split))
    with CacheReader(tmp_path / "cache") as reader:
        assert tuple(reader.fingerprint["mean"]) == dataset_preset("messidor2").mean
    result = train(
        train_settings(
            learning_rate=None,
            preset="messidor2",
            loss_weight="balance",
            weight_decay=0.02,
            clip_norm=0.5,
            warmup_epochs=1,
            monitor="accuracy",
            optimizer="sgd",
            seed=7,
            **split,
        )
    )
    values = yaml.safe_load((result.run / "config.yaml").read_text())
    recipe = values["training"]
    assert recipe["learning_rate"] == dataset_preset("messidor2").learning_rate
    assert (recipe["weight_decay"], recipe["clip_norm"], recipe["warmup_epochs"]) == (0.02, 0.5, 1)
    assert (recipe["monitor"], recipe["optimizer"], recipe["seed"]) == ("accuracy", "sgd", 7)
    assert result.history.monitor == "accuracy"
    images = load_image_set(data, ratios=(0.34, 0.33, 0.33), seed=5)
    assert len(result.metrics.confusion) == 3
    assert int(result.metrics.confusion.sum()) == len(images.of_split("test"))


def test_class_counts_stand_at_their_class(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for name, count in (("a", 5), ("b", 3), ("c", 2)):
        write_image_set(data, classes=(name,), counts={"train": count, "val": 1, "test": 1})
    assert class_counts(load_image_set(data)) == [5, 3, 2]


def test_prediction_interpolates_positions_as_the_run_did(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path, tmp_path: Path
) -> None:
    aucs = []
    preload(preload_settings(position_interpolation="bicubic_scale"))
    result = train(train_settings(epochs=1))
    predicted = predict(run=result.run, images=(data / "test",), output=tmp_path / "out.csv")
    probabilities = predicted.predictions.probabilities
    assert probabilities is not None
    recorded = (result.run / "predictions.csv").read_text().splitlines()[1:]
    for line, row in zip(recorded, probabilities.tolist(), strict=True):
        assert [float(value) for value in line.split(",")[3:]] == pytest.approx(row, abs=2e-5)
        aucs.append(row)
    assert len(aucs) == 6


def test_repair_drops_nothing_before_it_can_rebuild(
    preload_settings: MakePreload, data: Path, tmp_path: Path
) -> None:
    settings = preload_settings()
    preload(settings)
    shard = max(settings.cache.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    before = files_of(settings.cache)

    def nudge(weights: dict[str, torch.Tensor]) -> None:
        weights["vit.encoder.layer.0.intermediate.dense.weight"][0, 0] += 1e-3

    other = write_backbone(tmp_path / "other", nudge)
    with pytest.raises(CacheMismatch, match="other weights"):
        repair(cache=settings.cache, data=data, backbone=str(other))
    assert files_of(settings.cache) == before
