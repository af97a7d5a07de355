"""prompt_attention in C++: every level of kernels, odd shapes, memory maps, threads, NaN."""

import ctypes
import itertools
import mmap
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.cases import PromptCase
from fpt_fast.ops import explain, prompt_attention, prompt_attention_indexed, reference
from helpers import implementations_here
from prompt_budget import assert_both_within_budget, eight_bit, indexed_inputs

LEVELS = [i for i in implementations_here("prompt_attention") if i.startswith("native/")]
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
CASES = (
    PromptCase("one_token", images=2, layers=1, heads=2, kept=1, width=8, prompts=17),
    PromptCase("below_a_vector", images=1, layers=2, heads=1, kept=25, width=3, prompts=1),
    PromptCase("width_24", images=1, layers=2, heads=2, kept=13, width=24, prompts=17),
    PromptCase("width_72", images=2, layers=1, heads=1, kept=50, width=72, prompts=16),
    PromptCase("width_100", images=1, layers=1, heads=2, kept=97, width=100, prompts=3),
    PromptCase("width_32", images=1, layers=1, heads=2, kept=33, width=32, prompts=16),
    PromptCase("width_64", images=2, layers=1, heads=2, kept=205, width=64, prompts=81),
    PromptCase("width_96", images=1, layers=2, heads=1, kept=64, width=96, prompts=5),
    PromptCase("width_128", images=1, layers=1, heads=1, kept=30, width=128, prompts=100),
    PromptCase("sweep", images=1, layers=1, heads=1, kept=29, width=16, prompts=512),
)
CASE = CASES[2]
WIDE_CASE = PromptCase("width_64", images=1, layers=2, heads=2, kept=50, width=64, prompts=17)

pytestmark = pytest.mark.parametrize("impl", LEVELS, indirect=True)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget(case: PromptCase, impl: str) -> None:
    rows = torch.tensor([case.images - 1, 0, 0])
    for q_dtype, dtype in itertools.product(DTYPES, DTYPES):
        kv = case.kv(dtype)
        assert_both_within_budget(
            case.q(q_dtype),
            lambda q, kv=kv: prompt_attention(q, kv, rows, impl=impl),
            lambda q, kv=kv: reference.prompt_attention(q, kv, rows),
        )
    kv, scales = eight_bit(case, torch.int8)
    for q_dtype in DTYPES:
        assert_both_within_budget(
            case.q(q_dtype),
            lambda q: prompt_attention(q, kv, rows, scales, impl=impl),
            lambda q: reference.prompt_attention(q, kv, rows, scales),
        )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget_of_the_indexed_op(case: PromptCase, impl: str) -> None:
    for dtype in DTYPES:
        k, v, index = indexed_inputs(case, dtype)
        for chosen in (index, index.long().transpose(0, 1).contiguous().transpose(0, 1)):
            assert_both_within_budget(
                case.q(torch.float32),
                lambda q, k=k, v=v, chosen=chosen: prompt_attention_indexed(
                    q, k, v, chosen, impl=impl
                ),
                lambda q, k=k, v=v, index=index: reference.prompt_attention_indexed(q, k, v, index),
            )


@pytest.mark.parametrize("case", [CASE, WIDE_CASE], ids=lambda case: case.name)
@pytest.mark.parametrize("scale", [1e-3, 30.0])
def test_budget_of_flat_and_of_peaked_attention(impl: str, scale: float, case: PromptCase) -> None:
    for q_dtype, dtype in itertools.product(DTYPES, DTYPES):
        kv = case.kv(dtype)
        assert_both_within_budget(
            case.q(q_dtype) * scale,
            lambda q, kv=kv: prompt_attention(q, kv, impl=impl),
            lambda q, kv=kv: reference.prompt_attention(q, kv),
        )


def test_lse_is_the_logarithm_of_the_sum(impl: str) -> None:
    q, kv = CASE.q(torch.float32) * 30, CASE.kv(torch.float32)
    _, lse = torch.ops.fpt.prompt_attention(q, kv, None, None, None, impl)
    torch.testing.assert_close(lse, reference.prompt_attention(q, kv)[1])


@pytest.mark.parametrize(("width", "q_dtype"), [(20, torch.float32), (32, torch.bfloat16)])
def test_results_do_not_depend_on_the_number_of_threads(
    impl: str, width: int, q_dtype: torch.dtype
) -> None:
    # Enough layers of images for one thread or two to take all heads at once, not for more.
    case = PromptCase("", images=9, layers=2, heads=3, kept=37, width=width, prompts=5)
    kv, grad = case.kv(torch.float16), torch.randn(2, 9, 5, 3 * width).to(q_dtype)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 5):
            torch.set_num_threads(count)
            q = case.q(q_dtype).requires_grad_()
            out = prompt_attention(q, kv, impl=impl)
            out.backward(grad)
            results.append((out.detach(), q.grad))
    finally:
        torch.set_num_threads(threads)
    for out, grad_q in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(grad_q, results[0][1])


def test_records_of_a_memory_map_with_padding(impl: str, tmp_path: Path) -> None:
    """Records that start on pages, as the cache holds them, read where they are."""
    record = CASE.layers * 2 * CASE.heads * CASE.kept * CASE.width
    stride = -(-record * 2 // 4096) * 4096 // 2
    path = tmp_path / "records"
    path.write_bytes(bytes(4 * stride * 2))
    store = torch.from_file(str(path), shared=True, size=4 * stride, dtype=torch.float16)
    store.fill_(torch.nan)
    shape = (4, CASE.layers, 2, CASE.heads, CASE.kept, CASE.width)
    kv = store.view(4, stride)[:, :record].unflatten(1, shape[1:])
    kv.copy_(torch.randn(shape))
    rows = torch.tensor([3, 1, 1])
    q = CASE.q(torch.float32)
    out = prompt_attention(q, kv, rows, impl=impl)
    assert torch.equal(out, prompt_attention(q, kv[rows].contiguous(), impl=impl))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@pytest.mark.parametrize("width", [5, 24, 32])
def test_nothing_behind_the_last_token_is_read(impl: str, width: int, dtype: torch.dtype) -> None:
    """The page after the features cannot be read: a load beyond them ends the process."""
    case = PromptCase("", images=1, layers=1, heads=2, kept=7, width=width, prompts=2)
    wide = case.kv(torch.float32)
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    libc = ctypes.CDLL(None, use_errno=True)
    size = wide.numel() * dtype.itemsize
    kv = torch.frombuffer(pages, dtype=dtype, count=wide.numel(), offset=mmap.PAGESIZE - size).view(
        wide.shape
    )
    kv.copy_((wide * 20).round())
    scales = (torch.full((1, 1, 2, width), 0.1), torch.full((1, 1, 2, 7), 0.1))
    q = case.q(torch.bfloat16 if width == 32 else torch.float32).requires_grad_()
    assert libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 0) == 0
    try:
        out = prompt_attention(q, kv, None, scales if dtype == torch.int8 else None, impl=impl)
        out.sum().backward()
    finally:
        libc.mprotect(ctypes.c_void_p(address + mmap.PAGESIZE), mmap.PAGESIZE, 3)
    assert bool(out.isfinite().all()) and q.grad is not None


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_spreads_as_in_torch(impl: str, bad: float, part: int) -> None:
    kv = CASE.kv(torch.float32).repeat(2, 1, 1, 1, 1, 1)
    kv[0, 1, part, 0, 4, 2] = bad
    q = CASE.q(torch.float32)
    ours, theirs = q.clone().requires_grad_(), q.clone().requires_grad_()
    out, expected = prompt_attention(ours, kv, impl=impl), reference.prompt_attention(theirs, kv)[0]
    torch.testing.assert_close(out, expected, equal_nan=True)
    out.sum().backward()
    expected.sum().backward()
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True, rtol=1e-4, atol=1e-5)
    assert not bool(out[1, 0].isfinite().all()) and bool(out[1, 1].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_that_stand_apart_are_read_where_they_are(impl: str, dtype: torch.dtype) -> None:
    kv = WIDE_CASE.kv(dtype)
    apart = torch.cat((kv, torch.full_like(kv, float("nan"))), -1)[..., : WIDE_CASE.width]
    results = []
    for stored in (kv, apart):
        q = WIDE_CASE.q(torch.float32).requires_grad_()
        out = prompt_attention(q, stored, impl=impl)
        results.append((out, *torch.autograd.grad(out.square().sum(), q)))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_of_any_strides(impl: str, dtype: torch.dtype) -> None:
    q = CASE.q(torch.float32).to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
    kv = (
        CASE.kv(torch.float16).repeat(3, 1, 1, 1, 1, 1).transpose(0, 1).contiguous().transpose(0, 1)
    )
    shape = (CASE.layers, 3, CASE.prompts, CASE.heads * CASE.width)
    packed = torch.randn(shape[::-1]).to(dtype)
    grads = (packed.permute(3, 2, 1, 0), packed[:1, :1, :1, :1].permute(3, 2, 1, 0).expand(shape))
    for grad in grads:
        got, expected = q.detach().requires_grad_(), q.detach().clone().requires_grad_()
        prompt_attention(got, kv, impl=impl).backward(grad)
        prompt_attention(expected, kv.contiguous(), impl=impl).backward(grad.contiguous())
        assert got.grad is not None and expected.grad is not None
        assert torch.equal(got.grad, expected.grad)


def test_no_images_and_no_prompts(impl: str) -> None:
    q = CASE.q(torch.float32).requires_grad_()
    kv = CASE.kv(torch.float16)
    for picked, rows in ((kv, torch.zeros(0, dtype=torch.int64)), (kv[:0], None)):
        out = prompt_attention(q, picked, rows, impl=impl)
        assert out.shape == (2, 0, CASE.prompts, 48)
        (grad,) = torch.autograd.grad(out.sum(), q)
        assert not grad.any()
    assert prompt_attention(q[:, :, :0], kv, impl=impl).shape == (2, 1, 0, 48)


def refuse(message: str, op: str, *args: object) -> None:
    with pytest.raises(RuntimeError, match=message):
        getattr(torch.ops.fpt_native, op)(*args)


def test_what_would_be_read_out_of_bounds_is_refused(impl: str) -> None:
    q, kv = CASE.q(torch.float32), CASE.kv(torch.float16)
    lse = torch.zeros(2, 1, 2, 17)
    grad = torch.zeros(2, 1, 17, 48)
    op, back = "prompt_attention", "prompt_attention_backward"
    none = (None, None, None, "")
    scales = (torch.ones(1, 2, 2, 24), torch.ones(1, 2, 2, 13))
    refuse(r"kv must be \(-1, 2, 2, 2, -1, 24\).*, got", op, q, kv[:, :1], *none)
    refuse("kv must have a stride of 1", op, q, kv.mT.contiguous().mT, *none)
    refuse(r"rows must be in 0..0, got values in 1..1", op, q, kv, torch.tensor([1]), *none[1:])
    refuse(r"k_scales must be \(1, 2, 2, 24\)", op, q, kv, None, *scales[::-1], "")
    refuse("scales must be a pair", op, q, kv, None, scales[0], None, "")
    refuse("q must be float16, bfloat16 or float32", op, q.double(), kv, *none)
    refuse(r"grad must be \(2, 1, 17, 48\)", back, grad[..., :7], q, kv, lse, *none)
    refuse(r"lse must be \(2, 1, 2, 17\)", back, grad, q, kv, lse[..., :7], *none)
    k, v, index = indexed_inputs(CASE, torch.float32)
    op = "prompt_attention_indexed"
    refuse(r"v must be \(2, 1, 2, 211, 24\)", op, q, k, v[..., :7], index, "")
    refuse("index must be in 0..210, got values in 0..211", op, q, k, v, index * 0 + 211, "")
    refuse("index must be in 0..210, got values in -1..0", op, q, k, v, index * 0 - 1, "")


def test_reasons_say_what_it_cannot_read(impl: str) -> None:
    q, kv = CASE.q(torch.float32), CASE.kv(torch.float32)
    scales = (torch.ones(1, 2, 2, 24), torch.ones(1, 2, 2, 13))
    cases: tuple[tuple[Tensor, Tensor, object, str], ...] = (
        (q, kv.double(), None, "it has no float64 form"),
        (q, kv.to(torch.float8_e5m2), scales, "it has no float8_e5m2 form"),
        (q, kv.mT.contiguous().mT, None, "it reads features and scales whose last axis has"),
    )
    for queries, stored, pair, why in cases:
        text = explain("prompt_attention", queries, stored, None, pair)
        assert f"native: {why}" in text and "runs 'cpu'" in text
    assert "runs 'native'" in explain("prompt_attention", q, kv, None, None)
