"""Images in, a trained and evaluated classifier out, by way of the four calls."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_run import files_of, write_backbone

from fpt_fast.backbone import load_backbone
from fpt_fast.cache import CacheReader
from fpt_fast.config import ConfigError
from fpt_fast.images import read_image, side_images, to_network_input
from fpt_fast.model import FptModel
from fpt_fast.pipeline import (
    PreloadSettings,
    RunExists,
    TrainSettings,
    UnreadableImages,
    evaluate,
    predict,
    preload,
    train,
)
from fpt_fast.pipeline.features import FeaturePlan
from fpt_fast.records import ImageItem
from helpers import class_image, write_image, write_image_set

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@pytest.mark.usefixtures("whole_figures")
@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_the_four_calls(
    method: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    done = preload(preload_settings(method=method))
    assert (done.images, done.computed) == (24, 24)
    result = train(train_settings(method=method))
    run = result.run
    for name in ("config.yaml", "metrics.json", "history.csv", "predictions.csv", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert len(result.history.epochs) == 2
    assert result.split == "test"

    # Evaluating again gives what training reported.
    again = evaluate(run=run, split="test")
    assert again.values["auc"] == pytest.approx(result.metrics.values["auc"], abs=1e-9)
    assert again.intervals is not None
    assert "confidence intervals" in str(again)
    saved = [json.loads((run / name).read_text()) for name in ("metrics.json", "metrics-test.json")]
    assert saved[0]["intervals"] == saved[1]["intervals"]
    assert saved[0]["intervals"]["resamples"] == 2000
    # Temperature and thresholds are those of the validation images, now and then.
    assert result.assessment.calibration is not None and again.calibration is not None
    assert again.calibration.temperature == pytest.approx(
        result.assessment.calibration.temperature, rel=1e-5
    )
    assert saved[0]["operating_points"] == saved[1]["operating_points"] != []
    own = evaluate(run=run, at_specificity=(0.5,), at_sensitivity=())
    assert [point.chosen.wanted for point in own.points] == [0.5] * 3
    assert evaluate(run=run, split="val").points == ()
    # A run of an older version has no predictions of its validation images: they are made.
    (run / "validation.csv").unlink()
    older = evaluate(run=run).calibration
    assert older is not None
    assert older.temperature == pytest.approx(again.calibration.temperature, rel=1e-5)
    plain = evaluate(run=run, resamples=0)
    assert (plain.intervals, plain.values) == (None, again.values)

    # Prediction from the files alone gives the probabilities of the cached features.
    test_images = sorted((data / "test").rglob("*.png"))
    predicted = predict(
        run=run, images=(data / "test",), output=tmp_path / "out.csv", dtype="float32", batch_size=4
    )
    with (run / "predictions.csv").open() as file:
        trained = {row["key"]: row for row in csv.DictReader(file)}
    with (tmp_path / "out.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(test_images) == 6
    assert predicted.classes == ("healthy", "mild", "severe")
    for row in rows:
        key = Path(row["path"]).relative_to(data).as_posix()
        for name in predicted.classes:
            ours = float(row[f"probability_{name}"])
            theirs = float(trained[key][f"probability_{name}"])
            assert ours == pytest.approx(theirs, abs=1e-4)


def test_images_of_one_name_keep_their_own_features(
    preload_settings: MakePreload, data: Path
) -> None:
    settings = preload_settings()
    preload(settings)
    backbone = load_backbone(settings.backbone, dtype="float32")
    with CacheReader(settings.cache) as reader:
        plan = FeaturePlan.from_json(reader.fingerprint)
        frozen = plan.frozen_pass(backbone)
        same_name = [key for key in reader.keys if key.endswith("/0.png")]
        assert len(same_name) == 9
        stored = reader.read([reader.row(key) for key in same_name]).kv
        for key, kv in zip(same_name, stored, strict=True):
            pixels = to_network_input(read_image(data / key), plan.preprocessing)
            own = frozen(pixels[None])[0]
            # Another batch may round differently in the last bit of f16.
            torch.testing.assert_close(kv.float(), own.float(), rtol=2e-3, atol=2e-3)
        assert len({kv.float().sum().item() for kv in stored}) == 9


def test_training_twice_gives_the_same_model(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    first = train(train_settings(run=tmp_path / "a", workers=1))
    second = train(train_settings(run=tmp_path / "b", workers=3))
    a = FptModel.from_pretrained(tmp_path / "a" / "best").state_dict()
    b = FptModel.from_pretrained(tmp_path / "b" / "best").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert [e.loss for e in first.history.epochs] == [e.loss for e in second.history.epochs]


def test_without_a_cache_the_trainer_sees_the_same(
    preload_settings: MakePreload, train_settings: MakeTrain, backbone: Path, tmp_path: Path
) -> None:
    preload(preload_settings())
    cached = train(train_settings(run=tmp_path / "cached"))
    live = train(
        train_settings(
            run=tmp_path / "live",
            cache="none",
            backbone=str(backbone),
            input_size="48",
            normalization="backbone",
            dtype="float32",
        )
    )
    for a, b in zip(cached.history.epochs, live.history.epochs, strict=True):
        assert a.loss == pytest.approx(b.loss, rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion": False},
        {"side_size": "48"},
        {"side_size": "24x40"},
        {"cache": "none", "token_ratio": 1.0},
        {"cache": "none", "augment_input": True},
        {"cache": "none", "importance": "class_token", "layers": "0,2"},
        {"augment": False, "loss": "focal"},
        {"loss": "mean_square_error"},
        {"loss_weight": "balance"},
        {"side_images": "exact"},
    ],
    ids=str,
)
def test_components_can_be_switched(
    changes: dict[str, object],
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    backbone: Path,
    tmp_path: Path,
) -> None:
    if changes.get("cache") == "none":
        changes = {
            "backbone": str(backbone),
            "input_size": "48",
            "normalization": "backbone",
            **changes,
        }
    else:
        preload(preload_settings())
    result = train(train_settings(epochs=1, **changes))
    assert torch.isfinite(torch.tensor([epoch.loss for epoch in result.history.epochs])).all()
    model = FptModel.from_pretrained(result.run / "best")
    assert model.config.fusion == changes.get("fusion", True)
    predicted = predict(
        run=result.run, images=(tmp_path / "images" / "test",), output=tmp_path / "out.csv"
    )
    assert len(predicted.predictions.keys) == 6


def test_small_images_and_small_sets_train(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    """Images smaller than the side input, and fewer of them than a batch."""
    data = write_image_set(
        tmp_path / "small",
        classes=("a", "b"),
        counts={"train": 2, "val": 1, "test": 1},
        size=(7, 9),
    )
    preload(preload_settings(data=data))
    result = train(train_settings(data=data, batch_size=64))
    first = FptModel.from_pretrained(result.run / "best").state_dict()
    torch.manual_seed(0)
    assert result.history.best_epoch is not None
    assert len(first) > 0 and all(torch.isfinite(value).all() for value in first.values())


def test_corrupt_images_are_named_together_and_can_be_skipped(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path
) -> None:
    whole = data / "train" / "mild" / "extra.jpg"
    write_image(whole, class_image(1, (60, 60), np.random.default_rng(0)))
    whole.write_bytes(whole.read_bytes()[:-400])
    (data / "test" / "severe" / "empty.png").write_bytes(b"")
    with pytest.raises(UnreadableImages, match="skip-unreadable") as caught:
        preload(preload_settings())
    assert "extra.jpg" in str(caught.value) and "empty.png" in str(caught.value)
    assert preload(preload_settings(skip_unreadable=True)).images == 24
    with pytest.raises(ValueError, match=r"lacks 2 of 26 .*extra\.jpg.*too: --skip-unreadable; if"):
        train(train_settings())
    result = train(train_settings(skip_unreadable=True, overwrite=True))
    assert result.split == "test"


def test_nan_features_name_the_image(preload_settings: MakePreload, tmp_path: Path) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["vit.encoder.layer.3.attention.attention.value.bias"][5] = float("nan")

    broken = write_backbone(tmp_path / "broken", poison)
    with pytest.raises(ValueError, match=r"train/healthy/0\.png|test/healthy/0\.png"):
        preload(preload_settings(backbone=str(broken)))


def test_nan_features_of_a_live_pass_name_the_image(
    train_settings: MakeTrain, tmp_path: Path
) -> None:
    def poison(weights: dict[str, torch.Tensor]) -> None:
        weights["vit.encoder.layer.3.attention.attention.value.bias"][5] = 1e6

    broken = write_backbone(tmp_path / "broken", poison)
    settings = train_settings(
        cache="none", backbone=str(broken), input_size="48", normalization="backbone"
    )
    with pytest.raises(ValueError, match=r"beyond f16 for train/.*\.png"):
        train(settings)


def test_a_run_is_never_overwritten_unasked(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings())
    settings = train_settings(epochs=1)
    train(settings)
    before = (settings.run / "metrics.json").read_bytes()
    with pytest.raises(RunExists, match="--overwrite"):
        train(settings)
    assert (settings.run / "metrics.json").read_bytes() == before
    # What is to be replaced survives a mistake in the new run.
    with pytest.raises(ConfigError):
        train(dataclasses.replace(settings, overwrite=True, side_size="25"))
    assert (settings.run / "metrics.json").read_bytes() == before
    train(dataclasses.replace(settings, overwrite=True))
    foreign = settings.run.parent / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("precious")
    with pytest.raises(RunExists, match="not a run"):
        train(dataclasses.replace(settings, run=foreign, overwrite=True))
    assert (foreign / "thesis.tex").read_text() == "precious"


def test_resuming_gives_the_uninterrupted_run(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    whole = train(train_settings(run=tmp_path / "whole", epochs=3))

    class Killed(Exception):
        pass

    from fpt_fast.pipeline import training

    original = training._callbacks

    class StopAfterFirst:
        def on_epoch_end(self, record: object) -> None:
            raise Killed

        def on_end(self, history: object) -> None:
            raise AssertionError("never reached")

    training._callbacks = lambda settings: (StopAfterFirst(),)  # type: ignore[assignment]
    try:
        with pytest.raises(Killed):
            train(train_settings(run=tmp_path / "part", epochs=3))
    finally:
        training._callbacks = original
    resumed = train(train_settings(run=tmp_path / "part", epochs=3, resume=True))
    assert [e.loss for e in resumed.history.epochs] == [e.loss for e in whole.history.epochs]
    a = FptModel.from_pretrained(tmp_path / "whole" / "best").state_dict()
    b = FptModel.from_pretrained(tmp_path / "part" / "best").state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_evaluating_other_classes_is_refused(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    result = train(train_settings(epochs=1))
    other = write_image_set(tmp_path / "other", classes=("x", "y", "z"))
    with pytest.raises(ConfigError, match="classes"):
        evaluate(run=result.run, data=other)


def test_the_run_says_how_it_was_made(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings())
    result = train(train_settings(epochs=1))
    values = yaml.safe_load((result.run / "config.yaml").read_text())
    assert values["settings"]["learning_rate"] == 1e-2
    assert values["method"]["token_ratio"] == 0.2
    assert values["features"]["layers"] == [2, 3]
    assert values["classes"] == ["healthy", "mild", "severe"]


def test_side_images_are_decoded_once_and_kept(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three epochs decode as much as one; with a folder for them, the next run decodes nothing."""
    preload(preload_settings())
    decoded: list[str] = []
    original = side_images.read_item

    def counting(item: ImageItem) -> torch.Tensor:
        decoded.append(item.key)
        return original(item)

    monkeypatch.setattr(side_images, "read_item", counting)
    first = train(train_settings(epochs=3, side_cache=tmp_path / "side"))
    assert len(decoded) == len(set(decoded)) == 12 + 6  # train and val
    again = train(train_settings(epochs=3, side_cache=tmp_path / "side", run=tmp_path / "again"))
    assert len(decoded) == 12 + 6
    assert files_of(again.run / "best") == files_of(first.run / "best")
    settings = yaml.safe_load((first.run / "config.yaml").read_text())["settings"]
    assert settings["side_images"] == "stored"
    assert settings["side_cache"] == str(tmp_path / "side")


def test_paths_may_be_text(backbone: Path, data: Path, tmp_path: Path) -> None:
    """The calls as README.md has them."""
    preload(
        data=str(data),
        backbone=str(backbone),
        cache=str(tmp_path / "CACHE"),
        input_size="48",
        normalization="backbone",
    )
    result = train(
        data=str(data),
        cache=tmp_path / "CACHE",
        run=str(tmp_path / "RUN"),
        side_size="24",
        epochs=1,
        learning_rate=5e-4,
    )
    assert 0 <= result.metrics.values["auc"] <= 1
    out = str(tmp_path / "out.csv")
    assert len(predict(run=str(result.run), images=[str(data)], output=out).classes) == 3
    assert evaluate(run=str(result.run)).values["auc"] == result.metrics.values["auc"]
    with pytest.raises(ConfigError, match="'epoch'"):
        train(data=str(data), cache="none", run=str(tmp_path / "x"), epoch=3)
