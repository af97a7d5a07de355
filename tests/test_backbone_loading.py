"""Names, checkpoints, the hash of the weights, precision."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import (
    VisionTransformer,
)
from torch import Tensor, nn

from fpt_fast.backbone import BackboneError, FrozenBackbone, choose_dtype, load_backbone
from helpers import relative_error, spread_weights, tiny_vit


def load(source: Any, **settings: Any) -> FrozenBackbone:
    return load_backbone(source, **{"dtype": "float32", "device": "cpu", **settings})


def test_a_timm_name_with_a_checkpoint(tmp_path: Path) -> None:
    model = spread_weights(timm.create_model("test_vit", num_classes=7))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save({"state_dict": model.state_dict()}, tmp_path / "weights.pth")
    pixels = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        expected = model.eval().forward_features(pixels)[:, 0]
    for file in ("weights.safetensors", "weights.pth"):
        for name in ("test_vit", "timm/test_vit", "hf-hub:timm/test_vit.r160_in1k"):
            backbone = load(name, checkpoint_path=tmp_path / file)
            assert relative_error(backbone.features(pixels), expected) <= 1e-5
    assert backbone.spec.name == "test_vit.r160_in1k"
    assert backbone.spec.mean == pytest.approx(tuple(model.pretrained_cfg["mean"]))


def test_a_checkpoint_trained_at_another_size(tmp_path: Path) -> None:
    model = spread_weights(timm.create_model("test_vit", img_size=96, num_classes=0))
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    backbone = load("test_vit", checkpoint_path=tmp_path / "weights.safetensors")
    assert backbone.spec.image_size == (96, 96)
    pixels = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        expected = model.eval().forward_features(pixels)[:, 0]
    assert relative_error(backbone.features(pixels), expected) <= 1e-5


def _without(key: str) -> dict[str, Tensor]:
    state = dict(timm.create_model("test_vit").state_dict())
    del state[key]
    return state


CHECKPOINTS: dict[str, tuple[Callable[[], dict[str, Tensor]], str]] = {
    "missing": (lambda: _without("blocks.1.attn.qkv.weight"), "qkv.weight is missing"),
    "superfluous": (
        lambda: {**_without("head.bias"), "blocks.0.ls1.gamma": torch.ones(64)},
        "blocks.0.ls1.gamma is not the model's",
    ),
    "another model": (lambda: tiny_vit().state_dict(), r"does not fit the VisionTransformer"),
    "empty": (dict, "is missing.*and .* more"),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_that_does_not_fit(name: str, tmp_path: Path) -> None:
    make, reason = CHECKPOINTS[name]
    save_file(make(), tmp_path / "weights.safetensors")
    with pytest.raises(BackboneError, match=reason):
        load("test_vit", checkpoint_path=tmp_path / "weights.safetensors")


def test_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="is not a file"):
        load("test_vit", checkpoint_path=tmp_path / "absent.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(BackboneError, match="cannot read the checkpoint"):
        load("test_vit", checkpoint_path=tmp_path / "bad.safetensors")
    torch.save({"model": tiny_vit()}, tmp_path / "pickled.pth")
    with pytest.raises(BackboneError, match="cannot read the checkpoint.*weights only"):
        load("test_vit", checkpoint_path=tmp_path / "pickled.pth")
    with pytest.raises(BackboneError, match="checkpoint_path goes with a timm name"):
        load(tiny_vit(), checkpoint_path=tmp_path / "bad.safetensors")


def test_no_hub_is_an_error_and_never_random_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **settings: Any) -> nn.Module:
        assert settings["pretrained"] is True
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(BackboneError, match=r"pretrained weights of 'test_vit'.*checkpoint_path"):
        load("test_vit")


def test_a_model_without_published_weights() -> None:
    with pytest.raises(BackboneError, match=r"cannot get the pretrained weights.*--no-pretrained"):
        load("vit_small_patch8_224.nothing")


def test_names_that_nothing_has(tmp_path: Path) -> None:
    with pytest.raises(
        BackboneError, match="no model 'vit_bass_patch16_224'; near names are vit_b"
    ):
        load("vit_bass_patch16_224")
    with pytest.raises(BackboneError, match="neither a timm name nor a folder here; download"):
        load("google/vit-base-patch16-384")
    with pytest.raises(BackboneError, match="is not a folder"):
        load(tmp_path / "absent")
    with pytest.raises(BackboneError, match="has no config.json"):
        load(tmp_path)


def test_the_hash_follows_the_weights_and_nothing_else() -> None:
    model = tiny_vit(num_classes=3)
    first = load(model).spec.weights_hash
    assert load(copy.deepcopy(model), dtype="bfloat16").spec.weights_hash == first
    with torch.no_grad():
        model.head.weight += 1  # not read by the frozen pass
    assert load(model).spec.weights_hash == first
    with torch.no_grad():
        model.blocks[2].mlp.fc2.weight[3, 5] += 1e-3
    assert load(model).spec.weights_hash != first


def test_the_hash_covers_dtype_epsilon_heads_and_activation() -> None:
    def altered(change: Callable[[VisionTransformer], object]) -> str:
        model = tiny_vit()
        change(model)
        return load(model).spec.weights_hash

    hashes = {
        altered(lambda model: None),
        altered(lambda model: model.half()),
        altered(lambda model: setattr(model.blocks[1].norm1, "eps", 1e-3)),
        altered(lambda model: setattr(model.blocks[1].mlp, "act", nn.ReLU())),
        load(tiny_vit(num_heads=6)).spec.weights_hash,
    }
    assert len(hashes) == 5


def _with_capabilities(monkeypatch: pytest.MonkeyPatch, *having: str) -> torch.dtype:
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, probe, lambda name=probe: name in having, False)
    capabilities = {"arm_bf16": "arm_bf16" in having}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, False)
    return choose_dtype(torch.device("cpu"))


def test_auto_means_bf16_where_the_cpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _with_capabilities(monkeypatch) == torch.float32
    for probe in ("_is_amx_tile_supported", "_is_avx512_bf16_supported", "arm_bf16"):
        assert _with_capabilities(monkeypatch, probe) == torch.bfloat16
    assert load(tiny_vit(), dtype="auto").dtype == torch.bfloat16


def test_auto_means_half_precision_where_the_gpu_has_it(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    for bf16, capability, expected in (
        (True, (9, 0), torch.bfloat16),
        (False, (7, 5), torch.float16),
        (False, (6, 1), torch.float32),
    ):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda value=bf16, **_: value)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, value=capability: value)
        assert choose_dtype(device) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16, "float32"])
def test_dtype_given(dtype: str | torch.dtype) -> None:
    model = spread_weights(tiny_vit(), scale=0.1)
    backbone = load(model, dtype=dtype)
    expected = dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype)
    assert backbone.dtype == expected
    pixels = torch.randn(1, 3, 48, 32)
    state = next(backbone.extract(pixels, (3,)))
    assert state.k.dtype == expected
    exact = next(load(model).extract(pixels, (3,)))
    assert relative_error(state.k, exact.k) <= 64 * torch.finfo(expected).eps


def test_dtype_and_device_that_cannot_be() -> None:
    with pytest.raises(BackboneError, match="dtype must be 'auto' or one of float32"):
        load(tiny_vit(), dtype="int8")
    with pytest.raises(BackboneError, match="dtype must be one of float32"):
        load(tiny_vit(), dtype=torch.float64)
    if not torch.cuda.is_available():
        with pytest.raises(BackboneError, match="finds no CUDA device"):
            load(tiny_vit(), device="cuda")
