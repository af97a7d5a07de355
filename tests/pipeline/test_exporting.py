"""Exported classifiers, frozen model included, agree with PyTorch within the error budget."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

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
from fpt_fast.pipeline.recorded import read_recorded_run
from helpers import assert_within_budget, spread_weights

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
@pytest.mark.parametrize("size", ["48", "64x40"])
def test_onnx_and_program_agree_with_eager(
    method: str,
    size: str,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    preload(preload_settings(method=method, input_size=size))
    run = train(train_settings(method=method, epochs=1)).run
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
    for kind, name in (("onnx", "model.onnx"), ("program", "model.pt2")):
        settings = ExportSettings(run=run, output=tmp_path / name, format=kind)  # type: ignore[arg-type]
        result = export(settings)
        assert result.bytes == (tmp_path / name).stat().st_size > 100_000
        assert result.difference < 1e-4
        assert "MB, largest difference" in str(result)
        module = portable(recorded, settings)
        with torch.no_grad():
            eager = module(frozen, side)
            exact = portable(recorded, settings).double()
            exact.vit.embedding._cache.clear()
            oracle = exact(frozen.double(), side.double())
        if kind == "onnx":
            session = onnxruntime.InferenceSession(tmp_path / name)
            feed = {"frozen_pixels": frozen.numpy(), "side_pixels": side.numpy()}
            out = torch.from_numpy(session.run(None, feed)[0])
            meta = json.loads(session.get_modelmeta().custom_metadata_map["fpt_fast"])
        else:
            extra = {"fpt_fast": ""}
            program = torch.export.load(tmp_path / name, extra_files=extra)
            out = program.module()(frozen, side).detach()
            meta = json.loads(extra["fpt_fast"])
        assert_within_budget(out, oracle, eager)
        assert meta["classes"] == ["healthy", "mild", "severe"]
        assert tuple(meta["frozen_size"]) == plan.size
        # And all of them say what the online path says, which keeps nothing but f16 features.
        predicted = Predictor(run, dtype="float32")(paths).probabilities
        assert predicted is not None
        torch.testing.assert_close(out[: len(paths)], predicted, rtol=0, atol=1e-3)


def test_what_cannot_be_exported(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    run = train(train_settings(epochs=1, fusion=False)).run
    with pytest.raises(ConfigError, match="no frozen model to export"):
        export(run=run, output=tmp_path / "x.onnx")
