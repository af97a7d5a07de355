"""The authors' module names: signatures, refusals, loading of Hugging Face directories."""

import inspect
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fpt_fast.compat import frozen_vit, side_vit
from fpt_fast.compat.bridge import FineGrainedPromptTuning, FusionModule

LAYERS, HEADS, WIDTH, BATCH, KEPT = 2, 3, 24, 2, 5


def config(**changes: object) -> SimpleNamespace:
    values: dict[str, object] = {
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "intermediate_size": 48,
        "image_size": 16,
        "patch_size": 8,
        "num_labels": 4,
        "layers_to_extract": [0, 1],
        "token_ratio": 0.5,
        "token_imp": "global",
    }
    return SimpleNamespace(**{**values, **changes})


def frozen(**changes: object) -> frozen_vit.ViTForImageClassification:
    return frozen_vit.ViTForImageClassification(config(**changes)).eval()


def names(function: object) -> list[str]:
    return [p for p in inspect.signature(function).parameters if p != "self"]  # type: ignore[arg-type]


def test_signatures_are_the_authors() -> None:
    assert names(FusionModule.__init__) == [
        "num_layers",
        "in_dim",
        "out_dim",
        "num_heads",
        "num_prompts",
        "prompt_dim",
        "prompt_norm",
        "prompt_proj",
        "p_dropout",
    ]
    assert names(FusionModule.forward) == ["key_layer", "value_layer"]
    assert names(FineGrainedPromptTuning.__init__) == ["side_encoder", "fusion_module"]
    assert names(FineGrainedPromptTuning.forward) == ["x_coarse", "key_states", "value_states"]
    rest = [
        "head_mask",
        "labels",
        "output_attentions",
        "output_hidden_states",
        "interpolate_pos_encoding",
        "return_dict",
    ]
    assert names(frozen_vit.ViTForImageClassification.forward) == ["pixel_values", *rest]
    assert names(side_vit.ViTForImageClassification.forward) == [
        "pixel_values",
        "fine_grained_states",
        *rest,
    ]
    assert names(frozen_vit.important_token_selection) == [
        "key_layer",
        "value_layer",
        "attention_probs",
        "token_ratio",
        "token_imp",
    ]


def test_order_of_parameters_is_the_authors() -> None:
    """An optimiser's state is saved by position: another order would load into wrong tensors."""
    layer = [
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
        "attention.output.dense",
        "intermediate.dense",
        "output.dense",
        "layernorm_before",
        "layernorm_after",
    ]
    side = [
        "vit.embeddings.cls_token",
        "vit.embeddings.position_embeddings",
        *(
            f"{stem}.{kind}"
            for stem in (
                "vit.embeddings.patch_embeddings.projection",
                *(f"vit.encoder.layer.{i}.{part}" for i in range(LAYERS) for part in layer),
                "vit.layernorm",
                "classifier",
            )
            for kind in ("weight", "bias")
        ),
    ]
    encoder = side_vit.ViTForImageClassification(config())
    model = FineGrainedPromptTuning(encoder, FusionModule(LAYERS, 96, WIDTH, HEADS, 4))
    fusion = ["prompts", "layer_norm.weight", "layer_norm.bias", "out_proj.weight", "out_proj.bias"]
    assert [name for name, _ in model.named_parameters()] == [
        *(f"side_encoder.{name}" for name in side),
        *(f"fusion_module.{name}" for name in fusion),
    ]
    assert [name for name, _ in frozen().named_parameters()] == side


def test_defaults_are_the_authors() -> None:
    module = FusionModule(LAYERS, WIDTH, 8, HEADS, 4)
    assert module.prompts.shape == (LAYERS, 1, 4, WIDTH)
    assert isinstance(module.layer_norm, nn.LayerNorm)
    assert isinstance(module.prompt_proj, nn.Identity)
    assert module.dropout.p == 0.5
    assert (module.in_dim, module.out_dim, module.head_size, module.prompt_dim) == (24, 8, 8, 24)


def test_features_that_want_a_gradient_are_refused() -> None:
    module = FusionModule(LAYERS, WIDTH, 8, HEADS, 4)
    states = torch.randn(LAYERS, BATCH, HEADS, KEPT, 8)
    with pytest.raises(ValueError, match="must not require grad"):
        module(states.clone().requires_grad_(), states)
    with pytest.raises(ValueError, match="must both be"):
        module(states, states[:, :1])
    with pytest.raises(ValueError, match="kv must be"):
        module(states[:1], states[:1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_mask": torch.ones(LAYERS)}, "head_mask is not supported"),
        ({"labels": torch.zeros(BATCH)}, "labels is not supported"),
        ({"output_attentions": True}, "output_attentions is not supported"),
        ({"output_hidden_states": True}, "output_hidden_states is not supported"),
        ({"return_dict": False}, "return_dict must be True"),
    ],
)
def test_what_the_scripts_never_ask_for(arguments: dict[str, object], message: str) -> None:
    pixels = torch.zeros(BATCH, 3, 16, 16)
    for model in (frozen(), side_vit.ViTForImageClassification(config())):
        with pytest.raises(ValueError, match=message):
            model(pixels, **arguments)


def test_what_the_config_asks_for_counts() -> None:
    pixels = torch.zeros(BATCH, 3, 16, 16)
    with pytest.raises(ValueError, match="output_attentions is not supported"):
        frozen(output_attentions=True)(pixels)
    with pytest.raises(ValueError, match="return_dict must be True"):
        frozen(use_return_dict=False)(pixels)
    # What a call says goes before the config, as at Hugging Face's.
    frozen(output_attentions=True, use_return_dict=False)(
        pixels, output_attentions=False, return_dict=True
    )


def test_other_sizes_need_interpolation() -> None:
    model = side_vit.ViTForImageClassification(config())
    pixels = torch.randn(BATCH, 3, 24, 32)
    with pytest.raises(ValueError, match="allow others with interpolate_pos_encoding"):
        model(pixels)
    assert model(pixels, interpolate_pos_encoding=True).logits.shape == (BATCH, 4)


def test_states_that_do_not_fit_the_side_encoder() -> None:
    model = side_vit.ViTForImageClassification(config())
    with pytest.raises(ValueError, match="fine_grained_states must be"):
        model(torch.zeros(BATCH, 3, 16, 16), torch.zeros(LAYERS + 1, BATCH, 4, WIDTH))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "swoosh"}, "hidden_act must be one of"),
        ({"num_attention_heads": 5}, "num_attention_heads must divide"),
        ({"layers_to_extract": [0, 2]}, "layers_to_extract must be layer numbers in 0..1"),
        ({"layers_to_extract": []}, "layers_to_extract must be layer numbers"),
        ({"token_imp": "best"}, "token_imp must be"),
    ],
)
def test_configs_that_cannot_work(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        frozen(**changes)


@pytest.mark.parametrize("name", ["hidden_size", "token_ratio", "layers_to_extract"])
def test_configs_that_lack_something(name: str) -> None:
    values = config()
    delattr(values, name)
    with pytest.raises(ValueError, match=f"config must have the attribute {name}"):
        frozen_vit.ViTForImageClassification(values)


@pytest.mark.parametrize("ratio", [0.1, 1.5])
def test_ratio_that_keeps_nothing_or_too_much(ratio: float) -> None:
    with pytest.raises(ValueError, match="token_ratio must keep"):
        frozen(token_ratio=ratio)(torch.zeros(1, 3, 16, 16))


def test_only_extracted_layers_are_returned_and_in_order() -> None:
    torch.manual_seed(1)
    both = frozen(layers_to_extract=(1, 0))
    pixels = torch.randn(BATCH, 3, 16, 16)
    output, keys, values = both(pixels)
    assert keys.shape == values.shape == (2, BATCH, HEADS, 2, WIDTH // HEADS)
    for layer in (0, 1):
        one = frozen(layers_to_extract=[layer])
        one.load_state_dict(both.state_dict())
        alone, key, value = one(pixels)
        torch.testing.assert_close(key[0], keys[layer])
        torch.testing.assert_close(value[0], values[layer])
        torch.testing.assert_close(alone.logits, output.logits)


def test_frozen_model_records_no_gradient_and_wants_evaluation_mode() -> None:
    pixels = torch.zeros(1, 3, 16, 16)
    output, keys, _ = frozen()(pixels)
    assert not output.logits.requires_grad
    assert not keys.requires_grad
    frozen().train()(pixels)
    with pytest.raises(ValueError, match="call .eval"):
        frozen(hidden_dropout_prob=0.1).train()(pixels)


def save_directory(
    folder: Path, tensors: dict[str, torch.Tensor], name: str = "model.safetensors"
) -> None:
    folder.mkdir(exist_ok=True)
    values = {
        k: v for k, v in vars(config()).items() if not k.startswith(("token", "layers", "num_l"))
    }
    values["id2label"] = {str(i): f"L{i}" for i in range(4)}
    values["model_type"] = "vit"
    (folder / "config.json").write_text(json.dumps(values))
    if name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_from_pretrained(tmp_path: Path, name: str) -> None:
    original = frozen()
    save_directory(tmp_path / "vit", original.state_dict(), name)
    values = frozen_vit.read_config_file(tmp_path / "vit")
    assert values.num_labels == 4
    values.token_imp, values.token_ratio, values.layers_to_extract = "global", 0.5, [0, 1]
    model = frozen_vit.ViTForImageClassification.from_pretrained(tmp_path / "vit", config=values)
    assert not model.training
    pixels = torch.randn(BATCH, 3, 16, 16)
    for got, expected in zip(model(pixels)[1:], original(pixels)[1:], strict=True):
        assert torch.equal(got, expected)


def test_from_pretrained_of_a_bare_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = frozen()
    bare = {
        name.removeprefix("vit."): tensor
        for name, tensor in original.state_dict().items()
        if name.startswith("vit.")
    }
    bare["pooler.dense.weight"] = torch.zeros(WIDTH, WIDTH)
    save_directory(tmp_path / "vit", bare)
    with caplog.at_level(logging.WARNING, "fpt_fast"):
        model = frozen_vit.ViTForImageClassification.from_pretrained(tmp_path / "vit", config())
    assert "has no classifier" in caplog.text
    pixels = torch.randn(1, 3, 16, 16)
    assert torch.equal(model(pixels)[1], original(pixels)[1])


def test_from_pretrained_names_what_does_not_fit(tmp_path: Path) -> None:
    tensors = frozen().state_dict()
    tensors["vit.surprise"] = tensors.pop("vit.layernorm.weight")
    tensors["classifier.bias"] = torch.zeros(7)
    save_directory(tmp_path / "vit", tensors)
    with pytest.raises(ValueError) as caught:
        frozen_vit.ViTForImageClassification.from_pretrained(tmp_path / "vit", config())
    for part in (
        "missing vit.layernorm.weight",
        "unexpected vit.surprise",
        "classifier.bias must be (4,), got (7,)",
    ):
        assert part in str(caught.value)


def test_from_pretrained_needs_a_sound_directory(tmp_path: Path) -> None:
    load = frozen_vit.ViTForImageClassification.from_pretrained
    save_directory(tmp_path / "vit", frozen().state_dict())
    (tmp_path / "vit" / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a sound file"):
        load(tmp_path / "vit", config())
    (tmp_path / "vit" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="must hold one of"):
        load(tmp_path / "vit", config())
    (tmp_path / "vit" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'vit', got 'bert'"):
        load(tmp_path / "vit")


@pytest.mark.parametrize("importance", ["global", "class_token"])
def test_important_token_selection_with_ties(importance: str) -> None:
    probs = torch.full((1, 1, 4, 4), 0.25)
    keys = torch.arange(4.0).view(1, 1, 4, 1)
    kept, values = frozen_vit.important_token_selection(keys, -keys, probs, 0.5, importance)
    assert kept.flatten().tolist() == [0, 1]
    assert values.flatten().tolist() == [0, -1]
    with pytest.raises(ValueError, match="token_imp must be"):
        frozen_vit.important_token_selection(keys, keys, probs, 0.5, "best")
