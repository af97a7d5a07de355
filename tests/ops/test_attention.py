"""attention_with_scores: every way of computing it, against fp64."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.ops import attention_with_scores, blocks, fused, reference
from helpers import assert_within_budget, implementation, implementations_here

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, dim=-1) @ v


def plain_lse(q: Tensor, k: Tensor) -> Tensor:
    return torch.logsumexp(q @ k.mT * q.shape[-1] ** -0.5, dim=-1)


WAYS = [
    *(name for name in implementations_here("frozen_attention") if name.startswith("native/")),
    *("blocks", "fused"),
]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FROZEN_CASES, ids=lambda case: case.name)
def test_budget(
    case: FrozenCase, dtype: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "is_faster", lambda q: way == "fused")
    q, k, v = case.qkv(dtype)
    with implementation(way if way.startswith("native/") else "cpu") as impl:
        out, scores, lse = attention_with_scores(q, k, v, impl=impl)
    assert out is not None and scores is not None and lse is not None
    assert (out.dtype, scores.dtype, lse.dtype) == (dtype, torch.float32, torch.float32)
    wide = [x.double() for x in (q, k, v)]
    assert_within_budget(out, plain(*wide), plain(q, k, v))
    assert_within_budget(
        scores, reference.token_scores(wide[0], wide[1]), reference.token_scores(q, k)
    )
    assert_within_budget(lse, plain_lse(wide[0], wide[1]), plain_lse(q, k))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["auto", "cpu"])
def test_parts_are_the_same_alone(impl: str, dtype: torch.dtype) -> None:
    q, k, v = FROZEN_CASES[0].qkv(dtype)
    out, scores, lse = attention_with_scores(q, k, v, impl=impl)
    assert out is not None and scores is not None and lse is not None
    only_out = attention_with_scores(q, k, v, need_scores=False, impl=impl)
    assert only_out[0] is not None and torch.equal(only_out[0], out) and only_out[1] is None
    only_scores = attention_with_scores(q, k, v, need_output=False, impl=impl)
    assert only_scores[0] is None
    assert only_scores[1] is not None and torch.equal(only_scores[1], scores)
    assert only_scores[2] is not None and torch.equal(only_scores[2], lse)


def test_blocks_are_cut_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = FROZEN_CASES[0].qkv(torch.float64)
    expected = plain(q, k, v)
    monkeypatch.setattr(blocks, "_MIN_ROWS", 1)
    for rows in (1, 2, 36, 37, 2 * 37, 5 * 37):
        monkeypatch.setattr(blocks, "_BLOCK_BYTES", 4 * 37 * rows)
        out, scores, lse = blocks.attend_in_blocks(q, k, v, need_scores=True)
        assert out is not None and scores is not None
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(lse.double(), plain_lse(q, k), rtol=1e-6, atol=0)
        assert torch.equal(scores, reference.token_scores(q, k).float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 5, 8)}, r"q must be \[B, H, N, D\], got shape \(3, 5, 8\)"),
        ({"v": torch.zeros(2, 3, 5, 9)}, r"v must be \(2, 3, 5, 8\) like q, got \(2, 3, 5, 9\)"),
        ({"k": torch.zeros(2, 3, 5, 8).half()}, "k must be float32, got float16"),
        ({"v": torch.zeros(2, 3, 5, 8, device="meta")}, "v must be on cpu like q, got meta"),
        ({"k": torch.zeros(2, 3, 5, 8, requires_grad=True)}, "k must not require grad"),
        (
            {"need_output": False, "need_scores": False},
            "need_output or need_scores must be True, got False for both",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {name: torch.zeros(2, 3, 5, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        attention_with_scores(**{**good, **change})  # type: ignore[arg-type]
