"""The authors' builder: from their configuration object to models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from fpt_fast.compat import builder, frozen_vit


@pytest.fixture
def cfg(tmp_path: Path) -> Any:
    """Their configuration, as attributes, for a tiny Hugging Face directory."""
    vit = {
        "model_type": "vit",
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 3,
        "intermediate_size": 96,
        "image_size": 32,
        "patch_size": 8,
        "hidden_dropout_prob": 0.1,
    }
    folder = tmp_path / "vit"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(vit))
    original = frozen_vit.ViTForImageClassification(
        SimpleNamespace(**vit, layers_to_extract=[0], token_ratio=0.5, token_imp="global")
    )
    save_file(original.state_dict(), folder / "model.safetensors")
    return SimpleNamespace(
        base=SimpleNamespace(device="cpu"),
        dataset=SimpleNamespace(num_classes=4, preload_path=None),
        train=SimpleNamespace(criterion="cross_entropy"),
        network=SimpleNamespace(
            num_prompts=5,
            side_reduction_ratio=4,
            prompt_reduction_ratio=1,
            prompt_norm=True,
            prompt_proj=False,
            layers_to_extract="1-2",
            token_ratio=0.25,
            token_imp="class_token",
            side_input_size=16,
            pretrained_path=str(folder),
        ),
    )


def test_from_image_to_gradient(cfg: Any) -> None:
    frozen_encoder, model = builder.generate_model(cfg)
    assert frozen_encoder is not None
    assert not any(p.requires_grad for p in frozen_encoder.parameters())
    with torch.no_grad():
        _, keys, values = frozen_encoder(torch.randn(2, 3, 48, 48), interpolate_pos_encoding=True)
    assert keys.shape == (2, 2, 3, 9, 16)  # 37 tokens, a quarter of them kept
    logits = model(torch.randn(2, 3, 16, 16), keys, values)
    assert logits.shape == (2, 4)
    logits.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_no_frozen_model_where_features_are_preloaded(cfg: Any) -> None:
    cfg.dataset.preload_path = "somewhere"
    frozen_encoder, model = builder.generate_model(cfg)
    assert frozen_encoder is None
    assert len(model.side_encoder.vit.encoder.layer) == 2


def test_fpt_and_regression(cfg: Any) -> None:
    cfg.network.prompt_reduction_ratio, cfg.network.prompt_norm = 4, False
    cfg.network.prompt_proj, cfg.network.layers_to_extract = True, "0,2"
    cfg.train.criterion = "smooth_L1"
    model = builder.build_model(cfg)
    assert model.fusion_module.prompts.shape == (2, 1, 5, 12)
    assert model.side_encoder.classifier.out_features == 1
    # The side network has no dropout, whatever the frozen model's config says.
    assert model.side_encoder.settings.hidden_dropout_prob == 0


def test_load_weights(cfg: Any, tmp_path: Path) -> None:
    model, other = builder.build_model(cfg), builder.build_model(cfg)
    torch.save(model.state_dict(), tmp_path / "best.pt")
    builder.load_weights(other, str(tmp_path / "best.pt"))
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize(("text", "layers"), [("6-8", [6, 7, 8]), ("0,2", [0, 2]), (5, [5])])
def test_parse_layers(text: str | int, layers: list[int]) -> None:
    assert builder.parse_layers(text) == layers


def test_parse_layers_refuses_words() -> None:
    with pytest.raises(ValueError, match="layers_to_extract must be like"):
        builder.parse_layers("all")
