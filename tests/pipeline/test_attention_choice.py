"""The implementation of the frozen pass's attention: chosen, refused with reasons, recorded."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from pipeline.conftest import INPUT

from fpt_fast.backbone import BackboneError, load_backbone
from fpt_fast.cache import CacheReader
from fpt_fast.model import FptModel
from fpt_fast.pipeline import (
    PreloadSettings,
    TrainSettings,
    evaluate,
    predict,
    preload,
    repair,
    train,
)
from fpt_fast.selection import select_features
from helpers import relative_error, spread_weights, tiny_vit

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


@pytest.mark.parametrize("attention", ["native", "cpu", "blocked", "reference", "triton"])
def test_every_choice_gives_the_same_features(attention: str) -> None:
    model, pixels = spread_weights(tiny_vit(), scale=0.1), torch.randn(2, 3, 32, 40)
    kept = [
        select_features(
            load_backbone(model, dtype="float32", device="cpu", attention=name),  # type: ignore[arg-type]
            pixels,
            layers=(0, 2, 3),
            token_ratio=0.4,
            importance="global",
            dtype=torch.float32,
        )
        for name in ("auto", attention)
    ]
    assert torch.equal(kept[0].index, kept[1].index)
    assert relative_error(kept[1].kv, kept[0].kv) <= 1e-5


def test_the_choice_runs_in_every_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fpt_fast.ops import reference_ops

    calls: list[tuple[int, ...]] = []
    once = reference_ops.frozen_attention

    def count(*qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(tuple(qkv[0].shape))
        return once(*qkv)

    from fpt_fast.ops import implementation

    monkeypatch.setattr(reference_ops, "frozen_attention", count)
    implementation._load.cache_clear()
    try:
        backbone = load_backbone(tiny_vit(), device="cpu", attention="reference")
        for importance, layers in (("global", (1, 3)), ("class_token", (2, 3))):
            calls.clear()
            states = list(
                backbone.extract(torch.zeros(1, 3, 32, 32), layers, importance=importance)
            )  # type: ignore[arg-type]
            assert calls == [(1, 3, 17, 16)] * 3, "the last layer attends to nothing"
            has_lse = importance == "global"
            assert (states[0].lse is not None) == has_lse and states[0].scores is None
    finally:
        implementation._load.cache_clear()


def test_one_that_cannot_run_is_refused_with_reasons() -> None:
    with pytest.raises(BackboneError, match="attention='flash' does not run VisionTransformer in"):
        load_backbone(tiny_vit(), device="cpu", attention="flash")
    with pytest.raises(BackboneError, match="it runs on cuda tensors, got tensors on cpu"):
        load_backbone(tiny_vit(), device="cpu", attention="cudnn")
    with pytest.raises(
        BackboneError, match="impl must be 'auto' or one of 'native', 'cpu', 'flash'"
    ):
        load_backbone(tiny_vit(), device="cpu", attention="fastest")  # type: ignore[arg-type]


def test_what_ran_is_recorded_and_no_part_of_the_identity(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path, backbone: Path
) -> None:
    preload(preload_settings())
    with CacheReader(tmp_path / "cache") as reader:
        assert reader.notes["attention"] == "native" and "attention" not in reader.fingerprint
    assert preload(preload_settings(attention="blocked")).computed == 0
    live = {"cache": "none", "backbone": str(backbone), "input_size": INPUT}
    result = train(train_settings(**live, attention="blocked"))
    recorded = yaml.safe_load((result.run / "config.yaml").read_text())
    assert recorded["settings"]["attention"] == "blocked"
    assert FptModel.from_pretrained(result.run / "best").extra["features"]["attention"] == "blocked"


def test_calls_that_run_the_frozen_model_take_the_setting(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
    data: Path,
    backbone: Path,
) -> None:
    refused = "attention='flash' does not run"
    with pytest.raises(BackboneError, match=refused):
        preload(preload_settings(attention="flash"))
    preload(preload_settings())
    with pytest.raises(BackboneError, match=refused):
        repair(data=data, cache=tmp_path / "cache", backbone=str(backbone), attention="flash")
    live = train_settings(cache="none", backbone=str(backbone), input_size=INPUT, epochs=1)
    with pytest.raises(BackboneError, match=refused):
        train(
            cache="none", backbone=str(backbone), data=data, run=tmp_path / "x", attention="flash"
        )
    run = train(live).run
    with pytest.raises(BackboneError, match=refused):
        evaluate(run=run, attention="flash")
    with pytest.raises(BackboneError, match=refused):
        predict(run=run, images=(data / "test",), output=tmp_path / "o.csv", attention="flash")
