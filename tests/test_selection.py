"""From pixels to kept keys and values."""

import pytest
import torch

from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.records import Importance
from fpt_fast.selection import keep_count, select_features
from helpers import relative_error, spread_weights, tiny_vit


@pytest.fixture
def backbone() -> FrozenBackbone:
    model = spread_weights(tiny_vit(), scale=0.1)
    return load_backbone(model, dtype="float32", device="cpu")


def test_keep_count_is_the_published_one() -> None:
    assert keep_count(0.2, 1025) == 205
    assert keep_count(0.3, 50) == 15
    assert keep_count(1.0, 17) == 17


@pytest.mark.parametrize("ratio", [0.0, -0.1, 0.05, 1.1])
def test_a_ratio_that_keeps_nothing_or_too_much(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"token_ratio .* keeps .* of 17 tokens"):
        keep_count(ratio, 17)


@pytest.mark.parametrize("importance", ["global", "class_token"])
def test_kept_tokens_are_the_most_important_ones(
    backbone: FrozenBackbone, importance: Importance
) -> None:
    pixels, layers = torch.randn(2, 3, 48, 32), (0, 2, 3)
    kept = select_features(
        backbone,
        pixels,
        layers=layers,
        token_ratio=0.3,
        importance=importance,
        dtype=torch.float32,
    )
    assert kept.kv.shape == (2, 3, 2, 3, 7, 16) and kept.kv.dtype == torch.float32
    assert kept.index.shape == (2, 3, 3, 7) and kept.index.dtype == torch.int32
    for position, state in enumerate(backbone.extract(pixels, layers)):
        maps = (state.q.double() @ state.k.double().mT / 4).softmax(-1)
        scores = maps.mean(2) if importance == "global" else maps[:, :, 0]
        best = scores.topk(7).indices.sort(-1).values
        index = kept.index[:, position].long()
        assert torch.equal(index, best)
        for part, tensor in enumerate((state.k, state.v)):
            expected = tensor.take_along_dim(best[..., None], dim=2)
            assert relative_error(kept.kv[:, position, part], expected) <= 1e-5


def test_a_batch_is_its_images(backbone: FrozenBackbone) -> None:
    pixels = torch.randn(3, 3, 32, 32)
    settings = {"layers": (1, 3), "token_ratio": 0.4, "importance": "global"}
    together = select_features(backbone, pixels, **settings)
    assert together.kv.dtype == torch.float16
    for number in range(3):
        alone = select_features(backbone, pixels[number : number + 1], **settings)
        assert torch.equal(alone.index[0], together.index[number])
        assert relative_error(alone.kv[0], together.kv[number]) <= 1e-3


def test_the_same_pixels_give_the_same_bytes(backbone: FrozenBackbone) -> None:
    pixels = torch.randn(2, 3, 48, 48)
    settings = {"layers": (0, 3), "token_ratio": 0.2, "importance": "global"}
    first, second = (select_features(backbone, pixels, **settings) for _ in range(2))
    assert torch.equal(first.kv, second.kv) and torch.equal(first.index, second.index)


def test_layers_that_come_from_an_iterator_or_a_list(backbone: FrozenBackbone) -> None:
    pixels = torch.randn(1, 3, 32, 32)
    kept = select_features(backbone, pixels, layers=[1], token_ratio=0.2, importance="class_token")
    assert kept.kv.shape == (1, 1, 2, 3, 3, 16)


def test_values_beyond_f16_become_infinite_and_are_not_clamped(backbone: FrozenBackbone) -> None:
    """So that the cache's writer can refuse them, naming the image."""
    with torch.no_grad():
        backbone.vit.block(3).qkv.bias[96:] = 1e5  # the values of the last layer
    kept = select_features(
        backbone, torch.randn(1, 3, 32, 32), layers=(2, 3), token_ratio=0.2, importance="global"
    )
    assert bool(kept.kv[:, 0].isfinite().all())
    assert bool(kept.kv[:, 1, 0].isfinite().all())
    assert bool(kept.kv[:, 1, 1].isinf().all())


def test_class_token_importance_without_a_class_token() -> None:
    backbone = load_backbone(tiny_vit(class_token=False, global_pool="avg"), device="cpu")
    with pytest.raises(ValueError, match="needs a class token, which VisionTransformer has not"):
        select_features(
            backbone,
            torch.randn(1, 3, 32, 32),
            layers=(3,),
            token_ratio=0.5,
            importance="class_token",
        )


def test_bf16_keeps_nearly_the_same_tokens(backbone: FrozenBackbone) -> None:
    model = spread_weights(tiny_vit(), scale=0.1)
    low = load_backbone(model, dtype="bfloat16", device="cpu")
    pixels = torch.randn(2, 3, 64, 64)
    settings = {"layers": (1, 2, 3), "token_ratio": 0.3, "importance": "global"}
    exact, rough = (
        select_features(backbone, pixels, **settings),
        select_features(low, pixels, **settings),
    )
    overlap = [
        len(set(a.tolist()) & set(b.tolist())) / len(a)
        for a, b in zip(exact.index.flatten(0, 2), rough.index.flatten(0, 2), strict=True)
    ]
    # Ties inside the rounding of bf16 (2^-8) may fall either way; nothing else may.
    assert sum(overlap) / len(overlap) >= 0.95
