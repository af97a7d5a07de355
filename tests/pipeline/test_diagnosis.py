"""``fpt-fast doctor`` on data, cache and run: healthy ones, and each with a planted fault."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.pipeline import PreloadSettings, TrainSettings, compare, doctor, preload, train


@pytest.fixture
def run(
    train_settings: Callable[..., TrainSettings], preload_settings: Callable[..., PreloadSettings]
) -> Path:
    preload(preload_settings())
    return train(train_settings(epochs=2)).run


def data_of(run: Path) -> Path:
    return run.parent / "images"


def errors(**where: Path) -> list[str]:
    return [str(f) for f in doctor(**where).findings if f.severity == "error"]


def test_a_healthy_run_brings_its_data_and_cache(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    diagnosis = doctor(run=run)
    assert diagnosis.ok, str(diagnosis)
    assert [line.split(":")[0] for line in diagnosis.looked_at] == ["run", "data", "cache"]
    assert main(["doctor", "--run", str(run)]) == 0
    assert "fewer than 10 images" in capsys.readouterr().out


def test_changed_missing_and_damaged(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, cache = data_of(run), run.parent / "cache"
    images = sorted((data / "train").rglob("*.png"))
    shutil.copy(images[0], images[0].with_name("copy.png"))
    lacking, leak = errors(data=data, cache=cache), errors(data=data)
    assert "the cache lacks 1 of" in lacking[0] and "copy.png" in lacking[0]
    assert leak == []
    shutil.copy(images[0], data / "test" / images[0].parent.name / "copy.png")
    assert "more than one split" in errors(data=data)[0]
    assert main(["doctor", "--data", str(data)]) == 1
    assert "-> keep each picture in one split only" in capsys.readouterr().out
    shutil.copy(images[1], images[0])
    assert any(
        images[0].name in text and "not those that the features were made from" in text
        for text in errors(run=run)
    )
    shard = max(cache.rglob("*"), key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[-5000] ^= 1
    shard.write_bytes(content)
    assert "of the cache 1 record is not what was written" in errors(cache=cache)[0]


def test_a_run_that_went_wrong(run: Path) -> None:
    metrics = json.loads((run / "metrics.json").read_text())
    metrics |= {"monitor": "auc", "best_value": 0.5, "best_epoch": 0}
    (run / "metrics.json").write_text(json.dumps(metrics))
    (run / "history.csv").write_text(
        "epoch,loss,learning_rate,seconds,val_loss\n0,1,1e-3,1,1\n1,1.1,1e-3,1,1.1\n2,1.2,0,1,2\n"
    )
    rows = list(csv.DictReader((run / "predictions.csv").open()))
    with (run / "predictions.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(row | {"predicted": "mild"} for row in rows)
    text = str(doctor(run=run))
    for part in ("did not fall (1 -> 1.2)", "by heart", "no better than chance", "as 'mild'"):
        assert part in text
    (run / "history.csv").write_text("epoch,loss,learning_rate,seconds\n0,nan,1e-3,1\n")
    assert "the training loss is not finite" in str(doctor(run=run))
    (run / "history.csv").unlink()
    assert "--resume" in str(doctor(run=run))


def test_runs_are_compared_by_what_their_tables_hold(run: Path, tmp_path: Path) -> None:
    comparison = compare(run, run, resamples=20, output=tmp_path / "comparison.json")
    # predictions.csv holds probabilities: an AUC on logits made from them would be another one.
    assert "auc" in comparison.first and "auc_raw_logits" not in comparison.first
    assert "auc_raw_logits" not in (tmp_path / "comparison.json").read_text()
    with pytest.raises(ConfigError, match="nothing: there is no such folder"):
        compare(run, tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"has no predictions\.csv; make it first: train it"):
        compare(tmp_path, run)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give --data, --cache or --run"):
        doctor()
    assert "no such file or directory" in errors(data=tmp_path / "nothing")[0]
    assert errors(cache=tmp_path / "nothing")
