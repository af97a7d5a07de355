"""prompt_attention and prompt_attention_indexed, forward and backward, against their oracle."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import PROMPT_CASES, FrozenCase, PromptCase
from fpt_fast.ops import (
    cpu,
    prompt_attention,
    prompt_attention_indexed,
    prompt_blocks,
    reference,
    select_tokens,
)
from fpt_fast.ops.implementation import implementations, unsupported_reasons
from prompt_budget import (
    assert_both_within_budget,
    eight_bit,
    indexed_inputs,
    oracle_with_gradient,
)

IMPLEMENTATIONS = implementations("prompt_attention")
Q_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KV_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
EIGHT_BIT_DTYPES = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


# Of many tokens the interpreter, which takes seconds, sees each product that a kernel may use;
# tests/kernels has every pair of f16 and f32 in several blocks.
INTERPRETED_PAIRS = (
    (torch.float32, torch.float16),
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
)
BUDGETS = [
    (case, impl, q_dtype, kv_dtype)
    for case in PROMPT_CASES
    for impl in IMPLEMENTATIONS
    for q_dtype in Q_DTYPES
    for kv_dtype in KV_DTYPES
    if impl != "triton" or case.kept < 100 or (q_dtype, kv_dtype) in INTERPRETED_PAIRS
]


@pytest.mark.parametrize(
    ("case", "impl", "q_dtype", "kv_dtype"),
    BUDGETS,
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_budget(case: PromptCase, impl: str, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    kv = case.kv(kv_dtype)
    rows = torch.randint(case.images, (case.images + 2,))  # some twice, in any order
    for picked in (None, rows):
        assert_both_within_budget(
            case.q(q_dtype),
            lambda q, picked=picked: prompt_attention(q, kv, picked, impl=impl),
            lambda q, picked=picked: reference.prompt_attention(q, kv, picked),
        )


@pytest.mark.parametrize("dtype", EIGHT_BIT_DTYPES, ids=str)
@pytest.mark.parametrize("q_dtype", Q_DTYPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_budget_of_eight_bits(impl: str, q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    if impl == "native" and dtype != torch.int8:  # auto gives fp8 to another
        impl = "auto"
    case = PROMPT_CASES[0]
    kv, scales = eight_bit(case, dtype)
    rows = torch.tensor([2, 0])
    assert_both_within_budget(
        case.q(q_dtype),
        lambda q: prompt_attention(q, kv, rows, scales, impl=impl),
        lambda q: reference.prompt_attention(q, kv, rows, scales),
    )


@pytest.mark.parametrize("scale", [1e-3, 8.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_budget_of_flat_and_of_peaked_attention(impl: str, scale: float) -> None:
    case = PROMPT_CASES[0]
    kv = case.kv(torch.float16)
    assert_both_within_budget(
        case.q(torch.float32) * scale,
        lambda q: prompt_attention(q, kv, impl=impl),
        lambda q: reference.prompt_attention(q, kv),
    )


@pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
@pytest.mark.parametrize("impl", implementations("prompt_attention_indexed"))
@pytest.mark.parametrize("case", PROMPT_CASES, ids=lambda case: case.name)
def test_budget_of_the_indexed_op(case: PromptCase, impl: str, dtype: torch.dtype) -> None:
    k, v, index = indexed_inputs(case, dtype)
    assert_both_within_budget(
        case.q(torch.float32),
        lambda q: prompt_attention_indexed(q, k, v, index, impl=impl),
        lambda q: reference.prompt_attention_indexed(q, k, v, index),
    )


def test_the_oracles_backward_is_the_derivative_of_its_forward() -> None:
    case = PROMPT_CASES[0]
    q = case.q(torch.float64)
    kv, scales = eight_bit(case, torch.int8)
    rows = torch.tensor([2, 0, 2])
    grad = torch.randn(case.layers, 3, case.prompts, case.heads * case.width).double()
    _, expected = oracle_with_gradient(
        q, grad, lambda q: reference.prompt_attention(q, kv, rows, scales)
    )
    got = reference.prompt_attention_backward(grad, q, kv, rows, scales)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


# Those that have an f64 form.
@pytest.mark.parametrize(
    "impl",
    [
        impl
        for impl in IMPLEMENTATIONS
        if not unsupported_reasons("prompt_attention", impl, torch.zeros(0).double())
    ],
)
def test_gradcheck(impl: str) -> None:
    case = PromptCase("", images=2, layers=2, heads=2, kept=3, width=4, prompts=2)
    q = case.q(torch.float64).requires_grad_()
    kv = case.kv(torch.float64)
    rows = torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda q: prompt_attention(q, kv, rows, impl=impl), q)
    eight, scales = eight_bit(case, torch.int8)
    assert torch.autograd.gradcheck(
        lambda q: prompt_attention(q, eight, None, scales, impl=impl), q
    )
    k, v, index = indexed_inputs(case, torch.float64, tokens=5)
    assert torch.autograd.gradcheck(
        lambda q: prompt_attention_indexed(q, k, v, index, impl=impl), q
    )


def test_indexed_tokens_are_the_stored_ones() -> None:
    """The online path and the cached one give the same bits."""
    frozen = FrozenCase("", images=2, heads=3, tokens=37, width=10, keep=7)
    _, k, v = frozen.qkv(torch.float32)
    scores = torch.rand(2, 3, 37)
    kv, index = select_tokens(scores, k, v, 7)
    q = PROMPT_CASES[0].q(torch.float32)[:1]
    stored = prompt_attention(q, kv.unsqueeze(1))
    assert torch.equal(stored, prompt_attention_indexed(q, k[None], v[None], index.unsqueeze(1)))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_reruns_change_no_bit_and_rows_are_images(impl: str) -> None:
    case = PROMPT_CASES[2]
    q, kv = case.q(torch.float32), case.kv(torch.float16)
    rows = torch.tensor([1, 1, 0])
    first = prompt_attention(q, kv, rows, impl=impl)
    assert torch.equal(first, prompt_attention(q, kv, rows, impl=impl))
    copied = prompt_attention(q, kv[rows], impl=impl)
    torch.testing.assert_close(first, copied, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("chunk_bytes", [1, 10_000, 1 << 30])
def test_chunks_are_cut_anywhere(chunk_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_blocks, "_CHUNK_BYTES", chunk_bytes)
    case = PROMPT_CASES[2]
    kv = case.kv(torch.float16)
    assert_both_within_budget(
        case.q(torch.float32),
        lambda q: prompt_attention(q, kv, impl="cpu"),
        lambda q: reference.prompt_attention(q, kv),
    )


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_strided_store_and_strided_gradient(impl: str) -> None:
    case = PROMPT_CASES[0]
    kv = case.kv(torch.float32).transpose(0, 1).contiguous().transpose(0, 1)
    q = case.q(torch.float32).transpose(1, 2).contiguous().transpose(1, 2)
    assert not kv.is_contiguous() and not q.is_contiguous()
    leaf, expected_leaf = q.detach().requires_grad_(), q.detach().contiguous().requires_grad_()
    # A gradient of expanded ones, as sum() sends it.
    prompt_attention(leaf, kv, impl=impl).sum(-1).sum().backward()
    prompt_attention(expected_leaf, kv.contiguous(), impl=impl).sum(-1).sum().backward()
    torch.testing.assert_close(leaf.grad, expected_leaf.grad)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), kept=st.integers(1, 12))
def test_order_of_kept_tokens_does_not_matter(seed: int, kept: int) -> None:
    case = PromptCase("", images=2, layers=2, heads=2, kept=kept, width=5, prompts=3)
    q, kv = case.q(torch.float32, seed), case.kv(torch.float32, seed + 1)
    order = torch.randperm(kept, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        prompt_attention(q, kv[..., order, :]), prompt_attention(q, kv), rtol=1e-5, atol=1e-6
    )


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest new memory that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_no_wide_copy_of_the_features_and_no_gradient_to_them() -> None:
    case = PromptCase("", images=8, layers=4, heads=4, kept=101, width=32, prompts=3)
    q, kv = case.q(torch.float32), case.kv(torch.float16)
    rows = torch.arange(8)
    one_layer_wide = 2 * case.heads * case.kept * case.width * 4
    with pytest.MonkeyPatch.context() as patch, LargestTensor() as seen:
        patch.setattr(prompt_blocks, "_CHUNK_BYTES", one_layer_wide)
        out, lse = cpu.prompt_attention(q, kv, rows, None)
        cpu.prompt_attention_backward(torch.ones_like(out), q, kv, out, lse, rows, None)
    assert 0 < seen.largest <= max(one_layer_wide, out.nbytes)
    assert seen.largest < kv.nbytes / 4


def test_no_images_give_no_states() -> None:
    q = PROMPT_CASES[0].q(torch.float32).requires_grad_()
    kv = PROMPT_CASES[0].kv(torch.float16)
    out = prompt_attention(q, kv, torch.zeros(0, dtype=torch.int64))
    assert out.shape == (2, 0, 5, 30)
    out.sum().backward()
    assert q.grad is not None and not q.grad.any()


GOOD: dict[str, object] = {"q": torch.zeros(2, 3, 5, 8), "kv": torch.zeros(4, 2, 2, 3, 7, 8)}
SCALES = (torch.ones(4, 2, 3, 8), torch.ones(4, 2, 3, 7))
INT8 = torch.zeros(4, 2, 2, 3, 7, 8, dtype=torch.int8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 5, 8)}, r"q must be \[L, H, P, D\], got shape \(3, 5, 8\)"),
        ({"kv": torch.zeros(4, 2, 3, 7, 8)}, r"kv must be \[M, L, 2, H, K, D\], got shape"),
        ({"kv": torch.zeros(4, 3, 2, 3, 7, 8)}, r"kv must be \(4, 2, 2, 3, 7, 8\) by its own M, K"),
        ({"kv": torch.zeros(4, 2, 2, 3, 0, 8)}, "kv must have K of at least 1"),
        ({"q": torch.zeros(2, 3, 5, 8).int()}, "q must be float16 or .*, got int32"),
        ({"kv": torch.zeros(4, 2, 2, 3, 7, 8).int()}, "kv must be float16 or .*, got int32"),
        (
            {"kv": torch.zeros(4, 2, 2, 3, 7, 8, device="meta")},
            "kv must be on cpu like q, got meta",
        ),
        ({"rows": torch.zeros(2, 2).long()}, r"rows must be \[B\], got shape \(2, 2\)"),
        ({"rows": torch.zeros(2).int()}, "rows must be int64, got int32"),
        ({"rows": torch.zeros(2, device="meta").long()}, "rows must be on cpu like q, got meta"),
        ({"rows": torch.tensor([0, 4])}, r"rows must be in 0\.\.3 \(images of kv\), got .* 0\.\.4"),
        ({"rows": torch.tensor([-1])}, r"rows must be in 0\.\.3 \(images of kv\), got .* -1\.\.-1"),
        ({"kv": INT8}, "scales must be given with 8-bit kv, and only then, got none"),
        ({"scales": SCALES}, "scales must be given with 8-bit kv, and only then, got a pair"),
        (
            {"kv": INT8, "scales": SCALES[::-1]},
            r"scales\[0\] must be \(4, 2, 3, 8\) \[M, L, H, D\], got \(4, 2, 3, 7\)",
        ),
        (
            {"kv": INT8, "scales": (SCALES[0], SCALES[0])},
            r"scales\[1\] must be \(4, 2, 3, 7\) \[M, L, H, K\], got \(4, 2, 3, 8\)",
        ),
        (
            {"kv": INT8, "scales": (SCALES[0].half(), SCALES[1])},
            r"scales\[0\] must be float32, got float16",
        ),
        (
            {"kv": torch.zeros(4, 2, 2, 3, 7, 8, requires_grad=True)},
            "kv must not require grad: prompt_attention computes the gradient to q only; detach",
        ),
        ({"impl": "flash"}, "impl must be 'auto' or one of .* for prompt_attention, got 'flash'"),
    ],
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prompt_attention(**{**GOOD, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 3, 8)}, r"k must be \[L, B, H, N, D\], got shape"),
        ({"k": torch.zeros(1, 4, 3, 9, 8)}, r"k must be \(2, 4, 3, 9, 8\) by its own B, N and q's"),
        ({"v": torch.zeros(2, 4, 3, 8, 8)}, r"v must be \(2, 4, 3, 9, 8\) like k, got"),
        ({"v": torch.zeros(2, 4, 3, 9, 8).half()}, "v must be float32, got float16"),
        ({"index": torch.zeros(2, 4, 3, 7).int()}, r"index must be \(4, 2, 3, 7\) by its own K"),
        ({"index": torch.zeros(4, 2, 3, 0).int()}, "index must have K of at least 1"),
        ({"index": torch.zeros(4, 2, 3, 7)}, "index must be int32 or int64, got float32"),
        ({"index": torch.full((4, 2, 3, 7), 9)}, r"index must be in 0\.\.8 \(tokens of k\), got"),
        ({"index": torch.full((4, 2, 3, 7), -1)}, r"index must be in 0\.\.8 \(tokens of k\), got"),
        ({"v": torch.zeros(2, 4, 3, 9, 8, device="meta")}, "v must be on cpu like q, got meta"),
        ({"k": torch.zeros(2, 4, 3, 9, 8, requires_grad=True)}, "k must not require grad"),
    ],
)
def test_errors_of_the_indexed_op_name_the_argument(
    change: dict[str, object], message: str
) -> None:
    good: dict[str, object] = {
        "q": torch.zeros(2, 3, 5, 8),
        "k": torch.zeros(2, 4, 3, 9, 8),
        "v": torch.zeros(2, 4, 3, 9, 8),
        "index": torch.zeros(4, 2, 3, 7).int(),
    }
    with pytest.raises(ValueError, match=message):
        prompt_attention_indexed(**{**good, **change})  # type: ignore[arg-type]
