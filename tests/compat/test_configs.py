"""The authors' Hydra configurations into ours."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import yaml

from fpt_fast.compat.configs import ReferenceSettings, read_reference_config
from fpt_fast.compat.hydra_files import ReferenceConfigError
from fpt_fast.config import AugmentConfig, ConfigError, TrainConfig, fpt, fpt_plus

NETWORKS: dict[str, dict[str, Any]] = {
    "FPT+": {
        "num_prompts": 16,
        "side_reduction_ratio": 8,
        "prompt_reduction_ratio": 1,
        "prompt_norm": True,
        "prompt_proj": False,
        "layers_to_extract": "6-11",
        "token_ratio": 0.2,
        "token_imp": "global",
        "side_input_size": 128,
        "pretrained_path": "google/vit-base-patch16-384",
    },
    "FPT": {
        "num_prompts": 16,
        "side_reduction_ratio": 8,
        "prompt_reduction_ratio": 8,
        "prompt_norm": False,
        "prompt_proj": True,
        "layers_to_extract": "0-11",
        "token_ratio": 0.2,
        "token_imp": "global",
        "side_input_size": 224,
        "pretrained_path": "google/vit-base-patch16-384",
    },
}
DDR: dict[str, Any] = {
    "name": "ddr",
    "data_path": "/data/DDR",
    "preload_path": "./preload_data/ddr",
    "save_path": "./runs/ddr",
    "input_size": 512,
    "num_classes": 5,
    "mean": [0.42, 0.26, 0.13],
    "std": [0.29, 0.2, 0.14],
    "learning_rate": 0.0005,
}
CUSTOM = DDR | {"num_classes": "???", "data_path": "???", "mean": "auto", "std": "auto"}
SOLVERS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": "ADAMW", "weight_decay": 0.1, "betas": [0.9, 0.999]},
    "sgd": {"optimizer": "SGD", "weight_decay": 0.00005, "momentum": 0.8, "nesterov": True},
}
AUGMENTATION: dict[str, Any] = {
    "horizontal_flip": {"prob": 0.5},
    "vertical_flip": {"prob": 0.5},
    "color_distortion": {
        "prob": 1.0,
        "brightness": 0.2,
        "contrast": 0.2,
        "saturation": 0,
        "hue": 0,
    },
    "random_crop": {"prob": 1.0, "scale": [0.8, 1.0], "ratio": [0.7, 1.3]},
    "value_fill": 0,
}
TRAIN: dict[str, Any] = {
    "epochs": 20,
    "batch_size": 16,
    "num_workers": 16,
    "criterion": "cross_entropy",
    "loss_weight": None,
    "loss_weight_decay_rate": 0,
    "warmup_epochs": 0,
    "metrics": ["acc", "auc"],
    "indicator": "auc",
    "save_interval": 10,
    "eval_interval": 1,
    "sample_view": False,
    "pin_memory": True,
}
BASE: dict[str, Any] = {
    "device": "cuda:0",
    "random_seed": -1,
    "cudnn_deterministic": False,
    "overwrite": False,
    "progress": True,
    "checkpoint": None,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Laid out as the authors' ``configs``."""
    root = tmp_path / "configs"
    files: dict[str, Any] = {
        "config": {
            "defaults": [
                "_self_",
                {"network": "FPT+"},
                {"dataset": "ddr"},
                {"solver": "adamw"},
                "data_config",
                "train_config",
            ],
            "base": BASE,
        },
        "data_config": {"data_augmentation_args": AUGMENTATION},
        "train_config": {"train": TRAIN},
        "dataset/ddr": DDR,
        "dataset/customized": CUSTOM,
        **{f"network/{name}": values for name, values in NETWORKS.items()},
        **{f"solver/{name}": values for name, values in SOLVERS.items()},
    }
    for name, values in files.items():
        path = root / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
    return root


def resolved(tmp_path: Path, **changes: object) -> ReferenceSettings:
    """Read a ``cfg.yaml`` as their training writes it, with ``group__key`` changed."""
    tree = deepcopy(
        {
            "base": BASE,
            "network": NETWORKS["FPT+"],
            "dataset": DDR,
            "solver": SOLVERS["adamw"],
            "data_augmentation_args": AUGMENTATION,
            "train": TRAIN,
        }
    )
    for key, value in changes.items():
        *groups, name = key.split("__")
        branch: Any = tree
        for group in groups:
            branch = branch[group]
        branch[name] = value
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(tree))
    return read_reference_config(tmp_path / "cfg.yaml")


def test_published_configuration_is_ours(folder: Path) -> None:
    settings = read_reference_config(folder)
    assert settings.method == fpt_plus(layers=(6, 7, 8, 9, 10, 11))
    expected = TrainConfig(learning_rate=0.0005, loss_weight_decay=0.0)
    assert settings.train == expected
    assert settings.augment == AugmentConfig()
    assert settings.backbone == "google/vit-base-patch16-384"
    assert settings.input_size == (512, 512)
    assert settings.mean == (0.42, 0.26, 0.13)
    assert settings.std == (0.29, 0.2, 0.14)
    assert settings.num_classes == 5
    assert (settings.data_path, settings.preload_path, settings.save_path) == (
        "/data/DDR",
        "./preload_data/ddr",
        "./runs/ddr",
    )


def test_choices_and_overrides(folder: Path) -> None:
    settings = read_reference_config(
        folder, ["network=FPT", "solver=sgd", "++train.batch_size=4", "train.epochs=3"]
    )
    assert settings.method == fpt(layers=tuple(range(12)))
    assert settings.train.optimizer == "sgd"
    assert settings.train.momentum == 0.8
    assert (settings.train.batch_size, settings.train.epochs) == (4, 3)
    assert any("Nesterov" in note for note in settings.notes)


def test_file_that_their_training_writes(tmp_path: Path, folder: Path) -> None:
    assert resolved(tmp_path) == read_reference_config(folder)


def test_values_left_open(folder: Path) -> None:
    settings = read_reference_config(folder, ["dataset=customized"])
    assert settings.num_classes is None
    assert settings.data_path is None
    assert settings.mean is None
    assert settings.std is None
    assert any("dataset.mean is 'auto'" in note for note in settings.notes)
    with pytest.raises(ReferenceConfigError, match="dataset.input_size must be set"):
        read_reference_config(folder, ["++dataset.input_size='???'"])


def test_notes_are_honest(tmp_path: Path) -> None:
    settings = resolved(
        tmp_path,
        base__seed=3,
        train__surprise=1,
        network__extra={"deep": 2},
        data_augmentation_args__color_distortion__hue=0.1,
        data_augmentation_args__random_crop__prob=0.5,
    )
    notes = "\n".join(settings.notes)
    for part in (
        "drop_last",
        "raw logits",
        "base.random_seed is negative",
        "base.seed is what the authors' README documents",
        "data_augmentation_args.vertical_flip is never applied",
        "color_distortion.hue 0.1 is not offered",
        "random_crop.prob 0.5 is not offered",
        "train.surprise is not a key",
        "network.extra.deep is not a key",
    ):
        assert part in notes
    assert "rotation" not in notes
    assert settings.augment.vertical_flip == 0.0


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("kappa_loss", "kappa"),
        ("focal_loss", "focal"),
        ("smooth_L1", "smooth_l1"),
        ("mean_square_error", "mean_square_error"),
    ],
)
def test_losses(tmp_path: Path, theirs: str, ours: str) -> None:
    assert resolved(tmp_path, train__criterion=theirs).train.loss == ours


def test_loss_weights(tmp_path: Path) -> None:
    dynamic = resolved(tmp_path, train__loss_weight="dynamic", train__loss_weight_decay_rate=0.97)
    assert (dynamic.train.loss_weight, dynamic.train.loss_weight_decay) == ("dynamic", 0.97)
    given = resolved(tmp_path, train__loss_weight=[1, 2, 3, 4, 5])
    assert given.train.loss_weights == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert any("silently ignored there" in note for note in given.notes)
    focal = resolved(tmp_path, train__loss_weight="balance", train__criterion="focal_loss")
    assert focal.train.loss_weight == "none"


def test_layers(tmp_path: Path) -> None:
    assert resolved(tmp_path, network__layers_to_extract=5).method.layers == (5,)
    assert resolved(tmp_path, network__layers_to_extract="1,4,7").method.layers == (1, 4, 7)
    unordered = resolved(tmp_path, network__layers_to_extract="7,4")
    assert unordered.method.layers == (4, 7)
    assert any("ascending order" in note for note in unordered.notes)


def test_seed(tmp_path: Path) -> None:
    settings = resolved(tmp_path, base__random_seed=7)
    assert settings.train.seed == 7
    assert not any("random_seed" in note for note in settings.notes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network__prompt_reduction_ratio": 4}, "prompt_reduction_ratio must be 1"),
        ({"network__token_imp": "best"}, "token_imp must be"),
        ({"network__prompt_norm": "yes"}, "prompt_norm must be true or false"),
        ({"network__layers_to_extract": "a,b"}, "layers_to_extract must be like"),
        ({"train__criterion": "hinge"}, "train.criterion must be one of"),
        ({"train__loss_weight": "heavy"}, "train.loss_weight must be"),
        ({"train__indicator": "luck"}, "train.indicator must be one of"),
        ({"solver__optimizer": "LION"}, "solver.optimizer must be one of"),
        ({"dataset__mean": [1, 2]}, "dataset.mean must be 'auto' or a list of three"),
        ({"dataset__data_path": "${oc.env:DATA}"}, "interpolations are not resolved"),
    ],
)
def test_values_that_cannot_work(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ReferenceConfigError, match=message):
        resolved(tmp_path, **changes)


def test_values_that_ours_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="token_ratio must be"):
        resolved(tmp_path, network__token_ratio=2.0)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("network", "must be like 'key=value'"),
        ("optimiser=sgd", "groups are dataset, network, solver"),
        ("base.device.index=0", "device is a value, not a group"),
    ],
)
def test_overrides_that_cannot_work(folder: Path, override: str, message: str) -> None:
    with pytest.raises(ReferenceConfigError, match=message):
        read_reference_config(folder, [override])


def test_files_that_are_not_there_or_not_sound(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_reference_config(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="FPT2"):
        read_reference_config(folder, ["network=FPT2"])
    (folder / "data_config.yaml").write_text("a: [")
    with pytest.raises(ReferenceConfigError, match="does not hold YAML"):
        read_reference_config(folder)
    (folder / "config.yaml").write_text("defaults: network")
    with pytest.raises(ReferenceConfigError, match="defaults must be a list"):
        read_reference_config(folder)
    (folder / "config.yaml").write_text("- a")
    with pytest.raises(ReferenceConfigError, match="must hold names with values"):
        read_reference_config(folder)


def test_a_group_cannot_leave_the_folder(folder: Path) -> None:
    (folder.parent / "secret.yaml").write_text("token: 1")
    with pytest.raises(ReferenceConfigError, match="must be a plain name"):
        read_reference_config(folder, ["network=../../secret"])
