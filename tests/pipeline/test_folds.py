"""Cross-validation: each image is tested once a division, on one cache, and patients stay whole."""

from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from fpt_fast.config import ConfigError
from fpt_fast.images import ImageSetError, load_image_set
from fpt_fast.pipeline import (
    Predictor,
    PreloadSettings,
    TrainSettings,
    evaluate,
    explain,
    preload,
    sweep,
    train,
)
from fpt_fast.report import read_predictions


def test_folds_are_equal_disjoint_and_whole(data: Path) -> None:
    seen: Counter[str] = Counter()
    for number in range(1, 5):
        images = load_image_set(data, fold=f"{number}/4", patient_pattern=r"(\d)\.png")
        sides: dict[str | None, set[str]] = defaultdict(set)
        for item in images.items:
            sides[item.patient].add(item.split)
        assert all(len(found) == 1 for found in sides.values())
        assert images.of_split("train") and images.of_split("val")
        seen.update(item.key for item in images.of_split("test"))
    assert set(seen.values()) == {1} and len(seen) == 24
    sizes = [len(load_image_set(data, fold=f"{n}/4").of_split("test")) for n in range(1, 5)]
    assert sizes == [6, 6, 6, 6]
    other = load_image_set(data, fold="1/4", seed=1)
    assert other.of_split("test") != load_image_set(data, fold="1/4").of_split("test")
    for wrong in ("0/4", "5/4", "1/1", "two"):
        with pytest.raises(ImageSetError, match="fold must be like 2/5"):
            load_image_set(data, fold=wrong)
    with pytest.raises(ImageSetError, match="25 folds need"):
        load_image_set(data, fold="1/25")


def test_a_sweep_over_folds_shares_a_cache_and_sums_up(
    preload_settings: Callable[..., PreloadSettings],
    train_settings: Callable[..., TrainSettings],
    tmp_path: Path,
) -> None:
    settings = preload_settings()
    preload(settings)
    shared = {
        "data": settings.data, "cache": str(settings.cache), "epochs": 1, "batch_size": 8,
        "workers": 2, "side_size": "24", "report_images": 0,
    }  # fmt: skip
    run = tmp_path / "cv"
    swept = sweep(**shared, run=run, prompts="3", learning_rate="1e-2", folds=2, repeats=2)
    assert len(swept.rows) == 4 and "±" in str(swept)
    assert (run / "summary.md").is_file() and (run / "sweep.csv").is_file()
    for repeat in (1, 2):
        keys: Counter[str] = Counter()
        for number in (1, 2):
            [model] = [p for p in (run / f"repeat-{repeat}-fold-{number}").iterdir() if p.is_dir()]
            predictions, _ = read_predictions(model / "predictions.csv")
            keys.update(predictions.keys)
        assert set(keys.values()) == {1} and len(keys) == 24
    # All of them are an ensemble; to evaluate, one must be named.
    assert len(Predictor(run, backbone=str(tmp_path / "golden-vit")).runs) == 4
    for several in (run, run / "repeat-1-fold-1"):
        with pytest.raises(ConfigError, match=r"name one of its models: .*repeat-1-fold-1"):
            evaluate(run=several)
    with pytest.raises(ConfigError, match=r"holds no trained model: .*name one of its models"):
        explain(run=run, images=[settings.data / "test"], output=None)
    # A model of a fold knows its own split.
    assert evaluate(run=model, resamples=0).values == pytest.approx(swept.rows[-1].metrics)
    alone = train(train_settings(fold="2/2", split_seed=1, epochs=1, batch_size=8, order_seed=0))
    for name, value in swept.rows[-1].metrics.items():
        assert alone.metrics[name] == pytest.approx(value, abs=1e-4)
    with pytest.raises(ConfigError, match="at least 2"):
        sweep(**shared, run=tmp_path / "x", folds=1)
