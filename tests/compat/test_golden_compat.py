"""The authors' module names against the authors' numbers, strict state dicts included."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fpt_fast.compat import frozen_vit, side_vit
from fpt_fast.compat.bridge import FineGrainedPromptTuning, FusionModule
from helpers import Golden, relative_error


def vit_config(golden: Golden, **changes: object) -> SimpleNamespace:
    """The attributes of a Hugging Face ``ViTConfig``, on a plain object."""
    config = golden.config
    values = {
        "hidden_size": config["hidden_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": config["num_attention_heads"],
        "intermediate_size": config["intermediate_size"],
        "image_size": config["image_size"],
        "patch_size": config["patch_size"],
        "num_channels": 3,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "layer_norm_eps": 1e-12,
        "initializer_range": 0.02,
        "qkv_bias": True,
        "num_labels": 3,
        "output_attentions": False,
        "output_hidden_states": False,
        "use_return_dict": True,
    }
    return SimpleNamespace(**{**values, **changes})


def build_model(golden: Golden) -> FineGrainedPromptTuning:
    """As the authors' ``build_model`` does, by its calls."""
    config = golden.config
    num_layers = len(config["layers_to_extract"])
    fusion_module = FusionModule(
        num_layers=num_layers,
        in_dim=config["hidden_size"],
        out_dim=config["side_hidden_size"],
        num_heads=config["num_attention_heads"],
        num_prompts=config["num_prompts"],
        prompt_dim=config["prompt_dim"],
        prompt_norm=config["prompt_norm"],
        prompt_proj=config["prompt_proj"],
    )
    side_config = vit_config(
        golden,
        num_hidden_layers=num_layers,
        hidden_size=config["side_hidden_size"],
        intermediate_size=config["side_hidden_size"] * 4,
        image_size=config["side_input_size"],
        num_labels=config["num_classes"],
    )
    side_encoder = side_vit.ViTForImageClassification(side_config)
    return FineGrainedPromptTuning(side_encoder, fusion_module)


@pytest.fixture
def model(golden: Golden) -> FineGrainedPromptTuning:
    model = build_model(golden)
    model.load_state_dict(golden.group("model"), strict=True)
    return model.eval()


@pytest.fixture
def frozen(golden: Golden) -> frozen_vit.ViTForImageClassification:
    config = vit_config(golden)
    config.token_imp = golden.config["token_importance"]
    config.token_ratio = golden.config["token_ratio"]
    config.layers_to_extract = golden.config["layers_to_extract"]
    model = frozen_vit.ViTForImageClassification(config)
    model.load_state_dict(golden.group("frozen"), strict=True)
    return model.eval()


def logits(model: nn.Module, golden: Golden) -> Tensor:
    result: Tensor = model(golden["x_coarse"], golden["key_states"], golden["value_states"])
    return result


def compared(names: dict[str, Tensor]) -> list[str]:
    """All but the key biases, whose gradient is rounding: see the vectors' README."""
    return [name for name in names if not name.endswith("attention.key.bias")]


def test_state_dict_keys_are_the_authors(
    golden: Golden,
    model: FineGrainedPromptTuning,
    frozen: frozen_vit.ViTForImageClassification,
) -> None:
    assert set(model.state_dict()) == set(golden.group("model"))
    assert set(frozen.state_dict()) == set(golden.group("frozen"))


def test_fused_states(golden: Golden, model: FineGrainedPromptTuning) -> None:
    states = model.fusion_module(golden["key_states"], golden["value_states"])
    assert relative_error(states, golden["fine_grained_states"]) < 1e-5


def test_side_encoder_alone(golden: Golden, model: FineGrainedPromptTuning) -> None:
    output = model.side_encoder(
        golden["x_coarse"], golden["fine_grained_states"], interpolate_pos_encoding=True
    )
    assert relative_error(output.logits, golden["logits"]) < 1e-5
    assert output.loss is None
    assert output.hidden_states is None
    assert output.attentions is None


def test_logits_and_gradients(golden: Golden, model: FineGrainedPromptTuning) -> None:
    out = logits(model, golden)
    assert relative_error(out, golden["logits"]) < 1e-5
    functional.cross_entropy(out, golden["labels"]).backward()
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    expected = golden.group("grad")
    assert got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in compared(expected)}
    assert max(errors.values()) < 1e-4, errors


def test_three_steps(golden: Golden, model: FineGrainedPromptTuning) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999))
    losses, norms = [], []
    for _ in range(3):
        loss = functional.cross_entropy(logits(model, golden), golden["labels"])
        optimizer.zero_grad()
        loss.backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), 1))
        optimizer.step()
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), golden["losses"]) < 1e-5
    assert relative_error(torch.stack(norms), golden["grad_norms"]) < 1e-4
    got, expected = model.state_dict(), golden.group("stepped")
    assert got.keys() == expected.keys()
    errors = {name: relative_error(got[name], expected[name]) for name in compared(expected)}
    assert max(errors.values()) < 1e-3, errors


def test_frozen_model(golden: Golden, frozen: frozen_vit.ViTForImageClassification) -> None:
    output, keys, values = frozen(golden["pixel_values"], interpolate_pos_encoding=True)
    assert relative_error(output.logits, golden["frozen_logits"]) < 1e-5
    # Ours are in ascending order of tokens, the authors' best first.
    order = golden["indices"][golden.config["layers_to_extract"]].long().argsort(dim=-1)
    gather = order.unsqueeze(-1).expand_as(golden["key_states"])
    assert relative_error(keys, golden["key_states"].gather(3, gather)) < 1e-5
    assert relative_error(values, golden["value_states"].gather(3, gather)) < 1e-5


def test_from_image_to_logits(
    golden: Golden,
    model: FineGrainedPromptTuning,
    frozen: frozen_vit.ViTForImageClassification,
) -> None:
    _, keys, values = frozen(golden["pixel_values"], interpolate_pos_encoding=True)
    out = model(golden["x_coarse"], keys, values)
    assert relative_error(out, golden["logits"]) < 1e-5


def test_important_token_selection(golden: Golden) -> None:
    layer = golden.config["layers_to_extract"][0]
    scores = golden["scores"][layer]  # [B, H, N]
    batch, heads, tokens = scores.shape
    # A map whose every row is the score has that column mean and that first row.
    probs = scores[:, :, None].expand(batch, heads, tokens, tokens)
    number = torch.arange(tokens, dtype=torch.float32).view(1, 1, tokens, 1)
    keys = number.expand(batch, heads, tokens, 4).contiguous()
    kept, values = frozen_vit.important_token_selection(
        keys, keys + 0.5, probs, golden.config["token_ratio"], golden.config["token_importance"]
    )
    expected = golden["indices"][layer].sort(dim=-1).values
    assert torch.equal(kept[..., 0].int(), expected)
    assert torch.equal(values, kept + 0.5)
