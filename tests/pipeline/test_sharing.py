"""``fpt-fast share``: what strangers get predicts the same, says what it is, and tells no paths."""

import contextlib
import csv
import io
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from fpt_fast.backbone import BackboneError
from fpt_fast.cli import main
from fpt_fast.config import ConfigError
from fpt_fast.hub import HubError, is_repository
from fpt_fast.model import FptModel
from fpt_fast.pipeline import PreloadSettings, TrainSettings, predict, preload, share, train
from fpt_fast.pipeline.sharing import _base_model


@pytest.fixture
def run(
    train_settings: Callable[..., TrainSettings], preload_settings: Callable[..., PreloadSettings]
) -> Path:
    preload(preload_settings())
    return train(train_settings(epochs=1)).run


class Hub:
    """``huggingface_hub`` as far as sharing needs it, on a folder of this machine."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.private: bool | None = None
        self.message = ""
        self.refuses = False

    def install(self, patch: pytest.MonkeyPatch) -> "Hub":
        import huggingface_hub

        hub = self

        class Api:
            def __init__(self, token: str | None = None) -> None:
                pass

            def create_repo(self, name: str, *, private: bool, **_: Any) -> Any:
                if hub.refuses:
                    raise PermissionError("403 Forbidden\nRequest id: 1")
                hub.private = private
                (hub.root / name).mkdir(parents=True, exist_ok=True)
                return type("Made", (), {"repo_id": name})()

            def upload_folder(self, *, repo_id: str, folder_path: str, **more: Any) -> None:
                hub.message = more["commit_message"]
                for path in Path(folder_path).iterdir():
                    (hub.root / repo_id / path.name).write_bytes(path.read_bytes())

        def download(name: str, *, revision: str, allow_patterns: list[str], **_: Any) -> str:
            if not (hub.root / name).is_dir() or revision not in (None, "main"):
                raise FileNotFoundError(f"404: {name} at {revision}")
            assert {path.name for path in (hub.root / name).iterdir()} <= set(allow_patterns)
            return str(hub.root / name)

        patch.setattr(huggingface_hub, "HfApi", Api)
        patch.setattr(huggingface_hub, "snapshot_download", download)
        return self


def probabilities(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def predictions(model: Path, run: Path, output: str) -> list[dict[str, str]]:
    images = (run.parent / "images" / "test",)
    backbone = str(run.parent / "golden-vit")
    path = run.parent / output
    predict(run=model, images=images, output=path, backbone=backbone)
    return probabilities(path)


def test_a_shared_folder_predicts_as_the_run_and_tells_no_paths(run: Path) -> None:
    folder = run.parent / "shared"
    assert share(run=run, output=folder, data_set="Bars of three colours.").folder == folder
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "metrics.json")
    }
    for path in folder.iterdir():
        assert str(run.parent).encode() not in path.read_bytes(), path.name
    assert predictions(folder, run, "theirs.csv") == predictions(run, run, "ours.csv")
    assert FptModel.from_pretrained(folder).extra["classes"] == ["healthy", "mild", "severe"]


def test_a_shared_folder_is_calibrated_as_the_run_is(run: Path) -> None:
    folder = run.parent / "shared"
    share(run=run, output=folder)
    assert not (folder / "validation.csv").exists()
    images, backbone = (run.parent / "images" / "test",), str(run.parent / "golden-vit")
    ours, theirs, plain = (
        predict(
            run=model,
            images=images,
            output=run.parent / "p.csv",
            overwrite=True,
            backbone=backbone,
            calibrated=c,
        ).predictions.probabilities
        for model, c in ((run, True), (folder, True), (folder, False))
    )
    assert ours is not None and theirs is not None and plain is not None
    assert torch.equal(ours, theirs) and not torch.equal(theirs, plain)
    with pytest.raises(BackboneError, match="frozen model of the run, golden-vit, .*--backbone"):
        predict(run=folder, images=images, output=run.parent / "p.csv", overwrite=True)
    [temperature] = FptModel.from_pretrained(folder).extra["temperatures"]
    text = (folder / "README.md").read_text()
    assert f"at the temperature, fitted on the validation images: {temperature:.4f}" in text
    errors = json.loads((run / "metrics.json").read_text())["calibration"]
    assert f"{errors['plain']['ece']:.3f} plain, {errors['scaled']['ece']:.3f} calibrated" in text
    (run / "validation.csv").unlink()
    share(run=run, output=run.parent / "uncalibrated")
    assert "not calibrated." in (run.parent / "uncalibrated" / "README.md").read_text()
    with pytest.raises(ConfigError, match="validation.csv to calibrate by"):
        predict(run=run.parent / "uncalibrated", images=images, output=run.parent / "q.csv",
                backbone=backbone, calibrated=True)  # fmt: skip


def test_the_card(run: Path) -> None:
    folder = run.parent / "shared"
    share(run=run, output=folder, license="apache-2.0", intended_use="Counting bars.", name="Bars")
    text = (folder / "README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    metrics = json.loads((run / "metrics.json").read_text())
    [result] = front["model-index"][0]["results"]
    assert {"type": "auc", "value": round(metrics["auc"], 4)} in result["metrics"]
    assert front["license"] == "apache-2.0" and front["library_name"] == "fpt-fast"
    low, high = metrics["intervals"]["values"]["auc"]
    assert f"| auc | {metrics['auc']:.3f} | {low:.3f} to {high:.3f} |" in text
    for part in (
        *(
            "# Bars",
            "Counting bars.",
            "Nothing here is a medical device",
            "did not name the data set",
        ),
        *("48x48 px", "healthy", "learning_rate: ", "not part of these files"),
        *("images are brought to it by: stretching", "window of grey images: file"),
        *("side network's input: 24x24 px", "betas: 0.9, 0.999", "a folder named golden-vit"),
    ):
        assert part in text, part
    for part in ("momentum", "target", "None", "loss_weight_decay"):
        assert part not in text.split("## Training")[1], part
    # The frozen model came from a folder: there is no repository to point to.
    assert "base_model" not in front
    weights = FptModel.from_pretrained(folder).spec.weights_hash
    assert weights in text


def used_as_the_card_says(folder: Path, image: Path, backbone: Path) -> str:
    """What the code in a card prints for an image, run where the shared folder is."""
    text = (folder / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", text, re.S)
    for written, own in (("FOLDER OF golden-vit", str(backbone)), ('"FOLDER"', f'"{folder}"')):
        assert written in code
        code = code.replace(written, own)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code.replace("image.png", str(image)), "README.md", "exec"), {})
    command = next(line for line in text.splitlines() if line.startswith("fpt-fast predict"))
    words = shlex.split(command.replace("FOLDER OF golden-vit", str(backbone)))[1:]
    words[words.index("FOLDER")] = str(folder)
    words[words.index("IMAGES")] = str(image)
    words[words.index("predictions.csv")] = str(folder / "predictions.csv")
    assert main(words) == 0
    return said.getvalue()


@pytest.mark.parametrize("kind", ["classes", "grades", "numbers"])
def test_the_code_in_the_card_runs(
    kind: str, run: Path, train_settings: Callable[..., TrainSettings], data: Path
) -> None:
    image, folder = sorted((data / "test").rglob("*.png"))[0], run.parent / "shared"
    if kind == "grades":
        run = train(train_settings(loss="smooth_l1", run=run.parent / kind)).run
    elif kind == "numbers":
        keys = [path.relative_to(data) for path in sorted(data.rglob("*.png"))]
        lines = [f"{key.as_posix()},{key.parts[0]},{9 + 2 * n}" for n, key in enumerate(keys)]
        (data / "ages.csv").write_text("\n".join(["path,split,age", *lines]))
        listed = {"data": data / "ages.csv", "value_column": "age"}
        run = train(train_settings(**listed, run=run.parent / kind)).run
    share(run=run, output=folder)
    said = used_as_the_card_says(folder, image, run.parent / "golden-vit").split()
    [row] = csv.DictReader((folder / "predictions.csv").open())
    if kind == "classes":
        assert said[::2] == ["healthy:", "mild:", "severe:"]
        told = [float(row[f"probability_{name}"]) for name in ("healthy", "mild", "severe")]
        assert [float(value) for value in said[1::2]] == pytest.approx(told, abs=6e-4)
    elif kind == "grades":
        assert said[0] == row["predicted"] and float(said[1]) == pytest.approx(
            float(row["grade"]), abs=6e-3
        )
    else:
        assert said[0] == "age" and float(said[1]) == pytest.approx(float(row["value_age"]))


def test_up_to_the_hub_and_down_again(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(tmp_path / "hub").install(monkeypatch)
    assert main(["share", "--run", str(run), "--repo", "lab/bars"]) == 0
    assert "https://huggingface.co/lab/bars" in capsys.readouterr().out
    assert hub.private is True and run.name in hub.message
    fetched = FptModel.from_pretrained("lab/bars", revision="main").state_dict()
    own = FptModel.from_pretrained(run / "best").state_dict()
    assert all(torch.equal(fetched[name], own[name]) for name in own)
    assert predictions(Path("lab/bars"), run, "theirs.csv") == predictions(run, run, "ours.csv")
    with pytest.raises(HubError, match=r"cannot fetch lab/bars \(FileNotFoundError: 404"):
        FptModel.from_pretrained("lab/bars", revision="v2")
    hub.refuses = True
    with pytest.raises(HubError, match=r"403 Forbidden\). Log in with"):
        share(run=run, repo="lab/bars")


def test_what_cannot_be_shared(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="say where to: --output FOLDER, --repo OWNER/NAME"):
        share(run=run)
    with pytest.raises(FileExistsError, match=r"is not empty and has no README.md; it will not be"):
        share(run=run, output=run.parent / "images", overwrite=True)
    with pytest.raises(HubError, match="a repository is named owner/name, got 'bars'"):
        share(run=run, repo="bars")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(HubError, match=r"pip install 'fpt-fast\[hub\]'"):
        share(run=run, repo="lab/bars")
    (run / "metrics.json").unlink()
    with pytest.raises(ConfigError, match="is not a finished run"):
        share(run=run, output=run.parent / "shared")


def test_what_was_shared_is_replaced_where_that_is_asked_for(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "shared"
    share(run=run, output=folder, name="first")
    first = (folder / "README.md").read_text()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="replace them all with --overwrite"):
        share(run=run, output=folder)
    with monkeypatch.context() as patch:
        patch.setattr("fpt_fast.pipeline.sharing.model_card", lambda facts: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            share(run=run, output=folder, overwrite=True)
    assert (folder / "README.md").read_text() == first and (folder / "notes.txt").is_file()
    share(run=run, output=folder, name="second", overwrite=True)
    assert (folder / "README.md").read_text() != first and not (folder / "notes.txt").exists()
    # What is complete is not lost with the hub.
    with pytest.raises(HubError, match="named owner/name"):
        share(run=run, output=tmp_path / "kept", repo="bars")
    assert (tmp_path / "kept" / "README.md").is_file()


def test_what_is_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_repository("lab/bars") and is_repository("a.b/c-d_e")
    Path("SWEEP").mkdir()
    for name in (
        "SWEEP/best",
        "bars",
        "a/b/c",
        "/lab/bars",
        "./bars",
        "../bars",
        "lab/.hidden",
        "",
    ):
        assert not is_repository(name), name
    Path("lab/bars").mkdir(parents=True)
    assert not is_repository("lab/bars")


@pytest.mark.parametrize(
    ("source", "pretrained", "repository"),
    [
        ("vit_base_patch16_384", True, "timm/vit_base_patch16_384"),
        ("hf-hub:lab/vit", True, "lab/vit"),
        ("/data/vit", True, ""),
        ("vit_base_patch16_384", False, ""),
    ],
)
def test_the_frozen_models_repository(source: str, pretrained: bool, repository: str) -> None:
    assert _base_model({"source": source, "pretrained": pretrained}) == repository
