"""Presets, validation with reasons, JSON round trips."""

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fpt_fast.config import (
    METHODS,
    REGRESSION_LOSSES,
    AugmentConfig,
    ConfigError,
    FptConfig,
    TrainConfig,
    check_divides,
    format_layers,
    fpt,
    fpt_plus,
    parse_layers,
    preset,
)
from fpt_fast.records import ImageItem, ImageSet
from helpers import VIT_B


def test_fpt_plus_is_the_published_one() -> None:
    config = fpt_plus()
    assert config == FptConfig()
    assert config.resolve_layers(12) == (6, 7, 8, 9, 10, 11)
    assert (config.side_size, config.num_prompts, config.token_ratio) == ((128, 128), 16, 0.2)
    assert (config.prompt_dim, config.prompt_norm, config.prompt_proj) == ("frozen", True, False)
    assert (config.importance, config.fusion_dropout, config.side_reduction) == ("global", 0.5, 8)


def test_fpt_is_the_published_one() -> None:
    config = fpt()
    assert config.resolve_layers(12) == tuple(range(12))
    assert (config.side_size, config.num_prompts, config.token_ratio) == ((224, 224), 16, 0.2)
    assert (config.prompt_dim, config.prompt_norm, config.prompt_proj) == ("side", False, True)


def test_training_defaults_are_the_published_recipe() -> None:
    config = TrainConfig()
    assert (config.epochs, config.batch_size, config.weight_decay) == (20, 16, 0.1)
    assert (config.optimizer, config.betas, config.clip_norm) == ("adamw", (0.9, 0.999), 1.0)
    assert (config.warmup_epochs, config.loss, config.monitor) == (0, "cross_entropy", "auc")


def test_augmentation_defaults_are_the_published_ones() -> None:
    config = AugmentConfig()
    assert (config.horizontal_flip, config.vertical_flip) == (0.5, 0.0)
    assert (config.brightness, config.contrast) == (0.2, 0.2)
    assert (config.crop_area, config.crop_ratio) == ((0.8, 1.0), (0.7, 1.3))


@pytest.mark.parametrize("method", METHODS)
def test_preset_by_name_takes_changes(method: str) -> None:
    config = preset(method, num_prompts=3, layers=[1, 2], side_size=[32, 64])
    assert (config.method, config.num_prompts) == (method, 3)
    assert config.layers == (1, 2) and config.side_size == (32, 64)


def test_unknown_method_and_unknown_key_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"one of fpt_plus, fpt, got 'lora'"):
        preset("lora")
    with pytest.raises(ConfigError, match=r"unknown key 'prompts' for FptConfig; known are .*num_"):
        fpt_plus(prompts=3)
    with pytest.raises(ConfigError, match="unknown key 'lr' for TrainConfig"):
        TrainConfig.from_json({"lr": 1e-3})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "lora"}, "method must be one of"),
        ({"token_ratio": 0.0}, "token_ratio must be above 0"),
        ({"token_ratio": 1.5}, "at most 1, got 1.5"),
        ({"importance": "mean"}, "importance must be 'global' or 'class_token'"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"prompt_dim": "wide"}, "prompt_dim must be"),
        ({"prompt_dim": "side"}, "prompt_proj must be True when prompt_dim is 'side'"),
        ({"side_reduction": 0}, "side_reduction must be"),
        ({"side_size": (0, 128)}, "side_size must be"),
        ({"side_size": (128,)}, "side_size must be"),
        ({"fusion_dropout": 1.0}, "fusion_dropout must be in"),
        ({"layers": ()}, "layers must be at least one layer"),
        ({"layers": (2, 1)}, "layers must be ascending"),
        ({"layers": (1, 1)}, "without repeats"),
        ({"layers": (-1, 2)}, "none below 0"),
    ],
)
def test_impossible_method_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fpt_plus(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs must be at least 1"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"eval_interval": 0}, "eval_interval must be"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": float("nan")}, "learning_rate must be above 0"),
        ({"clip_norm": -1.0}, "clip_norm must be"),
        ({"weight_decay": -0.1}, "weight_decay must be"),
        ({"warmup_epochs": -1}, "warmup_epochs must be"),
        ({"loss_weight": "given"}, "loss_weights must be one weight per class"),
        ({"loss_weights": (1.0, 2.0)}, "loss_weights must be"),
        ({"loss": "kappa", "loss_weight": "balance"}, "goes with loss='cross_entropy'"),
    ],
)
def test_impossible_training_says_why(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"horizontal_flip": 1.5},
        {"vertical_flip": -0.1},
        {"brightness": 2.0},
        {"contrast": -1.0},
        {"crop_area": (0.0, 1.0)},
        {"crop_area": (0.5, 1.1)},
        {"crop_ratio": (1.3, 0.7)},
    ],
)
def test_impossible_augmentation_names_the_field(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(changes))):
        AugmentConfig(**changes)  # type: ignore[arg-type]


def test_configurations_are_frozen() -> None:
    for config in (fpt_plus(), TrainConfig(), AugmentConfig()):
        name = dataclasses.fields(config)[0].name
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, None)


@pytest.mark.parametrize("config", [fpt_plus(), fpt(layers=(0, 3), side_size=(96, 128))])
def test_method_survives_json(config: FptConfig) -> None:
    assert FptConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_recipe_survives_json() -> None:
    config = TrainConfig(loss_weight="given", loss_weights=(1.0, 2.5), betas=(0.8, 0.99), epochs=3)
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_regression_is_told_by_the_loss() -> None:
    assert all(TrainConfig(loss=loss).is_regression for loss in REGRESSION_LOSSES)
    assert not TrainConfig(loss="focal").is_regression


def test_layers_beyond_the_model_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"layers must be below 12.*got 10-12; name layers"):
        fpt_plus(layers=(10, 11, 12)).resolve_layers(12)


@pytest.mark.parametrize("config", [fpt_plus(), fpt()])
def test_presets_fit_vit_base(config: FptConfig) -> None:
    config.check_against(VIT_B)


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (fpt_plus(layers=(12,)), {}, "layers must be below 12"),
        (fpt_plus(side_reduction=7), {}, "side_reduction must divide the frozen width 768"),
        (fpt_plus(side_reduction=96), {}, "768/96 = 8 must be a multiple of .* 12 heads"),
        (fpt_plus(side_size=(120, 128)), {}, "side_size must be a multiple .* nearest that works"),
        (
            fpt_plus(importance="class_token"),
            {"has_class_token": False, "prefix_tokens": 0},
            "needs a class token, which vit_base_patch16_384 has not",
        ),
    ],
)
def test_method_that_does_not_fit_the_model(
    config: FptConfig, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        config.check_against(dataclasses.replace(VIT_B, **changes))


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("6-11", (6, 7, 8, 9, 10, 11)),
        ("0,2,5", (0, 2, 5)),
        ("0, 3-5,9", (0, 3, 4, 5, 9)),
        ("7", (7,)),
    ],
)
def test_layers_as_written(text: str, layers: tuple[int, ...]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "-3", "5-3", "2,1", "1,1", "1-3,2", "1.5"])
def test_layers_written_wrongly(text: str) -> None:
    with pytest.raises(ConfigError, match="layers must"):
        parse_layers(text)


@given(st.sets(st.integers(0, 60), min_size=1))
def test_layers_survive_writing(layers: set[int]) -> None:
    expected = tuple(sorted(layers))
    assert parse_layers(format_layers(expected)) == expected


@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 400), st.integers(0, 400))
def test_the_size_proposed_works(patch_h: int, patch_w: int, height: int, width: int) -> None:
    patch = (patch_h, patch_w)
    try:
        check_divides("input_size", (height, width), patch)
    except ConfigError as error:
        assert "input_size must be a multiple of the patch size" in str(error)
        near = str(error).rpartition(" ")[2].split("x")
        check_divides("input_size", (int(near[0]), int(near[1])), patch)
    else:
        assert height > 0 and width > 0 and height % patch_h == 0 and width % patch_w == 0


def test_tokens_are_counted_with_the_class_token() -> None:
    assert VIT_B.head_width == 64
    assert VIT_B.num_tokens((512, 512)) == 1025
    assert dataclasses.replace(VIT_B, prefix_tokens=5).num_tokens((64, 32)) == 13


def test_images_of_a_split_keep_their_order() -> None:
    root = Path("data")
    items = tuple(
        ImageItem(key, root / key, label, split)
        for key, label, split in [
            ("a/0.png", 0, "train"),
            ("a/1.png", 0, "test"),
            ("b/0.png", 1, "train"),
        ]
    )
    images = ImageSet(root, ("a", "b"), items)
    assert [item.key for item in images.of_split("train")] == ["a/0.png", "b/0.png"]
    assert images.of_split("val") == ()
