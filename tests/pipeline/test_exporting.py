"""Exported classifiers, frozen model included, agree with PyTorch within the error budget."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch

from fpt_fast.config import ConfigError
from fpt_fast.images import read_image, to_network_input
from fpt_fast.model import FptModel
from fpt_fast.pipeline import (
    ExportSettings,
    Predictor,
    PreloadSettings,
    TrainSettings,
    export,
    preload,
    train,
)
from fpt_fast.pipeline.exporting import portable
from fpt_fast.pipeline.recorded import RecordedRun, read_recorded_run
from fpt_fast.records import Predictions
from fpt_fast.report import write_predictions
from fpt_fast.trust import finding_temperatures, fit_temperature
from helpers import assert_within_budget, spread_weights

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@dataclasses.dataclass(frozen=True)
class Subject:
    """A run whose model has strong weights, and many images for it, normalised."""

    run: Path
    recorded: RecordedRun
    paths: list[Path]
    inputs: tuple[torch.Tensor, torch.Tensor]


def make_subject(run: Path, data: Path) -> Subject:
    model = FptModel.from_pretrained(run / "best")
    spread_weights(model, scale=0.1)
    model.save_pretrained(run / "best", extra=model.extra)
    recorded = read_recorded_run(run)
    paths = sorted(data.rglob("*.png"))
    images = [read_image(path) for path in paths]
    plan = recorded.plan.preprocessing
    frozen = torch.stack([to_network_input(image, plan) for image in images])
    small = dataclasses.replace(plan, size=model.config.side_size)
    side = torch.stack([to_network_input(image, small) for image in images])
    # A budget is of the largest error: of many images, or it is a matter of luck.
    many = [(frozen.roll(shift, -1), side.roll(shift, -1)) for shift in range(32)]
    frozen, side = (torch.cat(parts) for parts in zip(*many, strict=True))
    return Subject(run, recorded, paths, (frozen, side))


@torch.no_grad()
def in_pytorch(subject: Subject, *, calibrated: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """What the classifier gives for the images in f32, and in f64."""
    settings = ExportSettings(run=subject.run, output=Path("unused"), calibrated=calibrated)
    frozen, side = subject.inputs
    exact = portable(subject.recorded, settings).double()
    exact.vit.embedding._cache.clear()
    oracle = exact(frozen.double(), side.double())
    return portable(subject.recorded, settings)(frozen, side), oracle


def export_and_check(
    subject: Subject, expected: tuple[torch.Tensor, torch.Tensor], settings: ExportSettings
) -> tuple[torch.Tensor, dict[str, Any]]:
    """What the file gives for the images, within the budget of what PyTorch gives, and its
    metadata."""
    result = export(settings)
    assert result.bytes == settings.output.stat().st_size > 100_000
    assert "MB, largest difference" in str(result)
    frozen, side = subject.inputs
    eager, oracle = expected
    if settings.format == "onnx":
        session = onnxruntime.InferenceSession(settings.output)
        feed = {"frozen_pixels": frozen.numpy(), "side_pixels": side.numpy()}
        [given] = session.get_outputs()
        assert given.shape[1:] == list(eager.shape[1:])
        out = torch.from_numpy(session.run(None, feed)[0])
        meta = json.loads(session.get_modelmeta().custom_metadata_map["fpt_fast"])
    else:
        extra = {"fpt_fast": ""}
        program = torch.export.load(settings.output, extra_files=extra)
        out = program.module()(frozen, side).detach()
        meta = json.loads(extra["fpt_fast"])
    assert_within_budget(out, oracle, eager)
    spread = float(oracle.std())
    assert result.difference < 1e-4 * max(1.0, spread)
    return out, meta


def list_with(data: Path, columns: dict[str, list[Any]]) -> Path:
    """A CSV list of the images of ``data`` in their splits, with these columns."""
    paths = sorted(data.rglob("*.png"))
    lines = [",".join(("path", "split", *columns))]
    for number, path in enumerate(paths):
        key = path.relative_to(data)
        cells = (key.as_posix(), key.parts[0], *(str(v[number]) for v in columns.values()))
        lines.append(",".join(cells))
    (data / "list.csv").write_text("\n".join(lines))
    return data / "list.csv"


FILES = (("onnx", "model.onnx"), ("program", "model.pt2"))


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_onnx_and_program_agree_with_eager(
    method: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    """Of images that are higher than wide; those below are square."""
    preload(preload_settings(method=method, input_size="64x40"))
    subject = make_subject(train(train_settings(method=method, epochs=1)).run, data)
    predicted = Predictor(subject.run, dtype="float32")(subject.paths).probabilities
    assert predicted is not None
    in_torch = in_pytorch(subject)
    for kind, name in FILES:
        settings = ExportSettings(run=subject.run, output=tmp_path / name, format=kind)  # type: ignore[arg-type]
        out, meta = export_and_check(subject, in_torch, settings)
        assert meta["classes"] == ["healthy", "mild", "severe"] and meta["output"] == "classes"
        assert tuple(meta["frozen_size"]) == subject.recorded.plan.preprocessing.size
        assert meta["calibrated"] is False
        # And all of them say what the online path says, which keeps nothing but f16 features.
        torch.testing.assert_close(out[: len(subject.paths)], predicted, rtol=0, atol=1e-3)


@pytest.mark.parametrize("task", ["classes", "findings"])
def test_a_calibrated_export_says_what_a_calibrated_predictor_says(
    task: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    listed: dict[str, Any] = {}
    if task == "findings":
        numbers = range(len(list(data.rglob("*.png"))))
        columns = {"mass": [n % 2 for n in numbers], "fluid": [n // 2 % 2 for n in numbers]}
        listed = {"data": list_with(data, columns), "label_columns": tuple(columns)}
    preload(preload_settings())
    subject = make_subject(train(train_settings(epochs=1, **listed)).run, data)
    # Validation images of which the temperatures are known to be far from 1, and apart.
    generator = torch.Generator().manual_seed(0)
    outputs = len(subject.recorded.classes)
    keys = tuple(f"{number}.png" for number in range(400))
    logits = torch.randn(400, outputs, generator=generator)
    if task == "findings":
        labels = (torch.rand(400, outputs, generator=generator) < logits.sigmoid()).long()
        logits = logits * torch.tensor([3.0, 0.5])
        validation = Predictions(keys, labels, logits, logits.sigmoid())
        expected = finding_temperatures(validation)
    else:
        labels = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
        validation = Predictions(keys, labels, 3 * logits, (3 * logits).softmax(1))
        expected = (fit_temperature(validation),)
    write_predictions(subject.run / "validation.csv", validation, subject.recorded.classes)
    plain, predicted = (
        Predictor(subject.run, dtype="float32", calibrated=c)(subject.paths).probabilities
        for c in (False, True)
    )
    assert plain is not None and predicted is not None
    assert float((plain - predicted).abs().max()) > 0.05
    in_torch = in_pytorch(subject, calibrated=True)
    # A program of one temperature for all classes differs in nothing from that of one a finding.
    for kind, name in FILES if task == "findings" else FILES[:1]:
        settings = ExportSettings(
            run=subject.run, output=tmp_path / name, format=kind, calibrated=True  # type: ignore[arg-type]
        )  # fmt: skip
        out, meta = export_and_check(subject, in_torch, settings)
        assert meta["temperatures"] == pytest.approx(expected, rel=1e-4)
        assert meta["calibrated"] is True and meta["output"] == task
        torch.testing.assert_close(out[: len(subject.paths)], predicted, rtol=0, atol=1e-3)
    # A plain export is calibrated by what stands in its metadata.
    out, meta = export_and_check(
        subject,
        in_pytorch(subject),
        ExportSettings(run=subject.run, output=tmp_path / "plain.onnx"),
    )
    assert meta["calibrated"] is False and meta["temperatures"] == pytest.approx(expected, rel=1e-4)
    temperatures = torch.tensor(meta["temperatures"], dtype=torch.float64)
    found = out[: len(subject.paths)].double()
    if task == "findings":
        scaled = (torch.logit(found) / temperatures).sigmoid()
    else:
        scaled = (found.log() / temperatures).softmax(1)
    torch.testing.assert_close(scaled.float(), predicted, rtol=0, atol=1e-3)


def test_a_number_is_exported_in_its_own_unit(
    preload_settings: MakePreload, train_settings: MakeTrain, data: Path, tmp_path: Path
) -> None:
    ages = [40 + 2.5 * number for number in range(len(list(data.rglob("*.png"))))]
    listed = {"data": list_with(data, {"age": ages}), "value_column": "age"}
    preload(preload_settings())
    subject = make_subject(train(train_settings(epochs=1, **listed)).run, data)
    predicted = Predictor(subject.run, dtype="float32")(subject.paths).logits
    assert subject.recorded.target is not None
    mean, deviation = subject.recorded.target
    assert mean > 40 and deviation > 5
    in_torch = in_pytorch(subject)
    for kind, name in FILES:
        settings = ExportSettings(run=subject.run, output=tmp_path / name, format=kind)  # type: ignore[arg-type]
        out, meta = export_and_check(subject, in_torch, settings)
        assert out.shape[1:] == (1,) and meta["output"] == "value" and meta["classes"] == ["age"]
        assert not {"calibrated", "temperatures", "grade_cuts"} & set(meta)
        off = (out[: len(subject.paths)].double() - predicted).abs().max()
        assert float(off) < 1e-3 * deviation < 0.1 * float(out.std())
    with pytest.raises(ConfigError, match="grades and numbers have none"):
        export(run=subject.run, output=tmp_path / "x.onnx", calibrated=True)


def test_what_cannot_be_exported(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1, fusion=False)).run
    with pytest.raises(ConfigError, match="no frozen model to export"):
        export(run=run, output=tmp_path / "x.onnx")
    (run / "validation.csv").unlink()
    with pytest.raises(ConfigError, match="no validation.csv to calibrate by"):
        export(run=run, output=tmp_path / "x.onnx", calibrated=True)
