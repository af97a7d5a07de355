"""token_scores against its oracle; its properties, its memory, its errors."""

import json
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.ops import blocks, fused, reference, token_scores
from fpt_fast.records import Importance
from helpers import assert_within_budget, budget_cases, implementations_here

IMPLEMENTATIONS = implementations_here("token_scores")
NATIVE = [impl for impl in IMPLEMENTATIONS if impl.startswith("native/")]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BUDGET_IMPORTANCES: tuple[Importance, ...] = ("global", "class_token")


def oracle_lse(q: Tensor, k: Tensor) -> Tensor:
    return torch.logsumexp(q.double() @ k.double().mT / q.shape[-1] ** 0.5, dim=-1).float()


def assert_scores_within_budget(
    q: Tensor, k: Tensor, scores: Tensor, importance: str = "global"
) -> None:
    oracle = reference.token_scores(q.double(), k.double(), importance)
    eager = reference.token_scores(q, k, importance)
    assert_within_budget(scores, oracle, eager)


def assert_normalised_within_budget(q: Tensor, k: Tensor, lse: Tensor, scores: Tensor) -> None:
    """The rounding of a given lse is the giver's: oracle and plain expression get the same one."""

    def plain(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return (q @ k.mT * q.shape[-1] ** -0.5 - lse.unsqueeze(-1)).exp().mean(-2)

    oracle = plain(q.double(), k.double(), lse.double())
    assert_within_budget(scores, oracle, plain(q, k, lse))


@pytest.mark.parametrize("importance", BUDGET_IMPORTANCES)
@pytest.mark.parametrize(
    ("case", "impl", "dtype"),
    budget_cases(FROZEN_CASES, IMPLEMENTATIONS, DTYPES),
    indirect=["impl"],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_budget(case: FrozenCase, impl: str, dtype: torch.dtype, importance: Importance) -> None:
    q, k, _ = case.qkv(dtype)
    scores = token_scores(q, k, importance=importance, impl=impl)
    assert scores.dtype == torch.float32 and scores.is_contiguous()
    assert_scores_within_budget(q, k, scores, importance)


@pytest.mark.parametrize(
    ("case", "impl", "dtype"),
    budget_cases(FROZEN_CASES, IMPLEMENTATIONS, DTYPES),
    indirect=["impl"],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_budget_with_lse_given(case: FrozenCase, impl: str, dtype: torch.dtype) -> None:
    q, k, _ = case.qkv(dtype)
    lse = oracle_lse(q, k)
    if impl == "reference":  # computes its own
        assert_scores_within_budget(q, k, token_scores(q, k, lse=lse, impl=impl))
    else:
        assert_normalised_within_budget(q, k, lse, token_scores(q, k, lse=lse, impl=impl))


@pytest.mark.parametrize("scale", [1e-3, 5.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_of_flat_and_of_peaked_attention(
    impl: str, dtype: torch.dtype, scale: float
) -> None:
    q, k, _ = (x * scale for x in FROZEN_CASES[0].qkv(dtype))
    assert_scores_within_budget(q, k, token_scores(q, k, impl=impl))


def test_logits_beyond_f16_stay_finite() -> None:
    q = torch.full((1, 1, 3, 16), 200.0, dtype=torch.float16)
    scores = token_scores(q, q)
    torch.testing.assert_close(scores, torch.full((1, 1, 3), 1 / 3))


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("case", FROZEN_CASES, ids=lambda case: case.name)
def test_f64_is_exact_to_the_f32_of_its_result(case: FrozenCase, with_lse: bool) -> None:
    q, k, _ = case.qkv(torch.float64)
    lse = oracle_lse(q, k) if with_lse else None
    oracle = reference.token_scores(q, k)
    torch.testing.assert_close(
        token_scores(q, k, lse=lse).double(), oracle, rtol=1e-6 if with_lse else 1e-7, atol=0
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", NATIVE, indirect=True)
def test_native_budget_of_large_maps_and_wide_heads(impl: str, dtype: torch.dtype) -> None:
    """Several blocks, parts and panels; a width of several panels with a rest; gaps in a row."""
    for tokens, width in ((1100, 3), (70, 145), (9, 300)):
        q, k, _ = FrozenCase("", 1, 2, tokens, width, 1).qkv(dtype)
        assert_scores_within_budget(q, k, token_scores(q, k, impl=impl))
        apart = q.mT.contiguous().mT
        assert apart.stride(-1) != 1
        assert torch.equal(token_scores(apart, k, impl=impl), token_scores(q, k, impl=impl))


@pytest.mark.parametrize("impl", NATIVE, indirect=True)
def test_native_treats_infinity_and_nan_as_softmax_does(impl: str) -> None:
    """A key that no query looks at, logits beyond every exponential, and one NaN among the rows."""
    q, k = torch.ones(1, 1, 21, 4), torch.randn(1, 1, 21, 4)
    k[..., 3, :] = -math.inf
    k[..., 5, 0] = 500.0
    expected = reference.token_scores(q.double(), k.double()).float()
    scores = token_scores(q, k, impl=impl)
    assert scores[0, 0, 3] == 0 and bool(scores.isfinite().all())
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-30)
    q[..., 17, 2] = math.nan
    assert bool(token_scores(q, k, impl=impl).isnan().all())
    assert bool(token_scores(q, k, importance="class_token", impl=impl).isfinite().all())
    lse = torch.full((1, 1, 21), -200.0)
    assert bool(token_scores(k.abs(), k.abs(), lse=lse, impl=impl).isinf()[0, 0, 5])


def in_blocks(q: Tensor, k: Tensor) -> Tensor:
    return blocks.mean_weights(q, k)


def in_two_fused_passes(q: Tensor, k: Tensor) -> Tensor:
    return fused.scores_from_lse(q, k, fused.attend(q, k, k)[1])


@pytest.mark.parametrize("way", [in_blocks, in_two_fused_passes])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("block_bytes", [4 * 37 * 5, 4 * 37 * 37 * 2])
def test_budget_of_every_way_of_the_cpu(
    way: Callable[[Tensor, Tensor], Tensor],
    dtype: torch.dtype,
    block_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever this machine is fast at, and with blocks of a few rows or of two heads."""
    monkeypatch.setattr(blocks, "_BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(blocks, "_MIN_ROWS", 4)
    q, k, _ = FROZEN_CASES[0].qkv(dtype)
    assert_scores_within_budget(q, k, way(q, k))
    lse = oracle_lse(q, k)
    assert_normalised_within_budget(q, k, lse, blocks.scores_from_lse(q, k, lse))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_reruns_change_no_bit(impl: str, dtype: torch.dtype) -> None:
    # The interpreter runs one program after the other, of any number of tokens.
    case = FROZEN_CASES[0] if impl == "triton" else FROZEN_CASES[-1]
    q, k, _ = case.qkv(dtype)
    assert not q.is_contiguous()
    first = token_scores(q, k, impl=impl)
    assert torch.equal(first, token_scores(q, k, impl=impl))
    torch.testing.assert_close(
        first, token_scores(q.contiguous(), k.contiguous(), impl=impl), rtol=1e-6, atol=0
    )


def test_no_images_give_no_scores() -> None:
    q = torch.zeros(0, 3, 5, 8)
    assert token_scores(q, q).shape == (0, 3, 5)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 40),
    width=st.integers(1, 20),
    scale=st.floats(1e-3, 20),
    seed=st.integers(0, 2**31),
    importance=st.sampled_from(["global", "class_token"]),
)
def test_scores_of_a_head_sum_to_one(
    tokens: int, width: int, scale: float, seed: int, importance: Importance
) -> None:
    q, k, _ = FrozenCase("", 2, 2, tokens, width, 1).qkv(torch.float32, seed)
    scores = token_scores(q * scale, k, importance=importance)
    assert (scores >= 0).all()
    torch.testing.assert_close(scores.sum(-1), torch.ones(2, 2), rtol=1e-5, atol=0)


@settings(max_examples=25, deadline=None)
@given(tokens=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_permuted_tokens_have_permuted_scores(tokens: int, seed: int) -> None:
    q, k, _ = FrozenCase("", 1, 2, tokens, 6, 1).qkv(torch.float32, seed)
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
    permuted = token_scores(q[:, :, order], k[:, :, order])
    torch.testing.assert_close(permuted, token_scores(q, k)[..., order], rtol=1e-5, atol=1e-7)


MEASURE_MEMORY = """
import json, resource, torch
from fpt_fast.ops import attention_with_scores, token_scores
torch.set_num_threads(1)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
grown = {}
def run(tokens):
    for dtype in (torch.bfloat16, torch.float32):
        q = torch.randn(1, 1, tokens, 8).to(dtype)
        for name, call in (
            ("attention_with_scores", lambda: attention_with_scores(q, q, q)),
            ("lse", lambda: token_scores(q, q, lse=torch.ones(1, 1, tokens))),
            ("scores", lambda: token_scores(q, q)),
        ):
            before = peak()
            call()
            grown[f"{name} {dtype}"] = peak() - before
run(300)
run(6144)
print(json.dumps(grown))
"""


def test_memory_does_not_grow_with_the_map() -> None:
    """At N = 6144 a map is 75 MB in bf16, 151 MB in f32; the whole process grows by far less."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE_MEMORY], capture_output=True, text=True, check=True
    )
    for name, grown in json.loads(done.stdout).items():
        assert grown < 40e6, f"{name} grew by {grown / 1e6:.0f} MB"


def test_blocks_stay_within_their_bytes() -> None:
    for tokens in (1, 17, 197, 1025, 4097, 16385, 65537, 10**6):
        rows, heads = blocks.block_size(tokens, tokens, 12)
        assert 1 <= rows <= tokens and 1 <= heads <= 12
        assert rows * heads * tokens * 4 <= 16 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 5, 8)}, r"q must be \[B, H, N, D\], got shape \(3, 5, 8\)"),
        ({"k": torch.zeros(2, 3, 6, 8)}, r"k must be \(2, 3, 5, 8\) like q, got \(2, 3, 6, 8\)"),
        ({"k": torch.zeros(2, 3, 5, 8).half()}, "k must be float32, got float16"),
        ({"k": torch.zeros(2, 3, 5, 8, device="meta")}, "k must be on cpu like q, got meta"),
        ({"importance": "mean"}, "importance must be 'global' or 'class_token', got 'mean'"),
        ({"lse": torch.zeros(2, 3, 4)}, r"lse must be \(2, 3, 5\) like q without D, got"),
        ({"lse": torch.zeros(2, 3, 5).double()}, "lse must be float32, got float64"),
        ({"q": torch.zeros(2, 3, 5, 8, requires_grad=True)}, "q must not require grad"),
        (
            {"impl": "cuda"},
            "impl must be 'auto' or one of 'native', 'cpu'.* for token_scores, got 'cuda'",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"q": torch.zeros(2, 3, 5, 8), "k": torch.zeros(2, 3, 5, 8)}
    with pytest.raises(ValueError, match=message):
        token_scores(**{**good, **change})  # type: ignore[arg-type]


def test_empty_axes_and_integers_are_refused() -> None:
    with pytest.raises(ValueError, match="q must have N of at least 1"):
        token_scores(torch.zeros(1, 1, 0, 8), torch.zeros(1, 1, 0, 8))
    with pytest.raises(ValueError, match="q must have D of at least 1"):
        token_scores(torch.zeros(1, 1, 3, 0), torch.zeros(1, 1, 3, 0))
    with pytest.raises(ValueError, match="q must be float16 or bfloat16 or float32 or float64"):
        token_scores(torch.zeros(1, 1, 3, 8).int(), torch.zeros(1, 1, 3, 8).int())
