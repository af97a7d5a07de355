"""Frozen models from Hugging Face folders: layouts, what is left aside, what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_folder import config_of, prefixed, tensors_of, write_folder
from safetensors.torch import save_file
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from fpt_fast.backbone import BackboneError, FrozenBackbone, backbone_name, load_backbone
from helpers import relative_error, spread_weights, tiny_vit

HALVES = (0.5, 0.5, 0.5)


def load(folder: Path, **settings: Any) -> FrozenBackbone:
    return load_backbone(folder, **{"dtype": "float32", "device": "cpu", **settings})


def vit() -> VisionTransformer:
    model = spread_weights(tiny_vit(), scale=0.1)
    assert isinstance(model, VisionTransformer)
    return model


def same_function(backbone: FrozenBackbone, model: VisionTransformer) -> bool:
    """Whether the features agree with the timm model's, at its own size and at another one."""
    errors = []
    for size in ((32, 32), (24, 48)):
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            expected = model.forward_features(pixels)[:, 0]
        errors.append(relative_error(backbone.features(pixels), expected))
    return max(errors) <= 1e-5


@pytest.mark.parametrize("prefix", ["", "vit."])
def test_vit_with_and_without_a_head(prefix: str, tmp_path: Path) -> None:
    model = vit()
    tensors = tensors_of(model)
    tensors |= {"pooler.dense.weight": torch.ones(48, 48), "pooler.dense.bias": torch.ones(48)}
    tensors = prefixed(tensors, prefix)
    backbone = load(write_folder(tmp_path / "eyes", config_of(model, "vit"), tensors))
    assert same_function(backbone, model)
    assert (backbone.spec.name, backbone.spec.prefix_tokens) == ("eyes", 1)
    assert (backbone.spec.mean, backbone.spec.std) == (HALVES, HALVES)
    assert backbone_name(tmp_path / "eyes") == "eyes"


def test_vit_without_query_key_value_bias(tmp_path: Path) -> None:
    model = spread_weights(tiny_vit(qkv_bias=False), scale=0.1)
    folder = write_folder(tmp_path / "vit", config_of(model, "vit"), tensors_of(model))
    assert same_function(load(folder), model)


def test_deit_distilled(tmp_path: Path) -> None:
    model = VisionTransformerDistilled(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=3,
        num_heads=3,
        qkv_bias=True,
        dynamic_img_size=True,
    )
    spread_weights(model.eval(), scale=0.1)
    tensors = tensors_of(model)
    tensors["embeddings.distillation_token"] = model.dist_token.detach()
    folder = write_folder(tmp_path / "deit", config_of(model, "deit"), prefixed(tensors, "deit."))
    backbone = load(folder)
    assert same_function(backbone, model)
    assert backbone.spec.prefix_tokens == 2
    assert backbone.spec.mean == pytest.approx((0.485, 0.456, 0.406))


@pytest.mark.parametrize("registers", [0, 4])
def test_dinov2(registers: int, tmp_path: Path) -> None:
    model = spread_weights(
        tiny_vit(reg_tokens=registers, no_embed_class=True, init_values=1.0), scale=0.1
    )
    tensors = tensors_of(model, dino=True)
    # There the class token has a position of its own and registers have none.
    own = torch.randn(1, 1, 48)
    tensors["embeddings.cls_token"] = tensors["embeddings.cls_token"] - own
    tensors["embeddings.position_embeddings"] = torch.cat([own, model.pos_embed.detach()], 1)
    tensors["embeddings.mask_token"] = torch.zeros(1, 48)
    kind, changes = "dinov2", {"mlp_ratio": 2}
    if registers:
        kind, changes = "dinov2_with_registers", {"mlp_ratio": 2, "num_register_tokens": registers}
        tensors["embeddings.register_tokens"] = model.reg_token.detach()
    config = config_of(model, kind, **changes)
    del config["intermediate_size"]
    backbone = load(write_folder(tmp_path / "dino", config, prefixed(tensors, f"{kind}.")))
    assert same_function(backbone, model)
    assert backbone.spec.prefix_tokens == 1 + registers


def test_one_set_of_weights_has_one_hash_in_both_formats(tmp_path: Path) -> None:
    model = vit()
    folder = write_folder(tmp_path / "vit", config_of(model, "vit"), tensors_of(model))
    assert load(folder).spec.weights_hash == load(model).spec.weights_hash
    other = config_of(model, "vit", layer_norm_eps=1e-12)
    assert load(write_folder(tmp_path / "eps", other, tensors_of(model))).spec.weights_hash != (
        load(folder).spec.weights_hash
    )


def test_half_precision_weights_are_hashed_as_they_came(tmp_path: Path) -> None:
    model = vit()
    tensors = {name: tensor.half() for name, tensor in tensors_of(model).items()}
    folder = write_folder(tmp_path / "vit", config_of(model, "vit"), tensors)
    first, second = load(folder), load(folder, dtype="bfloat16")
    assert first.spec.weights_hash == second.spec.weights_hash
    assert first.spec.weights_hash != load(model).spec.weights_hash
    assert same_function(first, model.half().float())


def test_shards(tmp_path: Path) -> None:
    model = vit()
    folder = write_folder(tmp_path / "vit", config_of(model, "vit"), {})
    (folder / "model.safetensors").unlink()
    names = sorted(tensors := prefixed(tensors_of(model), "vit."))
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name].contiguous() for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert same_function(load(folder), model)

    index.write_text(json.dumps({"weight_map": {names[0]: "../elsewhere.safetensors"}}))
    with pytest.raises(BackboneError, match="a file outside its folder"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {names[0]: "absent.safetensors"}}))
    with pytest.raises(BackboneError, match=r"cannot read .*absent\.safetensors"):
        load(folder)


def test_preprocessor(tmp_path: Path) -> None:
    model = vit()
    config, tensors = config_of(model, "vit"), tensors_of(model)
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "do_normalize": True}
    spec = load(write_folder(tmp_path / "a", config, tensors, given)).spec
    assert (spec.mean, spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    given["do_normalize"] = False
    spec = load(write_folder(tmp_path / "b", config, tensors, given)).spec
    assert (spec.mean, spec.std) == ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    with pytest.raises(BackboneError, match="three numbers"):
        load(write_folder(tmp_path / "c", config, tensors, {"image_mean": 0.5}))


def test_a_folder_that_timm_saved(tmp_path: Path) -> None:
    model = spread_weights(timm.create_model("test_vit", num_classes=3, img_size=64)).eval()
    config = {
        "architecture": "test_vit",
        "num_classes": 3,
        "model_args": {"img_size": 64, "num_classes": 3},
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
    }
    backbone = load(write_folder(tmp_path / "mine", config, dict(model.state_dict())))
    pixels = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_features(pixels)[:, 0]
    assert relative_error(backbone.features(pixels), expected) <= 1e-5
    assert backbone.spec.name == "mine"
    assert (backbone.spec.mean, backbone.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    (tmp_path / "mine" / "model.safetensors").unlink()
    with pytest.raises(BackboneError, match=r"no model\.safetensors"):
        load(tmp_path / "mine")


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def _shrink(tensors: dict[str, Tensor]) -> None:
    tensors["layernorm.weight"] = tensors["layernorm.weight"][:-1]


REFUSED: dict[str, tuple[Change, str]] = {
    "model type": (lambda c, t: c.update(model_type="swin"), "model_type 'swin' is not supported"),
    "activation": (lambda c, t: c.update(hidden_act="mish"), "hidden_act 'mish' is not supported"),
    "no size": (lambda c, t: c.pop("hidden_size"), "does not describe the model.*hidden_size"),
    "channels": (lambda c, t: c.update(num_channels=1), "got 1 channels"),
    "heads": (lambda c, t: c.update(num_attention_heads=5), "width 48, 5 heads"),
    "swiglu": (lambda c, t: c.update(use_swiglu_ffn=True), "use_swiglu_ffn is not supported"),
    "a missing tensor": (
        lambda c, t: t.pop("encoder.layer.2.attention.attention.key.bias"),
        r"lack 'encoder\.layer\.2\.attention\.attention\.key\.bias'",
    ),
    "a layer too many": (lambda c, t: c.update(num_hidden_layers=3), "16 tensors would go unused"),
    "a layer too few": (lambda c, t: c.update(num_hidden_layers=5), r"lack 'encoder\.layer\.4"),
    "bias that config denies": (
        lambda c, t: c.update(qkv_bias=False),
        "12 tensors would go unused",
    ),
    "image size": (lambda c, t: c.update(image_size=64), r"not what config\.json says.*position"),
    "shape": (lambda c, t: _shrink(t), r"not what config\.json says.*norm\.weight"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_folders_that_contradict_themselves(name: str, tmp_path: Path) -> None:
    model = vit()
    config, tensors = config_of(model, "vit"), tensors_of(model)
    change, reason = REFUSED[name]
    change(config, tensors)
    with pytest.raises(BackboneError, match=f"(?s){reason}"):
        load(write_folder(tmp_path / "vit", config, tensors))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    model = vit()
    folder = write_folder(tmp_path / "vit", config_of(model, "vit"), tensors_of(model))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:-1000])
    with pytest.raises(BackboneError, match=r"cannot read .*model\.safetensors"):
        load(folder)
    (folder / "model.safetensors").unlink()
    torch.save(tensors_of(model), folder / "pytorch_model.bin")
    with pytest.raises(BackboneError, match="pickled weights"):
        load(folder)
    for text in ("{", "[1]"):
        (folder / "config.json").write_text(text)
        with pytest.raises(BackboneError, match=r"config\.json"):
            load(folder)
