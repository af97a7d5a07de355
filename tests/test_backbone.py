"""Loading and running frozen models that come from timm or from the user."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import (
    VisionTransformer,
)
from torch import Tensor, nn

from fpt_fast.backbone import BackboneError, FrozenBackbone, load_backbone
from fpt_fast.backbone.positions import interpolate_positions
from helpers import relative_error, spread_weights, tiny_vit


def load(source: Any, **settings: Any) -> FrozenBackbone:
    return load_backbone(source, **{"dtype": "float32", "device": "cpu", **settings})


def distilled() -> VisionTransformer:
    return VisionTransformerDistilled(
        img_size=32,
        patch_size=8,
        embed_dim=48,
        depth=4,
        num_heads=3,
        num_classes=0,
        dynamic_img_size=True,
    ).eval()


VARIANTS: dict[str, Callable[[], VisionTransformer]] = {
    "vit": tiny_vit,
    "no qkv bias": lambda: tiny_vit(qkv_bias=False),
    "deit, distilled": distilled,
    "deit 3": lambda: tiny_vit(no_embed_class=True, init_values=1e-6),
    "dinov2 with registers": lambda: tiny_vit(reg_tokens=4, no_embed_class=True, init_values=1e-5),
    "registers with positions": lambda: tiny_vit(reg_tokens=2),
    "qk-norm": lambda: tiny_vit(qk_norm=True),
    "scale norms": lambda: tiny_vit(scale_attn_norm=True, scale_mlp_norm=True),
    "clip, norm before blocks": lambda: tiny_vit(pre_norm=True),
    "no class token": lambda: tiny_vit(class_token=False, global_pool="avg"),
    "no class token, registers": lambda: tiny_vit(
        class_token=False, global_pool="avg", reg_tokens=2, no_embed_class=True
    ),
    "no positions": lambda: tiny_vit(pos_embed="none"),
    "patches 8x4": lambda: tiny_vit(patch_size=(8, 4)),
    "two registers, gated mlp": lambda: tiny_vit(mlp_layer=timm.layers.SwiGLU, reg_tokens=2),
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> VisionTransformer:
    return spread_weights(VARIANTS[request.param](), scale=0.1)


def own_states(model: VisionTransformer, pixels: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of every layer as the model's own attention computes them, caught by hooks."""
    seen: list[dict[str, Tensor]] = [{} for _ in model.blocks]
    handles = []
    for store, block in zip(seen, model.blocks, strict=True):
        for name in ("q_norm", "k_norm", "qkv"):

            def keep(_: nn.Module, args: Any, out: Tensor, store=store, name=name) -> None:
                store[name] = out

            handles.append(getattr(block.attn, name).register_forward_hook(keep))
    with torch.no_grad():
        model.forward_features(pixels)
    for handle in handles:
        handle.remove()
    heads = model.blocks[0].attn.num_heads
    return [
        (
            s["q_norm"],
            s["k_norm"],
            s["qkv"].chunk(3, -1)[2].unflatten(2, (heads, -1)).transpose(1, 2),
        )
        for s in seen
    ]


@pytest.mark.parametrize("size", [(32, 32), (48, 16)], ids=["native", "other"])
def test_states_are_those_of_the_models_own_attention(
    variant: VisionTransformer, size: tuple[int, int]
) -> None:
    backbone = load(variant)
    pixels = torch.randn(2, 3, *size)
    expected = own_states(variant, pixels)
    states = list(backbone.extract(pixels, range(4)))
    assert [state.layer for state in states] == [0, 1, 2, 3]
    for state, own in zip(states, expected, strict=True):
        assert state.q.shape == (2, 3, backbone.spec.num_tokens(size), backbone.spec.head_width)
        for got, want in zip((state.q, state.k, state.v), own, strict=True):
            assert relative_error(got, want) <= 1e-5


def test_features(variant: VisionTransformer) -> None:
    pixels = torch.randn(2, 3, 32, 48)
    with torch.no_grad():
        tokens = variant.forward_features(pixels)
        if variant.cls_token is not None:
            expected = tokens[:, 0]
        else:
            expected = variant.fc_norm(tokens[:, variant.num_prefix_tokens :].mean(1))
    features = load(variant).features(pixels)
    assert features.dtype == torch.float32
    assert relative_error(features, expected) <= 1e-5


def test_spec_of_a_model_with_everything() -> None:
    model = tiny_vit(reg_tokens=4, patch_size=(8, 4), img_size=(32, 16))
    spec = load(model).spec
    assert (spec.name, spec.hidden_size, spec.num_heads) == ("VisionTransformer", 48, 3)
    assert (spec.depth, spec.patch_size, spec.image_size) == (4, (8, 4), (32, 16))
    assert (spec.prefix_tokens, spec.has_class_token) == (5, True)
    assert spec.num_tokens((16, 16)) == 5 + 2 * 4


class Calls:
    """Counts how often the parts of every block run."""

    def __init__(self, backbone: FrozenBackbone) -> None:
        self.seen: list[str] = []
        for index, block in enumerate(backbone.vit.blocks):
            for name in ("qkv", "proj", "mlp"):
                getattr(block, name).register_forward_hook(self._count(f"{name}{index}"))

    def _count(self, name: str) -> Callable[..., None]:
        return lambda *_: self.seen.append(name)


def test_the_pass_stops_after_the_last_extracted_layer() -> None:
    backbone = load(tiny_vit())
    calls = Calls(backbone)
    states = list(backbone.extract(torch.randn(1, 3, 32, 32), (0, 2)))
    assert [state.layer for state in states] == [0, 2]
    assert calls.seen == ["qkv0", "proj0", "mlp0", "qkv1", "proj1", "mlp1", "qkv2"]


def test_extract_is_lazy() -> None:
    backbone = load(tiny_vit())
    calls = Calls(backbone)
    states = backbone.extract(torch.randn(1, 3, 32, 32), (1, 3))
    assert calls.seen == []
    assert next(states).layer == 1
    assert calls.seen == ["qkv0", "proj0", "mlp0", "qkv1"]


def test_global_importance_comes_with_the_attention() -> None:
    backbone = load(spread_weights(tiny_vit(), scale=0.1))
    states = list(backbone.extract(torch.randn(2, 3, 32, 32), (0, 1, 3), importance="global"))
    for state in states[:-1]:
        scale = state.q.shape[-1] ** -0.5
        expected = (state.q @ state.k.mT * scale).double().softmax(-1).mean(2)
        assert state.scores is not None
        assert relative_error(state.scores, expected) <= 1e-5
    assert states[-1].scores is None


def test_scores_are_not_computed_unasked() -> None:
    states = load(tiny_vit()).extract(torch.randn(1, 3, 32, 32), (0, 1), importance="class_token")
    assert all(state.scores is None and state.lse is None for state in states)


def test_scores_do_not_change_the_states() -> None:
    backbone = load(spread_weights(tiny_vit(), scale=0.1))
    pixels = torch.randn(1, 3, 32, 32)
    plain = list(backbone.extract(pixels, range(4)))
    scored = list(backbone.extract(pixels, range(4), importance="global"))
    assert all(relative_error(a.k, b.k) <= 1e-5 for a, b in zip(scored, plain, strict=True))


def test_chunks_of_tokens_change_nothing() -> None:
    block = load(spread_weights(tiny_vit(), scale=0.1)).vit.block(0)
    x = torch.randn(3, 17, 48)
    attended = torch.randn(3, 3, 17, 16)
    assert relative_error(block.complete(x, attended, 12), block.complete(x, attended)) <= 1e-6


def test_states_can_be_trained_on() -> None:
    """Training without a cache saves them for backward, which inference tensors do not allow."""
    state = next(load(tiny_vit()).extract(torch.randn(1, 3, 32, 32), (0,)))
    query = torch.randn(1, 3, 2, 16, requires_grad=True)
    (query @ state.k.mT @ state.v).sum().backward()
    assert query.grad is not None and not state.k.requires_grad


def test_grad_mode_does_not_leak_out_of_the_generator() -> None:
    states = load(tiny_vit()).extract(torch.randn(1, 3, 32, 32), (0, 1))
    next(states)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("layers", [(), (2, 1), (1, 1), (0, 4), (-1, 2)])
def test_layers_that_cannot_be(layers: tuple[int, ...]) -> None:
    with pytest.raises(BackboneError, match=r"layers must be ascending.*between 0 and 3"):
        load(tiny_vit()).extract(torch.randn(1, 3, 32, 32), layers)


def test_a_size_that_the_patch_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"multiple of the patch size 8x8, got 30x32.*32x32"):
        load(tiny_vit()).extract(torch.randn(1, 3, 30, 32), (0,))


@pytest.mark.parametrize(
    "pixels", [torch.randn(3, 32, 32), torch.randn(1, 1, 32, 32), torch.ones(1, 3, 32, 32).byte()]
)
def test_pixels_that_are_not_a_batch(pixels: Tensor) -> None:
    with pytest.raises(BackboneError, match=r"pixels must be \[B, 3, h, w\]"):
        load(tiny_vit()).extract(pixels, (0,))
    with pytest.raises(BackboneError, match=r"pixels must be \[B, 3, h, w\]"):
        load(tiny_vit()).features(pixels)


def test_timm_positions_are_timms() -> None:
    position = torch.randn(1, 4 * 5, 6)
    expected = resample_abs_pos_embed(position, (7, 3), (4, 5), num_prefix_tokens=0)
    assert torch.equal(interpolate_positions(position, (4, 5), (7, 3), "timm"), expected)


def test_positions_of_the_native_grid_are_exact() -> None:
    position = torch.randn(1, 20, 6)
    for mode in ("timm", "bicubic_scale"):
        assert torch.equal(interpolate_positions(position, (4, 5), (4, 5), mode), position)


def test_the_two_interpolations_differ_and_unknown_ones_are_refused() -> None:
    model = spread_weights(tiny_vit())
    pixels = torch.randn(1, 3, 48, 48)
    timms = next(load(model).extract(pixels, (0,)))
    authors = next(load(model, position_interpolation="bicubic_scale").extract(pixels, (0,)))
    assert relative_error(timms.k, authors.k) > 1e-3
    with pytest.raises(BackboneError, match="position_interpolation must be one of timm, bicubic"):
        load(model, position_interpolation="bilinear")


def test_half_precision_interpolates_the_exact_positions() -> None:
    model = spread_weights(tiny_vit())
    low = load(model, dtype="bfloat16").vit.embedding
    _, position = low._offsets((6, 6), "timm", torch.bfloat16)
    exact = interpolate_positions(model.pos_embed[:, 1:], (4, 4), (6, 6), "timm")
    assert torch.equal(position, exact.to(torch.bfloat16))


class _OwnBlock(nn.Module):
    """The least that a block must have."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(24), nn.LayerNorm(24)
        self.attn = _OwnAttention()
        self.mlp = nn.Sequential(nn.Linear(24, 40), nn.ReLU(), nn.Linear(40, 24))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class _OwnAttention(nn.Module):
    num_heads = 2

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, 2, 12)).permute(2, 0, 3, 1, 4)
        attention = (q @ k.mT / 12**0.5).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).flatten(2))


class _OwnVit(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, 24, 4, 4)
        self.patch_embed.img_size = 16
        self.cls_token = nn.Parameter(torch.randn(1, 1, 24))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, 24))
        self.blocks = nn.ModuleList([_OwnBlock(), _OwnBlock()])
        self.norm = nn.LayerNorm(24)
        self.head = nn.Linear(24, 3)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embed.proj(pixels).flatten(2).mT
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def test_a_module_of_the_users_own() -> None:
    model = _OwnVit()
    backbone = load(model)
    assert backbone.spec.name == "_OwnVit"
    assert backbone.spec.image_size == (16, 16)
    pixels = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert relative_error(model.head(backbone.features(pixels)), model(pixels)) <= 1e-5
    assert backbone.features(torch.randn(1, 3, 24, 8)).shape == (1, 24)


def test_the_users_module_is_left_as_it_was() -> None:
    model = tiny_vit().train()
    before = copy.deepcopy(model.state_dict())
    load(model, dtype="bfloat16")
    assert model.training
    assert all(p.requires_grad and p.dtype == torch.float32 for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.blocks[0]._forward_hooks


def test_a_module_in_half_precision_is_checked_in_f32() -> None:
    model = tiny_vit().to(torch.bfloat16)
    backbone = load(model)
    assert backbone.vit.block(0).qkv.weight.dtype == torch.float32


def test_loading_does_not_move_the_global_random_numbers() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    load("test_vit", pretrained=False)
    assert torch.equal(torch.rand(3), expected)
