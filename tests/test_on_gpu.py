"""What only a CUDA device can show; ``make device`` runs these, elsewhere they are left out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_run import write_backbone

from benchmarks.cases import FROZEN_CASES, FULL_PROMPT_CASES, PROMPT_CASES, FrozenCase, PromptCase
from fpt_fast.backbone import load_backbone
from fpt_fast.ops import (
    prompt_attention,
    prompt_attention_indexed,
    reference,
    select_tokens,
    token_scores,
)
from fpt_fast.pipeline import evaluate, predict, preload, train
from fpt_fast.selection import select_features
from helpers import assert_tensors_equal, assert_within_budget, tiny_vit, write_image_set

pytestmark = pytest.mark.gpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VIT_B = FrozenCase("vit_b_512px", 2, 12, 1025, 64, 205)


@pytest.mark.parametrize("importance", ["global", "class_token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*FROZEN_CASES, VIT_B], ids=lambda case: case.name)
def test_token_scores(case: FrozenCase, dtype: torch.dtype, importance: str) -> None:
    q, k, _ = (tensor.cuda() for tensor in case.qkv(dtype))
    scores = token_scores(q, k, importance=importance)  # type: ignore[arg-type]
    oracle = reference.token_scores(q.double(), k.double(), importance)
    assert_within_budget(scores, oracle, reference.token_scores(q, k, importance))
    for _ in range(20):
        assert torch.equal(token_scores(q, k, importance=importance), scores)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*FROZEN_CASES, VIT_B], ids=lambda case: case.name)
def test_select_tokens(case: FrozenCase, dtype: torch.dtype) -> None:
    _, k, v = case.qkv(dtype)
    scores = torch.rand(k.shape[:-1]).mul(50).round()  # with many ties
    expected = select_tokens(scores, k, v, case.keep)
    got = select_tokens(scores.cuda(), k.cuda(), v.cuda(), case.keep)
    assert_tensors_equal((tensor.cpu() for tensor in got), expected)


@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*PROMPT_CASES, *FULL_PROMPT_CASES], ids=lambda case: case.name)
def test_prompt_attention(case: PromptCase, kv_dtype: torch.dtype) -> None:
    kv = case.kv(kv_dtype).cuda()
    rows = torch.randperm(case.images, device="cuda")
    results = []
    for dtype in (torch.float32, torch.float64):
        q = case.q(dtype).cuda().requires_grad_()
        out = prompt_attention(q, kv.to(dtype) if dtype == torch.float64 else kv, rows)
        weights = torch.linspace(-1, 1, out.numel(), device="cuda", dtype=dtype).view_as(out)
        (gradient,) = torch.autograd.grad((out * weights).sum(), q)
        results.append((out.detach(), gradient))
    q = case.q(torch.float32).cuda().requires_grad_()
    eager, _ = reference.prompt_attention(q, kv.float(), rows)
    weights = torch.linspace(-1, 1, eager.numel(), device="cuda").view_as(eager)
    (eager_gradient,) = torch.autograd.grad((eager * weights).sum(), q)
    assert_within_budget(results[0][0], results[1][0], eager.detach())
    assert_within_budget(results[0][1], results[1][1], eager_gradient, factor=3)


def test_prompt_attention_indexed() -> None:
    case = VIT_B
    q = torch.randn(1, case.heads, 16, case.width, device="cuda")
    _, k, v = (tensor.cuda() for tensor in case.qkv(torch.float16))
    kv, index = select_tokens(torch.rand(k.shape[:-1], device="cuda"), k, v, case.keep)
    stored = prompt_attention(q, kv[:, None])
    online = prompt_attention_indexed(q, k[None], v[None], index[:, None])
    torch.testing.assert_close(stored, online, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_frozen_pass_keeps_what_the_cpu_keeps(dtype: str) -> None:
    model = tiny_vit()
    pixels = torch.randn(2, 3, 64, 48)
    wanted = {"layers": (1, 3), "token_ratio": 0.3, "importance": "global"}
    on_cpu = load_backbone(model, dtype="float32", device="cpu")
    on_gpu = load_backbone(model, dtype=dtype, device="cuda")
    expected, got = (select_features(backbone, pixels, **wanted) for backbone in (on_cpu, on_gpu))  # type: ignore[arg-type]
    common = (got.index.cpu()[..., None] == expected.index[..., None, :]).any(-1).float().mean()
    assert float(common) >= (0.99 if dtype == "float32" else 0.9)


def test_the_four_calls(tmp_path: Path) -> None:
    data = write_image_set(tmp_path / "images")
    backbone = write_backbone(tmp_path / "vit")
    cache, run = tmp_path / "cache", tmp_path / "run"
    preload(
        data=data, backbone=str(backbone), cache=cache, input_size="48", normalization="backbone"
    )
    result = train(data=data, cache=str(cache), run=run, side_size="24", epochs=2, batch_size=5)
    assert torch.isfinite(torch.tensor([epoch.loss for epoch in result.history.epochs])).all()
    again = evaluate(run=run)
    assert again.values["auc"] == pytest.approx(result.metrics.values["auc"], abs=1e-6)
    predicted = predict(run=run, images=(data / "test",), output=tmp_path / "out.csv")
    assert len(predicted.predictions.keys) == 6


def test_training_repeats_bit_for_bit(tmp_path: Path, make_image_set: Callable[..., Path]) -> None:
    data = make_image_set()
    cache = tmp_path / "cache"
    preload(
        data=data,
        backbone=str(write_backbone(tmp_path / "vit")),
        cache=cache,
        input_size="48",
        normalization="backbone",
    )
    losses = [
        [
            epoch.loss
            for epoch in train(
                data=data, cache=str(cache), run=tmp_path / name, side_size="24", epochs=2
            ).history.epochs
        ]
        for name in ("a", "b")
    ]
    assert losses[0] == losses[1]
