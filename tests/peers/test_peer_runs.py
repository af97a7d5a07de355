"""Every peer through the command's own functions: trained, saved, evaluated, predicted."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from small_run import write_backbone

from fpt_fast.cli import main
from fpt_fast.config import PEER_METHODS, ConfigError, PeerMethod
from fpt_fast.model_files import ModelFileError
from fpt_fast.peers import PEERS, BackboneSource
from fpt_fast.peers.encoder import Encoder
from fpt_fast.pipeline import TrainSettings, evaluate, predict, share, train
from fpt_fast.trainer import step as training_step

# What keeps the golden model's side network as small as its heads allow.
CHANGES = {"side": {"side_reduction": 4}}


@pytest.mark.parametrize("method", PEERS)
def test_run_is_trained_evaluated_and_predicted_the_same(
    method: PeerMethod, peer_settings: Callable[..., TrainSettings]
) -> None:
    settings = peer_settings(method, **CHANGES.get(method, {}))
    result = train(settings)
    assert result.split == "test"
    assert {"config.yaml", "metrics.json", "report.html", "predictions.csv"} <= {
        path.name for path in result.run.iterdir()
    }
    again = evaluate(run=result.run)
    assert again.values == pytest.approx(result.metrics.values, nan_ok=True)

    images = sorted((settings.data / "test").rglob("*.png"))
    out = predict(run=result.run, images=tuple(images), output=settings.run / "predicted.csv")
    rows = {
        line.split(",")[0]: line.split(",")[3:]
        for line in (result.run / "predictions.csv").read_text().splitlines()[1:]
    }
    for item, probabilities in zip(
        out.predictions.keys, out.predictions.probabilities, strict=True
    ):
        key = Path(item).relative_to(settings.data).as_posix()
        expected = torch.tensor([float(value) for value in rows[key]])
        torch.testing.assert_close(probabilities, expected, atol=2e-5, rtol=0)


def test_a_run_from_flags_and_from_its_own_yaml(
    peer_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    base = peer_settings("linear")
    words = [
        *("train", "--method", "linear", "--data", base.data, "--backbone", base.backbone),
        *("--run", base.run, "--input-size", 48, "--epochs", 1, "--normalization", "backbone"),
    ]
    assert main([str(word) for word in words]) == 0
    config = yaml.safe_load((base.run / "config.yaml").read_text())
    assert config["settings"]["cache"] == "none"
    assert config["training"]["learning_rate"] == 1e-3
    second = tmp_path / "again"
    assert main(["train", "--config", str(base.run / "config.yaml"), "--run", str(second)]) == 0
    first, other = (load_file(run / "best" / "model.safetensors") for run in (base.run, second))
    assert first.keys() == other.keys()
    assert all(torch.equal(first[name], other[name]) for name in first)


def test_an_interrupted_run_is_resumed_to_the_same_bits(
    peer_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    settings = peer_settings("adapter", epochs=2, checkpoint_steps=1)
    train(settings)
    expected = load_file(settings.run / "last" / "model.safetensors")
    other = dataclasses.replace(settings, run=tmp_path / "stopped")
    with pytest.MonkeyPatch.context() as patch:
        step, count = training_step.step_once, [0]

        def stopping(*arguments):  # type: ignore[no-untyped-def]
            count[0] += 1
            if count[0] == 3:
                raise Killed
            return step(*arguments)

        patch.setattr(training_step, "step_once", stopping)
        with pytest.raises(Killed):
            train(other)
    train(dataclasses.replace(other, resume=True))
    resumed = load_file(other.run / "last" / "model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in expected.items())


class Killed(Exception):
    """A run that died."""


NONSENSE = [
    ("linear", {"cache": "features"}, "reads no feature cache"),
    ("linear", {"backbone": None}, "needs --backbone"),
    ("linear", {"token_ratio": 0.5}, "--token-ratio: belongs to FPT"),
    ("full", {"side_size": "24"}, "--side-size: belongs to FPT"),
    ("full", {"preset": "ddr"}, "give --learning-rate"),
    ("full", {"dtype": "bfloat16"}, "that of training is --precision"),
    ("full", {"rank": 4}, "rank belongs to method='lora'"),
    ("full", {"num_prompts": 4}, "num_prompts belongs to method='prompt'"),
    ("linear", {"gradient_checkpointing": True}, "saves nothing"),
    ("linear", {"input_size": "50"}, "multiple of the patch size"),
    (
        "fpt_plus",
        {"cache": "none", "gradient_checkpointing": True},
        "--gradient-checkpointing: bel",
    ),
    ("fpt_plus", {}, "needs --cache"),
]


@pytest.mark.parametrize(("method", "changes", "message"), NONSENSE)
def test_settings_that_would_do_nothing_are_refused(
    method: str,
    changes: dict[str, object],
    message: str,
    peer_settings: Callable[..., TrainSettings],
) -> None:
    settings = peer_settings(method, **changes)
    with pytest.raises(ConfigError, match=message):
        train(settings)
    assert not settings.run.exists()


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_reaches_the_blocks(
    precision: str, peer_settings: Callable[..., TrainSettings], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    run_block = Encoder.run_block

    def noting(encoder, block, x):  # type: ignore[no-untyped-def]
        out = run_block(encoder, block, x)
        seen.add((torch.is_grad_enabled(), x.dtype, block.qkv(block.norm1(x)).dtype))
        return out

    monkeypatch.setattr(Encoder, "run_block", noting)
    result = train(peer_settings("adapter", precision=precision, gradient_checkpointing=True))
    assert (True, torch.float32, getattr(torch, precision)) in seen
    saved = load_file(result.run / "best" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float32}


def test_every_named_method_is_there() -> None:
    assert set(PEERS) == set(PEER_METHODS)


@pytest.mark.parametrize("method", ["linear", "full"])
def test_a_run_loads_where_it_was_moved_to(
    method: str, peer_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    settings = peer_settings(method)
    run = train(settings).run
    assert str(tmp_path) not in (run / "best" / "config.json").read_text()
    images = (settings.data / "test",)
    expected = predict(
        run=run, images=images, output=tmp_path / "p.csv", overwrite=True
    ).predictions.probabilities
    there = tmp_path / "other" / "machine"
    there.mkdir(parents=True)
    for name in ("run", "golden-vit"):
        (tmp_path / name).rename(there / name)
    moved = predict(run=there / "run", images=images, output=tmp_path / "p.csv", overwrite=True)
    assert torch.equal(moved.predictions.probabilities, expected)
    (there / "golden-vit").rename(tmp_path / "put aside")
    was = re.escape(str(there / "golden-vit"))
    with pytest.raises(ModelFileError, match=f"{was}, which is not there; say .* --backbone"):
        predict(run=there / "run", images=images, output=tmp_path / "p.csv", overwrite=True)
    assert main(["evaluate", "--run", str(there / "run"), "--split", "val"]) == 1
    found = predict(
        run=there / "run", images=images, output=tmp_path / "p.csv", overwrite=True,
        backbone=str(tmp_path / "put aside"),
    )  # fmt: skip
    assert torch.equal(found.predictions.probabilities, expected)


def test_sources_are_kept_by_name_or_by_their_path_from_the_model(tmp_path: Path) -> None:
    weights, model = tmp_path / "weights" / "w.safetensors", tmp_path / "run" / "best"
    for path in (weights.parent, model):
        path.mkdir(parents=True)
    weights.touch()
    source = BackboneSource("vit_tiny_patch16_384", str(weights))
    kept = source.to_json(model)
    assert kept == {
        "source": "vit_tiny_patch16_384",
        "checkpoint_path": "../../weights/w.safetensors",
        "pretrained": True,
    }
    assert BackboneSource(**kept).find(model) == source
    inside = BackboneSource(str(model / "vit"))
    (model / "vit").mkdir()
    kept = inside.to_json(model)
    assert kept["source"] == "./vit" and BackboneSource(**kept).find(model) == inside
    # As earlier versions wrote it.
    assert inside.find(tmp_path) == inside
    weights.unlink()
    with pytest.raises(ModelFileError, match=r"w.safetensors, which are not there; .*checkpoint"):
        source.find(model)


def test_another_frozen_model_is_refused(
    peer_settings: Callable[..., TrainSettings], tmp_path: Path
) -> None:
    settings = peer_settings("linear")
    train(settings)
    other = write_backbone(tmp_path / "other", lambda w: w["vit.embeddings.cls_token"].add_(1.0))
    with pytest.raises(ModelFileError, match="other weights"):
        evaluate(run=settings.run, backbone=str(other))
    with pytest.raises(ConfigError, match="only models of FPT"):
        share(run=settings.run, output=tmp_path / "shared")
    described = json.loads((settings.run / "best" / "config.json").read_text())
    assert described["format"] == "fpt-fast peer 1"
