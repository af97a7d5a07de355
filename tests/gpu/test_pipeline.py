"""The frozen pass and the four calls on a GPU: what a CPU keeps, and the same losses twice."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import write_backbone

from fpt_fast.backbone import load_backbone
from fpt_fast.pipeline import evaluate, predict, preload, train
from fpt_fast.selection import select_features
from helpers import tiny_vit, write_image_set

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_frozen_pass_keeps_what_the_cpu_keeps(dtype: str, device: torch.device) -> None:
    model = tiny_vit()
    pixels = torch.randn(2, 3, 64, 48)
    wanted = {"layers": (1, 3), "token_ratio": 0.3, "importance": "global"}
    on_cpu = load_backbone(model, dtype="float32", device="cpu")
    on_gpu = load_backbone(model, dtype=dtype, device=str(device))
    expected, got = (select_features(backbone, pixels, **wanted) for backbone in (on_cpu, on_gpu))  # type: ignore[arg-type]
    common = (got.index.cpu()[..., None] == expected.index[..., None, :]).any(-1).float().mean()
    assert float(common) >= (0.99 if dtype == "float32" else 0.9)


@pytest.mark.usefixtures("device")
def test_the_four_calls(tmp_path: Path) -> None:
    data = write_image_set(tmp_path / "images")
    backbone = write_backbone(tmp_path / "vit")
    cache, run = tmp_path / "cache", tmp_path / "run"
    preload(
        data=data, backbone=str(backbone), cache=cache, input_size="48", normalization="backbone"
    )
    result = train(data=data, cache=str(cache), run=run, side_size="24", epochs=2, batch_size=5)
    assert torch.isfinite(torch.tensor([epoch.loss for epoch in result.history.epochs])).all()
    again = evaluate(run=run)
    assert again.values["auc"] == pytest.approx(result.metrics.values["auc"], abs=1e-6)
    predicted = predict(run=run, images=(data / "test",), output=tmp_path / "out.csv")
    assert len(predicted.predictions.keys) == 6


@pytest.mark.usefixtures("device")
def test_training_repeats_bit_for_bit(tmp_path: Path, make_image_set: Callable[..., Path]) -> None:
    data = make_image_set()
    cache = tmp_path / "cache"
    preload(
        data=data,
        backbone=str(write_backbone(tmp_path / "vit")),
        cache=cache,
        input_size="48",
        normalization="backbone",
    )
    losses = [
        [
            epoch.loss
            for epoch in train(
                data=data, cache=str(cache), run=tmp_path / name, side_size="24", epochs=2
            ).history.epochs
        ]
        for name in ("a", "b")
    ]
    assert losses[0] == losses[1]
