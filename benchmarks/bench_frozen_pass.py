"""Preloading, one image: frozen pass and selection, against the plain algorithm and timm's forward.

All three alternate within each round, so that a busy machine slows them alike.  ``--full`` runs
ViT-B at 512 px as published; without it the model is tiny and only the results count.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from huggingface_folder import tensors_of
from pytest_benchmark.fixture import BenchmarkFixture
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

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
    def flop(self) -> float:
        """Operations of our pass: no dead work in the last layer, one product for its scores."""
        spec, (height, width) = self.backbone.spec, self.pixels.shape[2:]
        n, c = spec.num_tokens((height, width)), spec.hidden_size
        embedding = 2 * 3 * height * width * c
        block = 24 * n * c * c + 4 * n * n * c
        return embedding + (spec.depth - 1) * block + 6 * n * c * c + 2 * n * n * c


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
    others: dict[str, tuple[Callable[[], Tensor], list[float]]] = {
        "plain": (contest.run_plain, []),
        "timm": (contest.run_timm, []),
    }

    def run_the_others() -> None:
        for run, seconds in others.values():
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)

    benchmark.pedantic(
        contest.run_ours,
        setup=run_the_others,
        rounds=7 if full else 3,
        warmup_rounds=1,
    )
    expected = contest.run_plain()
    kept = contest.run_ours(contest.exact)
    same = (kept.index == expected).float().mean()
    assert float(same) >= 0.999, f"only {float(same):.4f} of the kept tokens are the plain ones"
    benchmark.extra_info["dtype"] = str(contest.backbone.dtype)
    benchmark.extra_info["flop"] = contest.flop
    benchmark.extra_info["bytes_out"] = kept.kv.nbytes
    overlap = (contest.run_ours().index[..., None] == expected[..., None, :]).any(-1)
    benchmark.extra_info["kept_tokens_in_common"] = round(float(overlap.float().mean()), 4)
    if benchmark.stats is not None:
        ours = benchmark.stats.stats.median
        benchmark.extra_info["GFLOP/s"] = round(contest.flop / ours / 1e9, 1)
        for name, (_, seconds) in others.items():
            median = statistics.median(seconds[1:])  # without the warm-up round
            benchmark.extra_info[f"{name}_seconds"] = round(median, 4)
            benchmark.extra_info[f"{name}_over_ours"] = round(median / ours, 3)


@pytest.mark.parametrize(("size", "tokens"), [(1024, 4097), (2048, 16385)])
def bench_frozen_pass_memory(
    benchmark: BenchmarkFixture, full: bool, size: int, tokens: int
) -> None:
    """What one pass adds to the process; the maps of one layer would be 0.8 GB at 1024 px."""
    shape = () if full else ("--width", "48", "--heads", "3", "--depth", "2")
    report = benchmark.pedantic(added_bytes, args=("--size", str(size), *shape), rounds=1)
    benchmark.extra_info.update(report)
    assert report["tokens"] == tokens and report["kept"] == tokens // 5
    allowed = 1.5e9 if full else 150e6
    assert report["added"] <= allowed, f"{report['added'] / 1e6:.0f} MB"
