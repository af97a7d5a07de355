"""The online path without a cache: decoded images in, probabilities out, for one model or several.

``one image`` is latency, ``batch`` throughput (``images_per_s``), ``ensemble`` four models on one
frozen pass; the plain twin, as the published code has it, runs a frozen pass for each model.
``--full`` is ViT-B at 512 px, FPT+.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.bench_frozen_pass import TOKEN_RATIO, make_contest
from benchmarks.bench_training_step import BATCH, OUTPUTS, method_config, plain_model, step_flops
from benchmarks.beside import alternate, dtype_name
from benchmarks.counts import Count
from fpt_fast.images import to_network_input
from fpt_fast.model import FptModel, create_model
from fpt_fast.records import FeatureBatch, Preprocessing
from fpt_fast.selection import select_features

CASES = {"one_image": (1, 1), "batch": (4, 1), "ensemble": (1, 4)}  # images, models
HALF = (0.5, 0.5, 0.5)


def paths_of(
    images: list[Tensor], models: int, full: bool
) -> tuple[Callable[[bool], Tensor], Callable[[], Tensor], Count, str]:
    """Ours (in f32 where asked), plain, what must be done at least, and the dtype of ours."""
    contest = make_contest(full)
    spec = contest.backbone.spec
    config = method_config("fpt_plus", full)
    made = [
        create_model(config, backbone=spec, num_classes=OUTPUTS, seed=seed).eval()
        for seed in range(models)
    ]
    height, width = contest.pixels.shape[2:]
    frozen_input = Preprocessing((height, width), HALF, HALF)
    side_input = replace(frozen_input, size=config.side_size)

    def ours(exact: bool = False) -> Tensor:
        pixels = torch.stack([to_network_input(image, frozen_input) for image in images])
        side = torch.stack([to_network_input(image, side_input) for image in images])
        backbone = contest.exact if exact else contest.backbone
        layers = tuple(contest.layers)
        kept = select_features(
            backbone, pixels, layers=layers, token_ratio=TOKEN_RATIO, importance="global"
        )
        labels = torch.zeros(len(images), dtype=torch.int64)
        batch = FeatureBatch(side, kept.kv, None, labels, tuple(map(str, range(len(images)))))
        with torch.inference_mode():
            return _mean([model(batch) for model in made])

    twins = [plain_model(model).eval() for model in made]

    def plain() -> Tensor:
        logits = []
        for twin in twins:
            pixels = torch.stack([to_network_input(image, frozen_input) for image in images])
            side = torch.stack([to_network_input(image, side_input) for image in images])
            with torch.inference_mode():
                kept = contest.plain(pixels)
                keys = torch.stack([kept[layer].keys for layer in contest.layers])
                values = torch.stack([kept[layer].values for layer in contest.layers])
                logits.append(twin(side, keys, values))
        return _mean(logits)

    flops = len(images) * (contest.flop + models * step_flops("fpt_plus", full) / BATCH)
    count = Count(int(flops), contest.weight_bytes + sum(_bytes(model) for model in made))
    return ours, plain, count, dtype_name(contest.backbone.dtype)


def _mean(logits: list[Tensor]) -> Tensor:
    return torch.stack([one.softmax(1) for one in logits]).mean(0)


def _bytes(model: FptModel) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


@pytest.mark.parametrize("case", CASES)
def bench_predict(benchmark: BenchmarkFixture, full: bool, case: str) -> None:
    count_images, models = CASES[case]
    edge = 512 if full else 96
    torch.manual_seed(0)
    images = [
        torch.randint(0, 256, (3, edge, edge), dtype=torch.uint8) for _ in range(count_images)
    ]
    ours, plain, count, dtype = paths_of(images, models, full)
    torch.testing.assert_close(ours(True), plain(), atol=2e-3, rtol=0)
    benchmark.group = "predict"
    alternate(benchmark, ours, plain, dtype=dtype, count=count, rounds=5 if full else 3)
    if benchmark.enabled:
        benchmark.extra_info["images_per_s"] = count_images / benchmark.stats.stats.median
    benchmark.extra_info |= {"images": count_images, "models": models}
