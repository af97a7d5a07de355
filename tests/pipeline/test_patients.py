"""Patients from a list to the confidence intervals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from fpt_fast.config import ConfigError
from fpt_fast.images import ImageSetError
from fpt_fast.pipeline import PreloadSettings, TrainSettings, evaluate, preload, train

PATIENTS = {"data": "list.csv", "path_column": "file", "patient_column": "who"}


def test_patients_are_never_torn_apart_and_are_what_is_resampled(
    data: Path,
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Callable[..., TrainSettings],
    tmp_path: Path,
) -> None:
    paths = sorted(path.relative_to(data).as_posix() for path in data.rglob("*.png"))
    rows = [
        f"{path},{path.split('/')[1]},{path.split('/')[1]}{i // 2}" for i, path in enumerate(paths)
    ]
    (data / "list.csv").write_text("\n".join(["file,label,who", *rows]))
    settings = {**PATIENTS, "data": data / "list.csv"}
    preload(preload_settings(**settings))
    result = train(train_settings(**settings, epochs=1))
    assert result.assessment.intervals is not None
    assert result.assessment.intervals.units == "patients"
    again = evaluate(run=tmp_path / "run")
    assert again.intervals is not None and again.intervals.units == "patients"
    written = json.loads((tmp_path / "run" / "metrics-test.json").read_text())
    assert written["intervals"]["units"] == "patients"
    forgotten = {key: value for key, value in settings.items() if key != "patient_column"}
    with pytest.raises(ConfigError, match="was made with --patient-column 'who'.*give it here too"):
        train(train_settings(**forgotten, run=tmp_path / "other"))
    torn = [f"{row},{('train', 'test')[i % 2]}" for i, row in enumerate(rows)]
    (data / "list.csv").write_text("\n".join(["file,label,who,split", *torn]))
    with pytest.raises(ImageSetError, match="patients have images in more than one split"):
        train(train_settings(**settings, run=tmp_path / "other"))
