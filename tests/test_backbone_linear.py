"""A frozen block's linear maps in tiles: where they run, that they are the same function, who may
still look inside.  On a processor without tiles the modules run, and the same must hold."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm.layers
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from fpt_fast.backbone import linear_maps, load_backbone
from fpt_fast.backbone.vit import FrozenBlock
from fpt_fast.ops.implementation import unsupported_reasons
from helpers import assert_within_budget, spread_weights, tiny_vit

WEIGHT = torch.zeros(32, 32, dtype=torch.bfloat16)
HAS_TILES = not unsupported_reasons("frozen_linear", "native", WEIGHT, WEIGHT)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What each call of frozen_linear did after its map."""
    seen: list[str] = []
    own = linear_maps.frozen_linear

    def spy(*args: Any, **rest: Any) -> Tensor:
        done = [name for name in ("residual", "scale") if rest.get(name) is not None]
        seen.append(" ".join([rest.get("activation", "none"), *done]))
        return own(*args, **rest)

    monkeypatch.setattr(linear_maps, "frozen_linear", spy)
    yield seen


def model(**changes: Any) -> VisionTransformer:
    settings = {"img_size": 96, "embed_dim": 64, "num_heads": 2, "depth": 2, **changes}
    return spread_weights(tiny_vit(**settings), scale=0.05)  # type: ignore[return-value]


def block_of(source: VisionTransformer, dtype: torch.dtype = torch.bfloat16) -> FrozenBlock:
    backbone = load_backbone(source, dtype="float32", device="cpu")
    return copy.deepcopy(backbone.vit.block(0)).to(dtype)


def of_tiles(*expected: str) -> list[str]:
    return list(expected) if HAS_TILES else []


def run(block: FrozenBlock, x: Tensor, chunk_rows: int | None = None) -> tuple[Tensor, Tensor]:
    q, k, v = block.project(x)
    return torch.stack([q, k, v]), block.complete(x, q + k + v, chunk_rows)


PLAIN = ("none", "none residual", "gelu", "none residual")
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "plain": ({}, PLAIN),
    "no qkv bias": ({"qkv_bias": False}, PLAIN),
    "layer scale": (
        {"init_values": 0.5},
        ("none", "none residual scale", "gelu", "none residual scale"),
    ),
    "norm in the mlp": ({"scale_mlp_norm": True}, ("none", "none residual")),
    "gated mlp": ({"mlp_layer": timm.layers.SwiGLU}, ("none", "none residual")),
    "other activation": ({"act_layer": nn.ReLU}, ("none", "none residual")),
    "tanh gelu": ({"act_layer": lambda: nn.GELU("tanh")}, ("none", "none residual")),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_it_is_the_same_function(name: str, calls: list[str], monkeypatch: Any) -> None:
    changes, expected = VARIANTS[name]
    source = model(**changes)
    x = torch.randn(3, 145, 64).bfloat16()
    with torch.no_grad():
        ours = run(block_of(source), x)
        assert calls == of_tiles(*expected)
        exact = run(block_of(source).double(), x.double())
        monkeypatch.setattr(linear_maps, "FEWEST_ROWS", 10**9)
        modules = run(block_of(source), x)
    for got, oracle, plain in zip(ours, exact, modules, strict=True):
        assert_within_budget(got, oracle, plain)


def test_chunks_are_of_equal_size(calls: list[str]) -> None:
    """One token more than a chunk must not become a map of one row."""
    block, x = block_of(model()), torch.randn(1, 401, 64).bfloat16()
    with torch.no_grad():
        whole = run(block, x)
        calls.clear()
        parts = run(block, x, chunk_rows=400)
    assert calls == of_tiles("none", *PLAIN[1:], *PLAIN[1:])
    torch.testing.assert_close(parts[1], whole[1], rtol=2**-7, atol=1e-2)


def test_extraction_runs_in_tiles(calls: list[str]) -> None:
    backbone = load_backbone(model(), dtype="bfloat16", device="cpu")
    list(backbone.extract(torch.randn(1, 3, 96, 96), (0, 1)))
    assert calls == of_tiles(*PLAIN, "none")


def test_few_rows_other_dtypes_and_gradients_use_the_modules(calls: list[str]) -> None:
    block = block_of(model()).requires_grad_(False)
    with torch.no_grad():
        run(block, torch.randn(1, 17, 64).bfloat16())
        run(block_of(model(), torch.float32), torch.randn(1, 200, 64))
    run(block, torch.randn(1, 200, 64).bfloat16().requires_grad_())
    assert calls == []
    block.mlp.requires_grad_(True)
    x = torch.randn(1, 200, 64).bfloat16()
    run(block, x)[1].float().sum().backward()
    assert calls == of_tiles("none", "none residual")
    assert all(p.grad is not None for p in block.mlp.parameters())


def test_hooks_see_what_they_watch(calls: list[str]) -> None:
    x = torch.randn(1, 200, 64).bfloat16()
    for name, expected in (
        ("qkv", PLAIN[1:]),
        ("proj", ("none", *PLAIN[2:])),
        ("mlp", PLAIN[:2]),
        ("mlp.fc1", PLAIN[:2]),
        ("mlp.act", PLAIN[:2]),
    ):
        block, seen = block_of(model()).requires_grad_(False), []
        block.get_submodule(name).register_forward_hook(
            lambda module, args, out, seen=seen: seen.append(out.shape)
        )
        calls.clear()
        run(block, x)
        assert len(seen) == 1 and calls == of_tiles(*expected), name


def test_what_replaces_a_map_is_called(calls: list[str]) -> None:
    block = block_of(model()).requires_grad_(False)

    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    doubled = Doubled(64, 192)
    doubled.load_state_dict(block.qkv.state_dict())
    x = torch.randn(1, 200, 64).bfloat16()
    once = torch.cat(block.project(x))
    block.qkv = doubled.bfloat16().requires_grad_(False)
    torch.testing.assert_close(torch.cat(block.project(x)), 2 * once, rtol=2**-6, atol=1e-2)
    assert calls == of_tiles("none")


def test_compiled_code_is_torchs_own(calls: list[str]) -> None:
    torch.compiler.reset()
    graphs = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph.code)
        return graph

    block = block_of(model()).requires_grad_(False)
    x = torch.randn(1, 200, 64).bfloat16()
    torch.compile(lambda x: run(block, x)[1], backend=keep, fullgraph=True)(x)
    assert len(graphs) == 1 and "fpt" not in graphs[0] and calls == []


def test_weights_changed_in_place_count_at_once() -> None:
    """Nothing of them is kept between calls."""
    block, x = block_of(model()).requires_grad_(False), torch.randn(1, 200, 64).bfloat16()
    before = torch.cat(block.project(x))
    block.qkv.weight.mul_(2)
    block.qkv.bias.mul_(2)
    assert torch.equal(torch.cat(block.project(x)), 2 * before)
