"""select_tokens against a sort in plain Python: exact copies, exact ties; its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.ops import reference, select_tokens
from helpers import implementation, implementations_here

IMPLEMENTATIONS = implementations_here("select_tokens")
NATIVE = [impl for impl in IMPLEMENTATIONS if impl.startswith("native/")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# The kernels have no f64 form.
KINDS = [
    (impl, dtype)
    for impl in IMPLEMENTATIONS
    for dtype in DTYPES
    if (impl, dtype) != ("triton", torch.float64)
]


def ranked(scores: list[float], keep: int) -> list[int]:
    """The rule in one line: highest first, on ties the lower index; stored ascending."""
    return sorted(sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:keep])


def assert_kept(scores: Tensor, k: Tensor, v: Tensor, kv: Tensor, index: Tensor) -> None:
    images, heads, _, width = k.shape
    keep = index.shape[-1]
    assert kv.shape == (images, 2, heads, keep, width) and kv.is_contiguous()
    assert index.shape == (images, heads, keep) and index.dtype == torch.int32
    for image in range(images):
        for head in range(heads):
            kept = ranked(scores[image, head].tolist(), keep)
            assert index[image, head].tolist() == kept
            assert torch.equal(kv[image, 0, head], k[image, head, kept].to(kv.dtype))
            assert torch.equal(kv[image, 1, head], v[image, head, kept].to(kv.dtype))


@pytest.mark.parametrize(("impl", "dtype"), KINDS, ids=str, indirect=["impl"])
@pytest.mark.parametrize("case", FROZEN_CASES, ids=lambda case: case.name)
def test_exact(case: FrozenCase, impl: str, dtype: torch.dtype) -> None:
    q, k, v = case.qkv(dtype)
    assert case.tokens == 1 or not k.is_contiguous()
    scores = reference.token_scores(q.float(), k.float())
    kv, index = select_tokens(scores, k, v, case.keep, impl=impl)
    assert kv.dtype == dtype
    assert_kept(scores, k, v, kv, index)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
@pytest.mark.parametrize("tokens", [5, 16, 33, 300, 1025])
def test_ties_go_to_the_lower_index(impl: str, tokens: int) -> None:
    """At sizes at which sorting algorithms change."""
    _, k, v = FrozenCase("", 1, 3, tokens, 4, 1).qkv(torch.float32)
    scores = torch.randint(0, 3, (1, 3, tokens)).float()
    scores[0, 0] = 0.5
    for keep in (1, tokens // 3 + 1, tokens):
        kv, index = select_tokens(scores, k, v, keep, impl=impl)
        assert_kept(scores, k, v, kv, index)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_signed_zeros_tie_and_infinities_are_ordered(impl: str) -> None:
    _, k, v = FrozenCase("", 1, 1, 6, 4, 1).qkv(torch.float32)
    scores = torch.tensor([[[-0.0, 0.0, -math.inf, math.inf, -0.0, 0.0]]])
    for keep in range(1, 7):
        kv, index = select_tokens(scores, k, v, keep, impl=impl)
        assert_kept(scores, k, v, kv, index)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_copies_are_converted_once_on_request(impl: str) -> None:
    _, k, v = FROZEN_CASES[0].qkv(torch.float32)
    scores = torch.rand(k.shape[:3])
    kv, index = select_tokens(scores, k, v, 7, impl=impl, dtype=torch.float16)
    assert kv.dtype == torch.float16
    assert_kept(scores, k, v, kv, index)


@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", NATIVE, indirect=True)
def test_native_converts_every_number_as_torch_does(
    impl: str, dtype: torch.dtype, to: torch.dtype
) -> None:
    """All 16-bit numbers, or patterns of bits of the wider dtypes, in rows with a rest."""
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    low, high = torch.iinfo(bits).min, torch.iinfo(bits).max
    values = torch.arange(2**16).to(bits)
    if dtype.itemsize > 2:
        # Half of them of a size that f16 holds, and ties between two of its neighbours.
        wild = torch.randint(low, high, (2**15,), dtype=bits).view(dtype)
        tame = (torch.arange(2**15) - 2**14).to(dtype) * (2.0**-26 + 2.0**-14)
        values = torch.cat([wild, tame, tame * (1 + 2.0**-11)])[: 2**16]
    numbers = values.view(dtype)[: 2**16 // 37 * 37].view(1, 1, -1, 37)
    for k in (numbers, numbers.mT.contiguous().mT):
        scores = torch.rand(k.shape[:3])
        kv, index = select_tokens(scores, k, -k, k.shape[2] - 3, impl=impl, dtype=to)
        for part, source in enumerate((k, -k)):
            expected = source[0, 0, index[0, 0].long()].to(to)
            torch.testing.assert_close(kv[0, part, 0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", NATIVE, indirect=True)
def test_native_orders_scores_of_every_dtype_and_stride(impl: str, dtype: torch.dtype) -> None:
    _, k, v = FrozenCase("", 2, 3, 700, 3, 1).qkv(torch.float32)
    scores = torch.randn(700, 3, 2).to(dtype).permute(2, 1, 0)
    assert scores.unique().numel() < scores.numel() or dtype.itemsize > 2, "no ties"
    kv, index = select_tokens(scores, k, v, 300, impl=impl)
    assert_kept(scores, k, v, kv, index)


@settings(max_examples=50, deadline=None)
@given(
    scores=st.lists(
        st.floats(allow_nan=False, width=32) | st.sampled_from([0.0, -0.0, 0.25]),
        min_size=1,
        max_size=40,
    ),
    data=st.data(),
)
def test_selection_equals_a_stable_sort(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    k = torch.arange(len(scores), dtype=torch.float32).view(1, 1, -1, 1)
    for name in IMPLEMENTATIONS:
        with implementation(name) as impl:
            kv, index = select_tokens(torch.tensor([[scores]]), k, -k, keep, impl=impl)
        assert index.flatten().tolist() == ranked(scores, keep)
        assert torch.equal(kv[0, 0].flatten(), index.flatten().float())
        assert torch.equal(kv[0, 1].flatten(), -index.flatten().float())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_nan_scores_are_refused_by_place(impl: str) -> None:
    _, k, v = FROZEN_CASES[0].qkv(torch.float32)
    scores = torch.rand(k.shape[:3])
    scores[1, 2, 30:32] = math.nan
    with pytest.raises(ValueError, match=r"NaN at image 1, head 2, token 30 \(of 2\)"):
        select_tokens(scores, k, v, 7, impl=impl)


def test_nan_counts_as_lowest_where_looking_would_stall() -> None:
    scores = torch.tensor([[[math.nan, 0.5, math.nan, 0.1]]])
    k = torch.arange(4.0).view(1, 1, 4, 1)
    for keep, kept in ((1, [1]), (2, [1, 3]), (3, [0, 1, 3])):
        assert reference.select_tokens(scores, k, k, keep)[1].flatten().tolist() == kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 5, 8)}, r"k must be \[B, H, N, D\], got shape \(3, 5, 8\)"),
        ({"v": torch.zeros(2, 3, 5, 9)}, r"v must be \(2, 3, 5, 8\) like k, got \(2, 3, 5, 9\)"),
        ({"scores": torch.zeros(2, 3, 4)}, r"scores must be \(2, 3, 5\) like k without D, got"),
        ({"scores": torch.zeros(2, 3, 5).int()}, "scores must be float16 or .*, got int32"),
        ({"k": torch.zeros(2, 3, 5, 8).int()}, "k must be float16 or .*, got int32"),
        ({"v": torch.zeros(2, 3, 5, 8).half()}, "v must be float32, got float16"),
        ({"scores": torch.zeros(2, 3, 5, device="meta")}, "scores must be on cpu like k, got meta"),
        ({"v": torch.zeros(2, 3, 5, 8, device="meta")}, "v must be on cpu like k, got meta"),
        ({"keep": 0}, r"keep must be in 1\.\.5, the number of tokens, got 0"),
        ({"keep": 6}, r"keep must be in 1\.\.5, the number of tokens, got 6"),
        ({"keep": 2.0}, "keep must be an int, got float"),
        ({"keep": True}, "keep must be an int, got bool"),
        ({"dtype": torch.int8}, "dtype must be float16 or .*, got torch.int8"),
        ({"v": torch.zeros(2, 3, 5, 8, requires_grad=True)}, "v must not require grad"),
        ({"impl": "topk"}, "impl must be 'auto' or one of .* for select_tokens, got 'topk'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {
        "scores": torch.zeros(2, 3, 5),
        "k": torch.zeros(2, 3, 5, 8),
        "v": torch.zeros(2, 3, 5, 8),
        "keep": 2,
    }
    with pytest.raises(ValueError, match=message):
        select_tokens(**{**good, **change})  # type: ignore[arg-type]
