"""The model: parameter counts, creation, saving, and files that must be refused."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer

from fpt_fast.backbone import load_backbone
from fpt_fast.config import ConfigError, FptConfig, fpt, fpt_plus
from fpt_fast.model import FptModel, create_model
from fpt_fast.model_files import CONFIG_FILE, WEIGHTS_FILE, ModelFileError
from fpt_fast.ops import dequantise_kv, quantise_kv
from fpt_fast.records import FeatureBatch
from helpers import VIT_B

TINY = dataclasses.replace(
    VIT_B, hidden_size=48, num_heads=3, depth=4, patch_size=(8, 8), image_size=(32, 32)
)
TINY_CHANGES = {"side_size": (16, 24), "side_reduction": 4, "num_prompts": 3}
KEPT = 5


def tiny_model(method: str = "fpt_plus", **changes: object) -> FptModel:
    return create_model(method, backbone=TINY, num_classes=3, **{**TINY_CHANGES, **changes})


def tiny_batch(model: FptModel, images: int = 2) -> FeatureBatch:
    kv = torch.randn(images, len(model.layers), 2, 3, KEPT, 16).half()
    pixels = torch.randn(images, 3, *model.config.side_size)
    keys = tuple(str(i) for i in range(images))
    return FeatureBatch(pixels, kv, None, torch.zeros(images, dtype=torch.int64), keys)


@pytest.mark.parametrize(("config", "count"), [(fpt_plus(), 900_965), (fpt(), 1_602_341)])
def test_published_parameter_counts(config: FptConfig, count: int) -> None:
    with torch.device("meta"):
        model = FptModel(config, VIT_B, 5)
    assert model.trainable_parameters()[0] == count
    # google/vit-base-patch16-384 without its head.
    assert model.trainable_parameters()[1] == count + 86_090_496


def test_message(capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_model()
    model.print_trainable_parameters()
    trainable, total = model.trainable_parameters()
    line = capsys.readouterr().out
    assert line.startswith(
        f"trainable params: {trainable:,d} || all params: {total:,d} || "
        f"trainable%: {100 * trainable / total:.4f}"
    )
    assert "reckoned from its widths" in line


def test_message_with_the_frozen_model_at_hand(
    tiny_backbone: VisionTransformer, capsys: pytest.CaptureFixture[str]
) -> None:
    backbone = load_backbone(tiny_backbone)
    model = create_model("fpt", backbone=backbone, num_classes=3, **TINY_CHANGES)
    own = sum(p.numel() for p in model.parameters())
    frozen = sum(p.numel() for p in tiny_backbone.parameters())
    assert model.trainable_parameters() == (own, own + frozen)
    model.print_trainable_parameters()
    assert "reckoned" not in capsys.readouterr().out


def test_frozen_layers_of_the_side_network_are_not_counted_as_trainable() -> None:
    model = tiny_model()
    trainable, total = model.trainable_parameters()
    model.side.head.requires_grad_(False)
    head = sum(p.numel() for p in model.side.head.parameters())
    assert model.trainable_parameters() == (trainable - head, total)


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_forward(method: str) -> None:
    model = tiny_model(method).eval()
    assert model.layers == ((2, 3) if method == "fpt_plus" else (0, 1, 2, 3))
    batch = tiny_batch(model)
    logits = model(batch)
    assert logits.shape == (2, 3)
    stored = dataclasses.replace(
        batch, kv=torch.cat((torch.zeros_like(batch.kv), batch.kv)), rows=torch.tensor([2, 3])
    )
    torch.testing.assert_close(model(stored), logits)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_8_bit_features(dtype: torch.dtype) -> None:
    model = tiny_model().eval()
    batch = tiny_batch(model, images=3)
    kv8, k_scales, v_scales = quantise_kv(batch.kv, dtype)
    rows = torch.tensor([2, 0, 1])
    stored = dataclasses.replace(batch, kv=kv8, rows=rows, k_scales=k_scales, v_scales=v_scales)
    wide = dataclasses.replace(batch, kv=dequantise_kv(kv8, k_scales, v_scales), rows=rows)
    torch.testing.assert_close(model(stored), model(wide), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="k_scales and batch.v_scales belong together"):
        model(dataclasses.replace(stored, k_scales=None))
    with pytest.raises(ValueError, match="scales must be given with 8-bit kv"):
        model(dataclasses.replace(stored, k_scales=None, v_scales=None))


def test_side_network_alone() -> None:
    model = tiny_model(fusion=False)
    assert model.fusion is None
    batch = tiny_batch(model)
    without = dataclasses.replace(batch, kv=None)
    assert torch.equal(model(batch), model(without))
    with pytest.raises(ValueError, match="batch.kv must hold"):
        tiny_model()(without)


def test_seed_fixes_the_weights_and_spares_the_global_generator() -> None:
    before = torch.random.get_rng_state()
    first, same, other = tiny_model(), tiny_model(), tiny_model(seed=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first.side.head.weight, same.side.head.weight)
    assert not torch.equal(first.side.head.weight, other.side.head.weight)


def test_create_from_a_configuration_with_changes() -> None:
    model = create_model(fpt(**TINY_CHANGES), backbone=TINY, num_classes=1, layers=(1, 3))
    assert model.config.method == "fpt"
    assert model.layers == (1, 3)
    assert model.num_outputs == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers": (2, 4)}, "layers must be below 4"),
        ({"side_size": (20, 24)}, "side_size must be a multiple of the patch size"),
        ({"side_reduction": 32}, "side_reduction must divide"),
        ({"prompts": 3}, "unknown key 'prompts'"),
    ],
)
def test_methods_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tiny_model(**changes)


@pytest.mark.parametrize("method", ["fpt_plus", "fpt", "alone"])
def test_saved_and_read_back(tmp_path: Path, method: str) -> None:
    model = tiny_model(fusion=False) if method == "alone" else tiny_model(method)
    model.eval()
    batch = tiny_batch(model)
    model.save_pretrained(tmp_path / "run" / "best", {"classes": ["a", "b", "c"], "n": 3})
    again = FptModel.from_pretrained(tmp_path / "run" / "best")
    assert again.config == model.config
    assert again.spec == model.spec
    assert again.extra == {"classes": ["a", "b", "c"], "n": 3}
    assert not again.training
    assert torch.equal(again(batch), model(batch))
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())
    assert sorted(p.name for p in (tmp_path / "run" / "best").iterdir()) == [
        CONFIG_FILE,
        WEIGHTS_FILE,
    ]


def test_saving_again_replaces_and_keeps_extra(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path, {"epoch": 1})
    with torch.no_grad():
        model.side.head.bias.fill_(7)
    model.save_pretrained(tmp_path)
    again = FptModel.from_pretrained(tmp_path)
    assert bool((again.side.head.bias == 7).all())
    assert again.extra == {"epoch": 1}


def test_failed_save_leaves_the_old_model(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ValueError, match="JSON values only"):
        model.save_pretrained(tmp_path, {"path": tmp_path})
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 2


def test_save_interrupted_between_its_two_files_still_loads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_model("fpt").save_pretrained(tmp_path)
    old_config = (tmp_path / CONFIG_FILE).read_text()
    model = tiny_model("fpt_plus")
    model.save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(old_config)
    with caplog.at_level(logging.WARNING, "fpt_fast"):
        again = FptModel.from_pretrained(tmp_path)
    assert again.config == model.config
    assert "the weights' own copy is used" in caplog.text


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=re.escape(CONFIG_FILE)):
        FptModel.from_pretrained(tmp_path)
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    with pytest.raises(FileNotFoundError, match=re.escape(WEIGHTS_FILE)):
        FptModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"format": "other"}', b"\xff\xfe", b"[" * 100_000]
)
def test_damaged_config(tmp_path: Path, content: bytes) -> None:
    tiny_model().save_pretrained(tmp_path)
    (tmp_path / CONFIG_FILE).write_bytes(content)
    with pytest.raises(ModelFileError, match=re.escape(CONFIG_FILE)):
        FptModel.from_pretrained(tmp_path)


def rewrite(
    folder: Path, tensors: dict[str, torch.Tensor] | None = None, **changes: object
) -> None:
    """Replace values of the description, and the weights, which then carry no copy of it."""
    description = json.loads((folder / CONFIG_FILE).read_text())
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if name:
            description[group][name] = value
        else:
            description[group] = value
    (folder / CONFIG_FILE).write_text(json.dumps(description))
    save_file(
        load_file(folder / WEIGHTS_FILE) if tensors is None else tensors, folder / WEIGHTS_FILE
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_outputs": 0},
        {"num_outputs": "3"},
        {"num_outputs": 4},
        {"spec__hidden_size": 1 << 40},
        {"spec__hidden_size": 96},
        {"spec__depth": 1_000_000, "config__layers": list(range(1_000_000))},
        {"spec__patch_size": [0, 8]},
        {"spec__patch_size": 8},
        {"spec": {}},
        {"config__num_prompts": 10**9},
        {"config__num_prompts": "many"},
        {"config__side_size": [1 << 19, 1 << 19]},
        {"config__surprise": 1},
        {"config": None},
        {"extra": 3},
    ],
)
def test_hostile_descriptions(tmp_path: Path, changes: dict[str, object]) -> None:
    tiny_model().save_pretrained(tmp_path)
    rewrite(tmp_path, **changes)
    with pytest.raises(ModelFileError):
        FptModel.from_pretrained(tmp_path)


def test_weights_without_the_copy_load_by_the_config(tmp_path: Path) -> None:
    model = tiny_model().eval()
    model.save_pretrained(tmp_path)
    rewrite(tmp_path)
    batch = tiny_batch(model)
    assert torch.equal(FptModel.from_pretrained(tmp_path)(batch), model(batch))


def test_weights_of_another_model_are_named(tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    tensors["extra.weight"] = tensors.pop("side.norm.weight")
    tensors["side.head.bias"] = torch.zeros(4)
    tensors["side.norm.bias"] = torch.zeros(12, dtype=torch.int32)
    rewrite(tmp_path, tensors)
    with pytest.raises(ModelFileError) as caught:
        FptModel.from_pretrained(tmp_path)
    message = str(caught.value)
    assert "missing side.norm.weight" in message
    assert "unexpected extra.weight" in message
    assert "side.head.bias must be (3,), got (4,)" in message
    assert "side.norm.bias must be of a floating-point dtype" in message


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(tmp_path: Path, size: int) -> None:
    tiny_model().save_pretrained(tmp_path)
    content = (tmp_path / WEIGHTS_FILE).read_bytes()
    (tmp_path / WEIGHTS_FILE).write_bytes(content[:size])
    with pytest.raises(ModelFileError, match="not a sound safetensors file"):
        FptModel.from_pretrained(tmp_path)


def test_backbone_folder_is_read_for_its_description(
    tmp_path: Path, tiny_backbone: VisionTransformer, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []

    def load(source: object, **settings: object) -> object:
        seen.append(source)
        return load_backbone(tiny_backbone)

    monkeypatch.setattr("fpt_fast.backbone.load_backbone", load)
    model = create_model("fpt_plus", backbone=tmp_path, num_classes=2, **TINY_CHANGES)
    assert seen == [tmp_path]
    assert model.spec.hidden_size == 48
    assert model.frozen_parameters == sum(p.numel() for p in tiny_backbone.parameters())
