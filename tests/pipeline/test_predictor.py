"""The online path: one model or many, from files or from memory, in one frozen pass."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fpt_fast.backbone import FrozenBackbone
from fpt_fast.cache import CacheMismatch
from fpt_fast.config import ConfigError
from fpt_fast.images import read_image
from fpt_fast.model import FptModel
from fpt_fast.peers import PEER_FORMAT
from fpt_fast.pipeline import (
    Predictor,
    PreloadSettings,
    TrainSettings,
    evaluate,
    predict,
    preload,
    sweep,
    train,
)
from fpt_fast.records import Predictions
from fpt_fast.report import read_predictions, write_predictions
from fpt_fast.trust import fit_temperature
from fpt_fast.trust.calibration import FEW
from helpers import spread_weights, write_image_set

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@pytest.fixture
def run(preload_settings: MakePreload, train_settings: MakeTrain) -> Path:
    preload(preload_settings())
    return train(train_settings(epochs=1)).run


@pytest.fixture
def loud(run: Path) -> Path:
    """The same run with weights that make every pixel tell."""
    model = FptModel.from_pretrained(run / "best")
    spread_weights(model, scale=0.3)
    model.save_pretrained(run / "best", extra=model.extra)
    return run


def files(data: Path) -> list[Path]:
    return sorted((data / "test").rglob("*.png"))


def probabilities(predictor: Predictor, images: Any, **options: Any) -> Tensor:
    values = predictor(images, **options).probabilities
    assert values is not None
    return values


def test_it_says_what_evaluation_says(run: Path, data: Path) -> None:
    evaluate(run=run)
    expected, classes = read_predictions(run / "predictions-test.csv")
    predictor = Predictor(run, dtype="float32")
    predictions = predictor(files(data))
    assert predictor.classes == classes
    assert [str(Path(key).relative_to(data)) for key in predictions.keys] == list(expected.keys)
    assert predictions.probabilities is not None and expected.probabilities is not None
    torch.testing.assert_close(predictions.probabilities, expected.probabilities, rtol=0, atol=2e-4)
    torch.testing.assert_close(predictions.logits.softmax(1), predictions.probabilities)


def test_batches_workers_and_memory_change_nothing(run: Path, data: Path) -> None:
    predictor = Predictor(run, dtype="float32")
    paths = files(data)
    expected = probabilities(predictor, paths)
    for options in ({"batch_size": 1}, {"batch_size": 4, "workers": 5}, {"workers": 1}):
        values = probabilities(predictor, paths, **options)
        torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    decoded = [read_image(path) for path in paths]
    torch.testing.assert_close(probabilities(predictor, decoded), expected, rtol=0, atol=1e-5)
    assert predictor(decoded).keys[1] == "image 1"
    with pytest.raises(ValueError, match="at least one image"):
        predictor([])
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predictor(paths, batch_size=0)


def test_an_ensemble_is_the_mean_and_costs_one_frozen_pass(
    run: Path,
    data: Path,
    train_settings: MakeTrain,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    other = train(train_settings(run=tmp_path / "other", seed=3, epochs=1, side_size="16")).run
    alone = [probabilities(Predictor(r, dtype="float32"), files(data)) for r in (run, other)]
    passes = []
    extract = FrozenBackbone.extract

    def counted(self: FrozenBackbone, pixels: Tensor, *rest: Any, **options: Any) -> Any:
        passes.append(len(pixels))
        return extract(self, pixels, *rest, **options)

    monkeypatch.setattr(FrozenBackbone, "extract", counted)
    both = Predictor([run, other], dtype="float32")
    mean = probabilities(both, files(data), batch_size=6)
    torch.testing.assert_close(mean, (alone[0] + alone[1]) / 2, rtol=0, atol=1e-5)
    assert sum(passes) == len(files(data)) and len(both.runs) == 2
    out = tmp_path / "out.csv"
    predict(run=run, ensemble=(other,), images=(data / "test",), output=out, dtype="float32")
    with out.open() as file:
        rows = [[float(v) for k, v in row.items() if "prob" in k] for row in csv.DictReader(file)]
    torch.testing.assert_close(torch.tensor(rows), mean, rtol=0, atol=2e-6)


def test_a_sweeps_folder_is_an_ensemble(
    preload_settings: MakePreload, data: Path, tmp_path: Path
) -> None:
    preload(preload_settings())
    folder = sweep(
        data=data,
        cache=str(tmp_path / "cache"),
        run=tmp_path / "sweep",
        side_size="24",
        epochs=1,
        seed="0,1",
        report_images=0,
        workers=1,
    ).folder
    ensemble = Predictor(folder, dtype="float32")
    assert len(ensemble.runs) == 2 and all(path.parent == folder for path in ensemble.runs)
    alone = [probabilities(Predictor(r, dtype="float32"), files(data)) for r in ensemble.runs]
    mean = (alone[0] + alone[1]) / 2
    torch.testing.assert_close(probabilities(ensemble, files(data)), mean, rtol=0, atol=1e-5)
    images, out = (data / "test",), tmp_path / "out.csv"
    said = predict(run=folder, images=images, output=out, dtype="float32").predictions
    one, other = ensemble.runs
    predict(run=one, ensemble=(other,), images=images, output=tmp_path / "b.csv", dtype="float32")
    assert said.probabilities is not None
    torch.testing.assert_close(said.probabilities, mean, rtol=0, atol=1e-5)
    assert out.read_text() == (tmp_path / "b.csv").read_text()
    # Models of another method are called differently: one of them must be named.
    described = json.loads((other / "best" / "config.json").read_text())
    (other / "best" / "config.json").write_text(json.dumps(described | {"format": PEER_FORMAT}))
    with pytest.raises(ConfigError, match=f"name one of its models: .*{other.name}"):
        predict(run=folder, images=images, output=tmp_path / "c.csv")


def test_views_are_mirror_images(loud: Path, data: Path) -> None:
    images = [read_image(path) for path in files(data)]
    mirrored = [image.flip(-1) for image in images]
    one = Predictor(loud, dtype="float32")
    both = probabilities(Predictor(loud, dtype="float32", views="both"), images)
    mean = (probabilities(one, images) + probabilities(one, mirrored)) / 2
    torch.testing.assert_close(both, mean, rtol=0, atol=1e-4)
    side = probabilities(Predictor(loud, dtype="float32", views="side"), images)
    assert not torch.allclose(side, both, atol=1e-3)
    assert not torch.allclose(side, probabilities(one, images), atol=1e-3)
    # An image that is its own mirror image has one view only.
    same = [torch.cat([image, image.flip(-1)], dim=-1) for image in images[:2]]
    torch.testing.assert_close(
        probabilities(Predictor(loud, dtype="float32", views="side"), same),
        probabilities(one, same),
        rtol=0,
        atol=1e-4,
    )


def test_calibrated_is_scaled_by_the_temperature(run: Path, data: Path) -> None:
    plain = Predictor(run, dtype="float32")(files(data))
    temperature = fit_temperature(read_predictions(run / "validation.csv")[0])
    values = probabilities(Predictor(run, dtype="float32", calibrated=True), files(data))
    expected = (plain.logits / temperature).softmax(dim=1)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    (run / "validation.csv").unlink()
    with pytest.raises(ConfigError, match=r"no validation.csv to calibrate by"):
        Predictor(run, calibrated=True)


def test_a_frozen_model_that_was_moved_is_asked_for(run: Path, data: Path, backbone: Path) -> None:
    expected = probabilities(Predictor(run, dtype="float32"), files(data))
    moved = backbone.rename(backbone.with_name("moved"))
    with pytest.raises(ConfigError, match=f"in {backbone}, which is not there; .* --backbone"):
        Predictor(run)
    found = Predictor(run, backbone=str(moved), dtype="float32")
    assert torch.equal(probabilities(found, files(data)), expected)


def test_what_validation_images_cannot_calibrate_stays_as_it_is(
    run: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation, classes = read_predictions(run / "validation.csv")
    logits = 0.1 * torch.nn.functional.one_hot(validation.labels, len(classes)).float()
    right = Predictions(validation.keys, validation.labels, logits, logits.softmax(1))
    write_predictions(run / "validation.csv", right, classes)
    plain, calibrated = (
        probabilities(Predictor(run, dtype="float32", calibrated=c), files(data))
        for c in (False, True)
    )
    assert torch.equal(plain, calibrated)
    why = "every validation image is right"
    assert f"probabilities cannot be calibrated and stay as they are: {why}\n" in caplog.text


def test_temperatures_of_few_images_are_told_of(
    run: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation, classes = read_predictions(run / "validation.csv")
    count = len(validation.labels)
    Predictor(run, calibrated=True)
    assert f"calibrated on {count} validation images: with fewer than {FEW} they" in caplog.text
    caplog.clear()
    times = -(-FEW // count)
    keys = tuple(f"{i}-{key}" for i in range(times) for key in validation.keys)
    assert validation.probabilities is not None
    labels, logits, shares = (
        torch.cat([part] * times)
        for part in (validation.labels, validation.logits, validation.probabilities)
    )
    write_predictions(run / "validation.csv", Predictions(keys, labels, logits, shares), classes)
    Predictor(run, calibrated=True)
    assert "calibrated on" not in caplog.text


@pytest.mark.parametrize("changes", [{"fusion": False}, {"loss": "mean_square_error"}])
def test_side_networks_and_regressions(
    changes: dict[str, Any],
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1, **changes)).run
    predictions = Predictor(run, dtype="float32", views="side")(files(data))
    assert len(predictions.logits) == 6
    assert (predictions.probabilities is None) == ("loss" in changes)
    result = predict(run=run, images=(data / "test",), output=tmp_path / "o.csv", dtype="float32")
    assert torch.isfinite(result.predictions.logits).all()


def test_only_runs_that_go_together(
    run: Path, preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    more = write_image_set(tmp_path / "more", classes=("a", "b", "c", "d"))
    preload(preload_settings(data=more, cache=tmp_path / "cache2"))
    settings = train_settings(epochs=1, data=more, cache=str(tmp_path / "cache2"))
    other = train(dataclasses.replace(settings, run=tmp_path / "run2")).run
    with pytest.raises(ConfigError, match="cannot be averaged"):
        Predictor([run, other])
    preload(preload_settings(cache=tmp_path / "cache3", token_ratio=0.5))
    third = train(train_settings(epochs=1, cache=str(tmp_path / "cache3"), run=tmp_path / "r3")).run
    with pytest.raises(CacheMismatch, match="token_ratio"):
        Predictor([run, third])
    with pytest.raises(ConfigError, match="at least one run"):
        Predictor([])
