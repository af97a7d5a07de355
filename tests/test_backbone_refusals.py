"""Models that the frozen pass cannot run are refused at load time, with the reason."""

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import (
    Attention,
    DiffAttention,
    Mlp,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
    VisionTransformer,
)
from torch import Tensor, nn

from fpt_fast.backbone import BackboneError, FrozenBackbone, load_backbone
from fpt_fast.backbone.self_check import check_own_pass
from helpers import tiny_vit


def load(source: Any, **settings: Any) -> FrozenBackbone:
    return load_backbone(source, **{"dtype": "float32", "device": "cpu", **settings})


class _TwiceTheScale(Attention):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.scale *= 2
        self.fused_attn = False


class _Inverted(Attention):
    """Something else in the same parts: attends to the least similar."""

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(-q, k, v).transpose(1, 2).flatten(2))


class _MixingMlp(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + x.mean(1, keepdim=True))


class _ShiftBetweenBlocks(VisionTransformer):
    def forward_features(self, x: Tensor, **_: Any) -> Tensor:
        x = self._pos_embed(self.patch_embed(x))
        for block in self.blocks:
            x = block(x) + 0.1
        return self.norm(x)


class _Constant(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = value

    def forward(self, x: Tensor) -> Tensor:
        return torch.full_like(x, self.value)


class _Hybrid(PatchEmbed):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.backbone = nn.Conv2d(3, 3, 3, padding=1)


class _Overlapping(PatchEmbed):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.proj = nn.Conv2d(3, 48, 10, 8, padding=1)


def _with(attribute: str, value: Any) -> VisionTransformer:
    model = tiny_vit()
    setattr(model, attribute, value)
    return model


def _half_a_pass() -> VisionTransformer:
    model = tiny_vit()
    model.forward_features = lambda x: model.norm(model._pos_embed(model.patch_embed(x)))
    return model


def _shift_between_blocks() -> nn.Module:
    return _ShiftBetweenBlocks(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3)


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "swin": (
        lambda: SwinTransformer(
            img_size=32, patch_size=4, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2)
        ),
        "no `blocks`: it is a SwinTransformer",
    ),
    "conv net": (lambda: timm.create_model("test_resnet"), "no `blocks`: it is a ResNet"),
    "rotary positions": (
        lambda: Eva(
            img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, use_rot_pos_emb=True
        ),
        "it has `rope`: relative or rotary",
    ),
    "parallel scaling": (
        lambda: tiny_vit(block_fn=ParallelScalingBlock),
        r"blocks\[0\] is a ParallelScalingBlock without `norm1`",
    ),
    "parallel things": (
        lambda: tiny_vit(block_fn=ParallelThingsBlock),
        r"blocks\[0\] is a ParallelThingsBlock without `norm1`",
    ),
    "post-norm": (
        lambda: tiny_vit(block_fn=ResPostBlock),
        r"does not reproduce its blocks\[0\].attn.*post-norm",
    ),
    "differential": (
        lambda: tiny_vit(attn_layer=DiffAttention),
        "`lambda_q1`.*`sub_norm`, which the",
    ),
    "scale": (lambda: tiny_vit(attn_layer=_TwiceTheScale), "scales scores by 0.5, not by 0.25"),
    "hidden behind layer-scale": (
        lambda: tiny_vit(attn_layer=_Inverted, init_values=1e-6),
        r"does not reproduce its blocks\[0\].attn",
    ),
    "mlp mixes tokens": (
        lambda: tiny_vit(mlp_layer=_MixingMlp),
        r"does not reproduce its blocks\[0\].mlp, on a few tokens at a time",
    ),
    "between blocks": (_shift_between_blocks, r"changes tokens between blocks before blocks\[1\]"),
    "overlapping patches": (lambda: tiny_vit(embed_layer=_Overlapping), "its patches overlap"),
    "hybrid": (
        lambda: tiny_vit(embed_layer=_Hybrid),
        "patch_embed is a _Hybrid with `backbone`, which the frozen pass does not know",
    ),
    "one channel": (lambda: tiny_vit(in_chans=1), "it takes 1 channels, not 3"),
    "positions of another grid": (
        lambda: _with("pos_embed", nn.Parameter(torch.zeros(1, 12, 48))),
        r"its `pos_embed` is \(1, 12, 48\)",
    ),
    "positions it does not use": (
        lambda: _with(
            "_pos_embed", lambda x: torch.cat([torch.zeros(1, 1, 48), x.flatten(1, 2)], 1)
        ),
        "does not reproduce its embedding",
    ),
    "blocks that never run": (_half_a_pass, r"never runs"),
    "not a list of blocks": (lambda: _with("blocks", nn.Identity()), "`blocks` are a Identity"),
    "own forward fails": (
        lambda: _with("norm", nn.LayerNorm(47)),
        "its own forward fails on one 32x32 image",
    ),
    "no values": (lambda: tiny_vit().to("meta"), "on the meta device, without values"),
    "not a number": (
        lambda: _with("norm_pre", _Constant(float("nan"))),
        "its own embedding gives values that are not finite",
    ),
    "low-rank weights beside qkv": (lambda: _with_lora(), "with `lora`, which the frozen pass"),
}


def _with_lora() -> VisionTransformer:
    model = tiny_vit()
    model.blocks[2].attn.lora = nn.Linear(48, 144)
    return model


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_work_are_refused_with_the_reason(name: str) -> None:
    make, reason = REFUSED[name]
    with pytest.raises(BackboneError, match=reason) as caught:
        load(make())
    assert "cannot be used as a frozen model" in str(caught.value)


def test_the_self_check_is_cheap_for_large_images() -> None:
    """Few tokens go through the blocks, whatever the native size."""
    model = tiny_vit(img_size=256)
    seen = []
    model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    check_own_pass(model, (256, 256))
    assert max(seen) < 1 + 32 * 32


def test_half_precision_does_not_soften_the_self_check() -> None:
    with pytest.raises(BackboneError, match="does not reproduce"):
        load(tiny_vit(attn_layer=_Inverted).to(torch.bfloat16))
