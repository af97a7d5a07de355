"""The Triton kernels of prompt_attention in the interpreter, forward and gradient, by the budget.

Products of bf16 are left to a GPU: the interpreter cannot multiply bf16, and truncates to it.
"""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.cases import PromptCase
from fpt_fast.ops import reference
from fpt_fast.ops.reference import Scales
from fptkernels import launch_table
from fptkernels import prompt_attention as kernels
from fptkernels.launch_table import ARCHITECTURES, Tile
from helpers import assert_tensors_equal, assert_within_budget

CASES = (
    PromptCase("odd", images=2, layers=2, heads=2, kept=37, width=10, prompts=5),
    PromptCase("one_of_each", images=1, layers=1, heads=1, kept=1, width=1, prompts=1),
    PromptCase("33_prompts", images=2, layers=1, heads=2, kept=17, width=24, prompts=33),
    PromptCase("width_64", images=2, layers=1, heads=2, kept=67, width=64, prompts=16),
    PromptCase("width_100", images=1, layers=1, heads=1, kept=16, width=100, prompts=3),
)
ODD = CASES[0]
DTYPES = (torch.float16, torch.float32)
EIGHT_BIT = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's launch sizes, then tiny ones, with the batch in one split."""
    if request.param == "many blocks":
        monkeypatch.setattr(launch_table, "tile", lambda *_: Tile(16, 16, 1, 1))
        monkeypatch.setattr(kernels, "_PROGRAMS", 1)


def quantised(case: PromptCase, dtype: torch.dtype, scale: float = 0.02) -> tuple[Tensor, Scales]:
    values = case.kv(torch.float32) * 20
    kv = (values.round().clamp(-127, 127) if dtype == torch.int8 else values).to(dtype)
    k_scales = (0.5 + torch.rand(case.images, case.layers, case.heads, case.width)) * scale
    v_scales = (0.5 + torch.rand(case.images, case.layers, case.heads, case.kept)) * scale
    return kv, (k_scales, v_scales)


def frozen_tokens(case: PromptCase, dtype: torch.dtype, tokens: int = 41) -> tuple[Tensor, ...]:
    """k, v [L, B, H, N, D] as views of a packed projection, and which tokens are kept."""
    shape = (case.layers, case.images, tokens, 2, case.heads, case.width)
    k, v = torch.randn(shape).to(dtype).permute(3, 0, 1, 4, 2, 5)
    ranks = torch.rand(case.images, case.layers, case.heads, tokens)
    return k, v, ranks.argsort(-1)[..., : case.kept].sort(-1).values.int()


def assert_both_within_budget(
    q: Tensor,
    kv: Tensor,
    rows: Tensor | None = None,
    scales: Scales | None = None,
    grad_scale: float = 1.0,
) -> None:
    """Output, log-sum-exp and gradient of the stored form."""
    out, lse = kernels.prompt_attention(q, kv, rows, scales)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    assert out.is_contiguous() and lse.is_contiguous()
    oracle, oracle_lse = reference.prompt_attention(q.double(), kv, rows, scales)
    eager, eager_lse = reference.prompt_attention(q, kv, rows, scales)
    assert_within_budget(out, oracle, eager)
    assert_within_budget(lse, oracle_lse, eager_lse)
    grad = (torch.randn(out.shape) * grad_scale).to(q.dtype)
    grad_q = kernels.prompt_attention_backward(grad, q, kv, out, lse, rows, scales)
    assert grad_q.dtype == q.dtype and grad_q.shape == q.shape and grad_q.is_contiguous()
    oracle = reference.prompt_attention_backward(grad.double(), q.double(), kv, rows, scales)
    eager = reference.prompt_attention_backward(grad, q, kv, rows, scales)
    assert_within_budget(grad_q, oracle, eager, factor=3.0)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("kv_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_budget(case: PromptCase, q_dtype: torch.dtype, kv_dtype: torch.dtype) -> None:
    assert_both_within_budget(case.q(q_dtype), case.kv(kv_dtype))


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", EIGHT_BIT, ids=str)
@pytest.mark.parametrize("q_dtype", DTYPES, ids=str)
def test_budget_of_eight_bits(q_dtype: torch.dtype, dtype: torch.dtype) -> None:
    kv, scales = quantised(ODD, dtype)
    assert_both_within_budget(ODD.q(q_dtype), kv, torch.tensor([1, 0, 1]), scales)


@pytest.mark.parametrize("kv_dtype", [torch.float16, torch.int8, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("kept", "width", "prompts"),
    [(1, 8, 1), (17, 24, 17), (64, 72, 2), (5, 100, 100), (3, 128, 65), (130, 64, 16)],
)
def test_odd_shapes(kept: int, width: int, prompts: int, kv_dtype: torch.dtype) -> None:
    case = PromptCase("", images=2, layers=2, heads=2, kept=kept, width=width, prompts=prompts)
    if kv_dtype == torch.int8:
        kv, scales = quantised(case, kv_dtype)
        assert_both_within_budget(case.q(torch.float32), kv, None, scales)
    else:
        assert_both_within_budget(case.q(torch.float32), case.kv(kv_dtype))


def test_prompts_of_many_models() -> None:
    case = PromptCase("", images=1, layers=1, heads=1, kept=9, width=8, prompts=512)
    assert_both_within_budget(case.q(torch.float16), case.kv(torch.float16))


@pytest.mark.parametrize("q_scale", [1e-30, 1e-6, 1e4])
def test_f32_queries_of_any_size_are_multiplied_in_full(q_scale: float) -> None:
    """Parts of 16 bits hold neither 1e-30 nor, but for their common factor, 1e5."""
    kv = ODD.kv(torch.float16) / q_scale ** (q_scale > 1)
    q = ODD.q(torch.float32) * q_scale
    q[..., 0] *= 30
    assert_both_within_budget(q, kv, grad_scale=q_scale)


def test_f32_is_multiplied_in_parts_of_what_the_store_holds() -> None:
    assert kernels._products(torch.float32, torch.float16) == (torch.float16, 2)
    for dtype in EIGHT_BIT:
        assert kernels._products(torch.float32, dtype) == (torch.float16, 2)
        assert kernels._products(torch.float16, dtype) == (torch.float16, 1)
    assert kernels._products(torch.float32, torch.float32) == (torch.float32, 1)


def test_budget_of_e4m3_where_it_is_a_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_table, "architecture", lambda _: "sm_90")
    kv, scales = quantised(ODD, torch.float8_e4m3fn)
    assert_both_within_budget(ODD.q(torch.float32), kv, None, scales)


@pytest.mark.parametrize("dtype", EIGHT_BIT[1:], ids=str)
def test_every_finite_fp8_value_is_read_exactly(dtype: torch.dtype) -> None:
    """With one kept token the output is its values: those of two images."""
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(dtype)
    value = bits[bits.float().isfinite()]
    kv = value.view(2, 1, 1, 1, 1, -1).expand(-1, -1, 2, -1, -1, -1)
    width = kv.shape[-1]
    scales = (torch.zeros(2, 1, 1, width), torch.ones(2, 1, 1, 1))
    out, _ = kernels.prompt_attention(torch.ones(1, 1, 1, width), kv, None, scales)
    assert torch.equal(out.flatten(), value.float())


def test_e4m3_nan_stays_nan() -> None:
    kv, scales = quantised(ODD, torch.float8_e4m3fn)
    kv[0, 0, 0, 0, 3, 0] = math.nan
    out, _ = kernels.prompt_attention(ODD.q(torch.float32), kv, None, scales)
    heads = out.view(ODD.layers, ODD.images, ODD.prompts, ODD.heads, ODD.width)
    assert heads[0, 0, :, 0].isnan().all()
    assert int(heads.isnan().sum()) == ODD.prompts * ODD.width


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("rows", [[1], [0, 1, 1, 0, 1], [1, 0]], ids=str)
def test_rows_are_images(rows: list[int]) -> None:
    q, (kv, scales) = ODD.q(torch.float32), quantised(ODD, torch.int8)
    picked = torch.tensor(rows)
    out, lse = kernels.prompt_attention(q, kv, picked, scales)
    copies = (scales[0][picked], scales[1][picked])
    expected = kernels.prompt_attention(q, kv[picked], None, copies)
    assert_tensors_equal((out, lse), expected)
    grad = torch.randn(out.shape)
    assert torch.equal(
        kernels.prompt_attention_backward(grad, q, kv, out, lse, picked, scales),
        kernels.prompt_attention_backward(grad, q, kv[picked], out, lse, None, copies),
    )


@pytest.mark.parametrize("scale", [1e-4, 8.0, 300.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_budget_of_flat_and_of_peaked_attention(dtype: torch.dtype, scale: float) -> None:
    q = (ODD.q(torch.float32) * scale).to(dtype)
    assert_both_within_budget(q, ODD.kv(torch.float16))


@pytest.mark.parametrize("shift", [-1e4, 1e4])
def test_huge_logits(shift: float) -> None:
    """All logits far from 0 by about the same: only their differences count."""
    kv = ODD.kv(torch.float32)
    kv[:, :, 0, :, :, 0] = shift
    q = ODD.q(torch.float32)
    q[..., 0] = 1.0
    assert_both_within_budget(q, kv)


def test_tiny_scales_and_gradients_do_not_vanish_in_half_precision() -> None:
    """Plain f16 loses values of 1e-7 or so: compared with f32 of the same inputs."""
    q = ODD.q(torch.float16)
    kv, scales = quantised(ODD, torch.int8, scale=1e-6)
    scales = (scales[0] * 1e4, scales[1] * 10)
    out, lse = kernels.prompt_attention(q, kv, None, scales)
    oracle, _ = reference.prompt_attention(q.double(), kv, None, scales)
    # The output itself is subnormal in f16: within its spacing of 6e-8.
    assert float((out.double() - oracle).abs().max()) < 6e-8
    grad = torch.randn(out.shape).half()
    grad_q = kernels.prompt_attention_backward(grad, q, kv, out, lse, None, scales)
    oracle = reference.prompt_attention_backward(grad.double(), q.double(), kv, None, scales)
    assert float((grad_q.double() - oracle).abs().max()) < 6e-8


@pytest.mark.usefixtures("blocks")
def test_logits_of_minus_infinity_weigh_nothing() -> None:
    kv = ODD.kv(torch.float32)
    kv[:, :, 0, :, :20] = -math.inf  # more than a whole block
    q = ODD.q(torch.float32).abs() + 0.1
    out, lse = kernels.prompt_attention(q, kv, None, None)
    expected, expected_lse = reference.prompt_attention(q, kv)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_spoils_its_own_head_only(value: float) -> None:
    kv = ODD.kv(torch.float16)
    kv[1, 0, 0, 1, 5, :] = value
    q = ODD.q(torch.float32).abs()
    out, lse = kernels.prompt_attention(q, kv, None, None)
    expected, _ = reference.prompt_attention(q, kv)
    assert torch.equal(out.isnan(), expected.isnan()) and bool(out.isnan().any())
    grad_q = kernels.prompt_attention_backward(torch.ones_like(out), q, kv, out, lse, None, None)
    assert grad_q[0, 1].isnan().all() and int(grad_q.isnan().sum()) == ODD.prompts * ODD.width


def test_strided_store_scales_prompts_and_gradient() -> None:
    kv, (k_scales, v_scales) = quantised(ODD, torch.int8)
    q = ODD.q(torch.float32)
    out, lse = kernels.prompt_attention(q, kv, None, (k_scales, v_scales))
    grad = torch.randn(ODD.layers, ODD.images, 1, 1).expand(out.shape)
    expected = kernels.prompt_attention_backward(
        grad.contiguous(), q, kv, out, lse, None, (k_scales, v_scales)
    )
    turned = kv.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    scales = (k_scales.mT.contiguous().mT, torch.stack([v_scales] * 2, -1)[..., 1])
    turned_q = q.mT.contiguous().mT
    assert not (turned.is_contiguous() or turned_q.is_contiguous() or scales[1].is_contiguous())
    assert_tensors_equal(kernels.prompt_attention(turned_q, turned, None, scales), (out, lse))
    got = kernels.prompt_attention_backward(grad, turned_q, turned, out, lse, None, scales)
    assert torch.equal(got, expected)


@pytest.mark.parametrize("programs", [1, 9, 13, 1024])
def test_batch_is_split_anywhere(programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_PROGRAMS", programs)
    case = PromptCase("", images=5, layers=2, heads=2, kept=3, width=4, prompts=2)
    assert_both_within_budget(case.q(torch.float32), case.kv(torch.float16))


def test_repeats_change_no_bit() -> None:
    q, kv = ODD.q(torch.float16), ODD.kv(torch.float16)
    out, lse = kernels.prompt_attention(q, kv, None, None)
    grad = torch.randn(out.shape).half()
    first = kernels.prompt_attention_backward(grad, q, kv, out, lse, None, None)
    for _ in range(3):
        assert_tensors_equal(kernels.prompt_attention(q, kv, None, None), (out, lse))
        again = kernels.prompt_attention_backward(grad, q, kv, out, lse, None, None)
        assert torch.equal(again, first)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_indexed_tokens_are_the_stored_ones(dtype: torch.dtype) -> None:
    q = ODD.q(dtype)
    k, v, index = frozen_tokens(ODD, dtype)
    kv = reference._gather_tokens(k, v, index)
    stored = kernels.prompt_attention(q, kv, None, None)
    grad = torch.randn(stored[0].shape).to(dtype)
    expected = kernels.prompt_attention_backward(grad, q, kv, *stored, None, None)
    for values, places in (
        (v, index),
        (v.contiguous(), index),  # of other strides than k's
        (v, index.long()),
        (v, index.mT.contiguous().mT),
    ):
        indexed = kernels.prompt_attention_indexed(q, k, values, places)
        assert_tensors_equal(indexed, stored)
        got = kernels.prompt_attention_indexed_backward(grad, q, k, values, places, *indexed)
        assert torch.equal(got, expected)


def test_store_of_more_than_two_to_the_31_elements() -> None:
    """Two images so far apart that 32-bit offsets would wrap; untouched pages cost nothing."""
    case = PromptCase("", images=2, layers=1, heads=1, kept=3, width=4, prompts=2)
    apart = (1 << 31) + 64
    small, scales = quantised(case, torch.int8)
    store = torch.empty(apart + 64, dtype=torch.int8)
    kv = store.as_strided(small.shape, (apart, *small.stride()[1:]))
    kv.copy_(small)
    q, rows = case.q(torch.float32), torch.tensor([1, 0])
    expected = kernels.prompt_attention(q, small, rows, scales)
    assert_tensors_equal(kernels.prompt_attention(q, kv, rows, scales), expected)
    grad = torch.randn(expected[0].shape)
    assert torch.equal(
        kernels.prompt_attention_backward(grad, q, kv, *expected, rows, scales),
        kernels.prompt_attention_backward(grad, q, small, *expected, rows, scales),
    )


def test_no_images_and_no_prompts() -> None:
    q, kv = ODD.q(torch.float32), ODD.kv(torch.float16)
    none = torch.zeros(0, dtype=torch.int64)
    out, lse = kernels.prompt_attention(q, kv, none, None)
    assert out.shape == (2, 0, 5, 20) and lse.shape == (2, 0, 2, 5)
    grad_q = kernels.prompt_attention_backward(out, q, kv, out, lse, none, None)
    assert grad_q.shape == q.shape and not grad_q.any()
    out, lse = kernels.prompt_attention(q[:, :, :0], kv, None, None)
    assert out.shape == (2, 2, 0, 20) and lse.shape == (2, 2, 2, 0)


def test_compile_specs_name_every_argument() -> None:
    specs = kernels.compile_specs()
    assert {spec.architecture for spec in specs} == set(ARCHITECTURES)
    assert len({(spec.name, spec.architecture) for spec in specs}) == len(specs)
    for spec in specs:
        assert {*spec.signature, *spec.constexprs} == set(spec.kernel.arg_names)
        assert not {*spec.signature} & {*spec.constexprs}
        assert {*spec.aligned} <= {*spec.signature}
