"""The frozen pass is the authors' function: hidden states, scores, kept tokens, keys and values."""

from pathlib import Path

import pytest
import torch
from huggingface_folder import golden_folder

from benchmarks.plain.frozen_pass import PlainFrozenVit
from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.ops import token_scores
from fpt_fast.records import Attention
from fpt_fast.selection import keep_count, select_features
from helpers import Golden, relative_error

TOLERANCE = 1e-5


@pytest.fixture
def backbone(golden: Golden, tmp_path: Path) -> FrozenBackbone:
    folder = golden_folder(golden, tmp_path / golden.name)
    return load_backbone(
        folder, dtype="float32", device="cpu", position_interpolation="bicubic_scale"
    )


def test_spec(golden: Golden, backbone: FrozenBackbone) -> None:
    spec, config = backbone.spec, golden.config
    assert (spec.hidden_size, spec.num_heads) == (
        config["hidden_size"],
        config["num_attention_heads"],
    )
    assert spec.depth == config["num_hidden_layers"]
    assert spec.patch_size == (config["patch_size"],) * 2
    assert spec.image_size == (config["image_size"],) * 2
    size = (config["input_height"], config["input_width"])
    assert spec.num_tokens(size) == golden["frozen_hidden_states"].shape[2]


def test_hidden_states(golden: Golden, backbone: FrozenBackbone) -> None:
    expected = golden["frozen_hidden_states"]
    vit = backbone.vit
    with torch.no_grad():
        x = vit.embedding(golden["pixel_values"], "bicubic_scale")
        assert relative_error(x, expected[0]) <= TOLERANCE
        for index in range(backbone.spec.depth):
            x = vit.block(index)(x)
            assert relative_error(x, expected[index + 1]) <= TOLERANCE, f"after layer {index}"


def test_logits(golden: Golden, backbone: FrozenBackbone) -> None:
    features = backbone.features(golden["pixel_values"])
    head = golden.group("frozen.classifier")
    logits = features @ head["weight"].T + head["bias"]
    assert relative_error(logits, golden["frozen_logits"]) <= TOLERANCE


def test_scores_of_every_layer(golden: Golden, backbone: FrozenBackbone) -> None:
    importance = golden.config["token_importance"]
    layers = range(backbone.spec.depth)
    for state in backbone.extract(golden["pixel_values"], layers, importance=importance):
        scores = token_scores(state.q, state.k, importance=importance)
        assert relative_error(scores, golden["scores"][state.layer]) <= TOLERANCE
        if state.scores is not None:
            assert importance == "global"
            assert relative_error(state.scores, golden["scores"][state.layer]) <= TOLERANCE


@pytest.mark.parametrize("impl", ["auto", "triton"])
def test_kept_tokens(golden: Golden, impl: Attention, tmp_path: Path) -> None:
    """With ``"triton"``, attention, scores and selection all run as kernels, interpreted."""
    config = golden.config
    layers = config["layers_to_extract"]
    kept = select_features(
        load_backbone(
            golden_folder(golden, tmp_path / golden.name),
            dtype="float32",
            device="cpu",
            position_interpolation="bicubic_scale",
            attention=impl,
        ),
        golden["pixel_values"],
        layers=layers,
        token_ratio=config["token_ratio"],
        importance=config["token_importance"],
        dtype=torch.float32,
        impl=impl,
    )
    index, order = golden["indices"][layers].sort(dim=-1)  # [L, B, H, K]
    assert kept.index.shape[-1] == keep_count(
        config["token_ratio"], golden["frozen_hidden_states"].shape[2]
    )
    assert torch.equal(kept.index.transpose(0, 1), index.to(torch.int32))
    for part, name in enumerate(("key_states", "value_states")):
        expected = golden[name].take_along_dim(order[..., None], dim=3)
        assert relative_error(kept.kv[:, :, part].transpose(0, 1), expected) <= TOLERANCE, name


def test_the_plain_baseline_is_the_same_function(golden: Golden) -> None:
    """A baseline that computes something else would make the benchmark's ratio worthless."""
    config = golden.config
    plain = PlainFrozenVit(
        golden.group("frozen.vit"),
        num_heads=config["num_attention_heads"],
        layer_norm_eps=1e-12,
        token_ratio=config["token_ratio"],
        importance=config["token_importance"],
    )
    states = plain(golden["pixel_values"])
    assert len(states) == config["num_hidden_layers"]
    for layer, state in enumerate(states):
        assert relative_error(state.scores, golden["scores"][layer]) <= TOLERANCE
        assert torch.equal(state.index.sort(-1).values, golden["indices"][layer].long().sort(-1)[0])
    for position, layer in enumerate(config["layers_to_extract"]):
        assert relative_error(states[layer].keys, golden["key_states"][position]) <= TOLERANCE
        assert relative_error(states[layer].values, golden["value_states"][position]) <= TOLERANCE
