"""Several findings per image, from a list of columns to predictions."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fpt_fast.config import ConfigError
from fpt_fast.images import ImageSetError, load_image_set
from fpt_fast.pipeline import (
    Predictor,
    PreloadSettings,
    TrainSettings,
    compare,
    doctor,
    evaluate,
    predict,
    preload,
    sweep,
    train,
)
from fpt_fast.report import read_predictions
from fpt_fast.trust import finding_temperatures

FINDINGS = ("bright", "striped")
Make = Callable[..., TrainSettings]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """48 images of 16 patients: bright or dark, and apart from that striped or plain."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "findings"
    folder.mkdir()
    lines = ["file,patient,bright,striped,age"]
    for number in range(48):
        bright, striped = int(rng.random() < 0.5), int(rng.random() < 0.4)
        pixels = rng.integers(0, 40, (48, 40, 3)) + 120 * bright
        pixels[:: 8 if striped else 99, :] = 255 - 120 * bright
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
        told = ["", bright][number % 9 > 0], ["-1", striped][number % 11 > 0]
        lines.append(f"{number}.png,p{number // 3},{told[0]},{told[1]},5")
    (folder / "list.csv").write_text("\n".join(lines))
    return folder / "list.csv"


LISTED = {"path_column": "file", "patient_column": "patient", "label_columns": FINDINGS}


@pytest.mark.usefixtures("whole_figures")
def test_findings_from_a_list_to_predictions(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    images = load_image_set(data, **LISTED)  # type: ignore[arg-type]
    assert (images.task, images.classes) == ("multilabel", FINDINGS)
    by_key = {item.key: item.findings for item in images.items}
    assert by_key["9.png"][0] == -1 and by_key["11.png"][1] == -1
    preload(preload_settings(**LISTED))
    result = train(train_settings(**LISTED, epochs=15, loss_weight="balance", sampling="balanced"))
    assert result.history.monitor == "auc"
    learned = evaluate(run=tmp_path / "run", split="train", resamples=0)
    assert learned.metrics.per_class[0].auc > 0.9
    assert set(result.metrics) >= {"auc", "ap", "exact_match"}
    written = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert written["classes"] == list(FINDINGS) and len(written["per_class"]) == 2
    assert written["intervals"]["units"] == "patients" and written["operating_points"]
    assert evaluate(run=tmp_path / "run").values == pytest.approx(result.metrics.values)
    predict(run=tmp_path / "run", images=(data.parent / "0.png",), output=tmp_path / "p.csv")
    [row] = csv.DictReader((tmp_path / "p.csv").open())
    called = [name for name in FINDINGS if float(row[f"probability_{name}"]) >= 0.5]
    assert row["predicted"] == (";".join(called) or "(none)")
    assert doctor(run=tmp_path / "run", workers=2).ok
    _check_calibration(tmp_path / "run", data.parent / "0.png", written)
    page = (tmp_path / "run" / "report.html").read_text()
    assert "By finding" in page and "classes" not in page.partition("<h2>Settings")[0]
    images = len((tmp_path / "run" / "predictions.csv").read_text().splitlines()) - 1
    assert page.count('<td class="picture"><img') == images
    comparison = compare(tmp_path / "run", tmp_path / "run", resamples=50)
    assert comparison.auc is None and len(comparison.per_class) == 2
    assert "AUC of striped" in str(comparison)


def _check_calibration(run: Path, image: Path, written: dict[str, Any]) -> None:
    """A calibrated predictor divides the logits of each finding by the temperature of the
    validation images, and leaves one alone that they allow none for."""
    validation, _ = read_predictions(run / "validation.csv", FINDINGS)
    fitted = [found["temperature"] for found in written["calibration_by_finding"]]
    assert any(fitted)
    for found, expected in zip(fitted, finding_temperatures(validation), strict=True):
        assert found is expected is None or found == pytest.approx(expected, rel=1e-5)
    temperatures = [found or 1.0 for found in fitted]
    plain, scaled = (Predictor(run, calibrated=c)([image]) for c in (False, True))
    expected = torch.logit(plain.probabilities.double()) / torch.tensor(temperatures)
    torch.testing.assert_close(scaled.probabilities.double(), expected.sigmoid(), rtol=0, atol=1e-5)


def test_a_sweep_of_findings_trains_what_train_trains(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    preload(preload_settings(**LISTED))
    alone = train(train_settings(**LISTED, loss="focal"))
    settings = train_settings(**LISTED, loss="focal")
    swept = sweep(
        data=data, cache=settings.cache, run=tmp_path / "sweep", epochs=2, batch_size=5, workers=2,
        loss="focal", side_size="24", prompts="3", learning_rate="1e-2", **LISTED,
    )  # fmt: skip
    for name, value in alone.metrics.items():
        assert swept.rows[0].metrics[name] == pytest.approx(value, abs=1e-4)


def test_losses_that_do_not_fit_are_refused(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Make,
    tmp_path: Path,
) -> None:
    preload(preload_settings(**LISTED))
    with pytest.raises(ConfigError, match="'kappa' is for one class per image"):
        train(train_settings(**LISTED, loss="kappa"))
    classes = {"path_column": "file", "label_column": "patient", "split_ratios": (1, 0, 0)}
    classes["patient_column"] = "patient"
    with pytest.raises(ConfigError, match="is for several findings per image"):
        train(train_settings(**classes, loss="binary_focal"))
    with pytest.raises(ConfigError, match="monitor must be one of loss, auc, ap"):
        train(train_settings(**LISTED, monitor="kappa"))


@pytest.mark.parametrize(
    ("cell", "blank", "expected"),
    [("", "unknown", -1), ("", "absent", 0), ("-1", "absent", -1), ("1.0", "unknown", 1)],
)
def test_cells(tmp_path: Path, cell: str, blank: str, expected: int) -> None:
    lines = ["path,split,a,b", f"0.png,train,{cell},1", "1.png,train,1,0"]
    for number in (0, 1):
        (tmp_path / f"{number}.png").touch()
    (tmp_path / "list.csv").write_text("\n".join(lines))
    listed = {"label_columns": ("a", "b"), "ratios": (1, 0, 0)}
    images = load_image_set(tmp_path / "list.csv", blank_findings=blank, **listed)  # type: ignore[arg-type]
    assert images.items[0].findings == (expected, 1)
    (tmp_path / "list.csv").write_text("\n".join([lines[0], "0.png,train,maybe,1", lines[2]]))
    with pytest.raises(ImageSetError, match=r"row 2: a must be 1, 0, -1 \(unknown\) or empty"):
        load_image_set(tmp_path / "list.csv", **listed)  # type: ignore[arg-type]
    (tmp_path / "list.csv").write_text("\n".join([lines[0], "0.png,train,0,1", "1.png,train,0,1"]))
    with pytest.raises(ImageSetError, match="finding 'a' .* no images in the train split"):
        load_image_set(tmp_path / "list.csv", **listed)  # type: ignore[arg-type]
