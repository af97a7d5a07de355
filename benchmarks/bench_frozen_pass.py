"""Preloading, one image: frozen pass and selection, against the plain algorithm and timm's forward.

All three alternate within each round, so that a busy machine slows them alike.  ``--full`` runs
ViT-B at 512 px as published; without it the model is tiny and only the results count.
"""

from dataclasses import dataclass
from typing import Any

import psutil
import pytest
import torch
from huggingface_folder import tensors_of
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from benchmarks.beside import alternate, dtype_name, speeds
from benchmarks.counts import Count
from benchmarks.frozen_pass_memory import added_bytes
from benchmarks.plain.frozen_pass import PlainFrozenVit
from fpt_fast.backbone import FrozenBackbone, load_backbone
from fpt_fast.records import SelectedTokens
from fpt_fast.selection import select_features
from helpers import spread_weights

TOKEN_RATIO = 0.2


@dataclass
class Contest:
    """One model in three forms, and one image."""

    model: VisionTransformer
    backbone: FrozenBackbone
    exact: FrozenBackbone
    plain: PlainFrozenVit
    pixels: Tensor
    layers: range

    def run_ours(self, backbone: FrozenBackbone | None = None) -> SelectedTokens:
        return select_features(
            backbone or self.backbone,
            self.pixels,
            layers=self.layers,
            token_ratio=TOKEN_RATIO,
            importance="global",
        )

    def run_plain(self) -> Tensor:
        kept = self.plain(self.pixels)
        return torch.stack([kept[layer].index.sort(-1).values for layer in self.layers], 1)

    @torch.no_grad()
    def run_timm(self) -> Tensor:
        return self.model.forward_features(self.pixels.to(self.backbone.dtype))

    @property
    def weight_bytes(self) -> int:
        """Of the frozen model, each read once."""
        return sum(p.nbytes for p in self.backbone.vit.parameters())

    @property
    def flop(self) -> float:
        """Operations of our pass: no dead work in the last layer, one product for its scores."""
        spec, (height, width) = self.backbone.spec, self.pixels.shape[2:]
        tokens = spec.num_tokens((height, width))
        return pass_flop(height * width, tokens, spec.hidden_size, spec.depth)


def pass_flop(pixels: int, n: int, c: int, depth: int) -> float:
    """Of one image with ``n`` tokens of width ``c``."""
    block = 24 * n * c * c + 4 * n * n * c
    return 2 * 3 * pixels * c + (depth - 1) * block + 6 * n * c * c + 2 * n * n * c


@pytest.fixture(scope="module")
def contest(request: pytest.FixtureRequest) -> Contest:
    return make_contest(request.config.getoption("--full"))


def make_contest(
    full: bool,
    device: str = "cpu",
    dtype: str = "auto",
    images: int = 1,
    attention: str = "auto",
) -> Contest:
    """ViT-B at 512 px, or a tiny model, with random weights."""
    shape = (
        {"embed_dim": 768, "depth": 12, "num_heads": 12}
        if full
        else {"embed_dim": 48, "depth": 4, "num_heads": 3}
    )
    torch.manual_seed(0)
    model = VisionTransformer(img_size=224, num_classes=0, dynamic_img_size=True, **shape).eval()
    # Random initial weights give maps so flat that nothing is more important than anything.
    spread_weights(model, scale=0.01 if full else 0.1)
    settings = {"device": device, "position_interpolation": "bicubic_scale"}
    backbone = load_backbone(model, dtype=dtype, attention=attention, **settings)
    exact = load_backbone(model, dtype="float32", **settings)
    plain = PlainFrozenVit(
        {name: tensor.to(device) for name, tensor in tensors_of(model).items()},
        num_heads=shape["num_heads"],
        layer_norm_eps=1e-6,
        token_ratio=TOKEN_RATIO,
    )
    pixels = torch.randn(images, 3, *((512, 512) if full else (96, 96))).to(device)
    model.requires_grad_(False)
    layers = range(shape["depth"] // 2, shape["depth"])
    return Contest(model.to(device, backbone.dtype), backbone, exact, plain, pixels, layers)


def bench_frozen_pass(benchmark: BenchmarkFixture, contest: Contest, full: bool) -> None:
    expected = contest.run_plain()
    kept = contest.run_ours(contest.exact)
    same = (kept.index == expected).float().mean()
    assert float(same) >= 0.999, f"only {float(same):.4f} of the kept tokens are the plain ones"
    moved = contest.pixels.nbytes + contest.weight_bytes + kept.kv.nbytes
    alternate(
        benchmark,
        contest.run_ours,
        contest.run_plain,
        dtype=dtype_name(contest.backbone.dtype),
        count=Count(int(contest.flop), moved),
        rounds=7 if full else 3,
        others={"timm": contest.run_timm},
    )
    overlap = (contest.run_ours().index[..., None] == expected[..., None, :]).any(-1)
    benchmark.group = "frozen pass"
    benchmark.extra_info |= {
        "bytes_out": kept.kv.nbytes,
        "kept_tokens_in_common": round(float(overlap.float().mean()), 4),
    }


@pytest.mark.parametrize(("size", "tokens"), [(1024, 4097), (2048, 16385)])
def bench_frozen_pass_memory(
    benchmark: BenchmarkFixture, full: bool, size: int, tokens: int
) -> None:
    """What one pass adds to a process of its own; the plain one holds whole maps, and is not run
    where they are larger than the machine."""
    width, heads, depth = (768, 12, 12) if full else (48, 1, 2)
    shape = ("--width", str(width), "--heads", str(heads), "--depth", str(depth))
    arguments = ("--size", str(size), *shape)
    map_bytes = 4 * heads * tokens**2
    plain: dict[str, Any] = {}
    absent: dict[str, str] = {}
    # At its peak it holds two or three maps at once.
    free = psutil.virtual_memory().available
    if 4 * map_bytes >= free / 2:
        died = f"a map of one layer is {map_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        absent = dict.fromkeys(("plain_seconds", "plain_over_ours", "plain_peak_added"), died)
    elif benchmark.enabled:
        plain = added_bytes(*arguments, "--plain")
    report = benchmark.pedantic(added_bytes, args=arguments, rounds=1)
    assert report["tokens"] == tokens and report["kept"] == tokens // 5
    benchmark.group = "frozen pass, memory"
    info = benchmark.extra_info
    info |= report | {"map_bytes": map_bytes}
    moved = 2 * depth * 12 * width**2 + 4 * 3 * size**2 + 4 * (depth // 2) * width * report["kept"]
    count = Count(int(pass_flop(size**2, tokens, width, depth)), moved)
    info |= {"bytes": count.bytes, "flops": count.flops, "peak_added": report["added"]}
    # Of the pass alone, as ``seconds``; pytest-benchmark's time holds the start of Python.
    info |= speeds(report["seconds"], report["dtype"], count)
    info |= dict.fromkeys(absent) | {"absent": absent}
    if plain:
        info |= {"plain_peak_added": plain["added"], "plain_seconds": plain["seconds"]}
        info["plain_over_ours"] = plain["seconds"] / report["seconds"]
    allowed = 1.5e9 if full else 150e6
    assert report["added"] <= allowed, f"{report['added'] / 1e6:.0f} MB"
