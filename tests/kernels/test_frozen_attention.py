"""frozen_attention in Triton's interpreter: budgets, odd shapes, strides, extreme and bad inputs.

``tests/ops/test_frozen_attention.py`` runs its own cases through ``impl="triton"`` too.
"""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FrozenCase
from fpt_fast import ops
from fpt_fast.ops import implementation, reference
from fptkernels import launch_table
from fptkernels.frozen_attention import frozen_attention
from helpers import assert_within_budget

DTYPES = (torch.float32, torch.float16)
# Tails of one row and of more than a small tile, whole blocks only, less than a block; widths that
# need padding and that do not.
SHAPES = (
    (1, 2, 65, 16),
    (2, 1, 64, 3),
    (1, 1, 33, 32),
    (1, 2, 5, 17),
    (1, 1, 1, 1),
    (1, 1, 129, 8),
    (1, 1, 128, 64),
    (1, 1, 150, 20),
)


def qkv(shape: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    return FrozenCase("", *shape, 1).qkv(dtype)


def assert_budget(q: Tensor, k: Tensor, v: Tensor, got: tuple[Tensor, Tensor]) -> None:
    oracle = reference.frozen_attention(q.double(), k.double(), v.double())
    for ours, wide, eager in zip(got, oracle, reference.frozen_attention(q, k, v), strict=True):
        assert_within_budget(ours, wide, eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_budget(shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    q, k, v = qkv(shape, dtype)
    out, lse = frozen_attention(q, k, v)
    assert out.shape == q.shape and out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    assert lse.shape == q.shape[:3] and lse.dtype == torch.float32
    assert_budget(q, k, v, (out, lse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1e-6, 0.1, 5.0, 20.0])
def test_budget_of_tiny_and_of_huge_logits(scale: float, dtype: torch.dtype) -> None:
    """Up to 2,000 in size."""
    q, k, v = qkv((1, 2, 37, 10), dtype)
    q, k = q * scale, k * scale
    assert_budget(q, k, v, frozen_attention(q, k, v))


def test_logits_beyond_f16_stay_finite() -> None:
    q = torch.full((1, 1, 3, 16), 200.0, dtype=torch.float16)
    out, lse = frozen_attention(q, q, q)
    assert torch.equal(out, q)
    torch.testing.assert_close(lse, torch.full((1, 1, 3), 160000 + torch.tensor(3.0).log().item()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_reruns_change_no_bit(dtype: torch.dtype) -> None:
    q, k, v = qkv((2, 2, 37, 10), dtype)
    assert not q.is_contiguous()
    first = frozen_attention(q, k, v)
    for layout in (
        lambda x: x,
        torch.Tensor.contiguous,
        lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        again = frozen_attention(layout(q), layout(k), layout(v))
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 36, 64])
def test_a_bad_query_spoils_its_own_row(token: int, bad: float) -> None:
    q, k, v = (x.contiguous().abs() for x in qkv((2, 2, 65, 10), torch.float32))
    q[1, 0, token, 3] = bad
    out, lse = frozen_attention(q, k, v)
    expected, expected_lse = reference.frozen_attention(q, k, v)
    assert expected[1, 0, token].isnan().all() and int(expected.isnan().sum()) == 10
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    assert bool(lse[1, 0, token].isnan())
    expected_lse[1, 0, token] = torch.nan
    torch.testing.assert_close(lse, expected_lse, rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("token", [0, 36, 64])
def test_a_bad_key_spoils_its_own_head(token: int, bad: float) -> None:
    q, k, v = (x.contiguous().abs() for x in qkv((2, 2, 65, 10), torch.float32))
    k[1, 0, token, 3] = bad
    out, lse = frozen_attention(q, k, v)
    assert out[1, 0].isnan().all() and lse[1, 0].isnan().all()
    assert int(out.isnan().sum()) == 650 and int(lse.isnan().sum()) == 65
    torch.testing.assert_close(
        out, reference.frozen_attention(q, k, v)[0], rtol=1e-5, atol=1e-6, equal_nan=True
    )


def test_a_nan_value_spoils_its_own_column() -> None:
    q, k, v = (x.contiguous() for x in qkv((1, 2, 65, 10), torch.float32))
    v[0, 1, 64, 3] = torch.nan
    out, lse = frozen_attention(q, k, v)
    assert out[0, 1, :, 3].isnan().all() and int(out.isnan().sum()) == 65
    assert lse.isfinite().all()


@pytest.mark.parametrize("masked", [slice(0, 64), slice(64, 65)])
def test_logits_of_minus_inf_are_weights_of_zero(masked: slice) -> None:
    """Also where the first block of keys has no finite logit."""
    q, k, v = (x.contiguous().abs() for x in qkv((1, 1, 65, 10), torch.float32))
    k[0, 0, masked, 3] = -torch.inf
    got, expected = frozen_attention(q, k, v), reference.frozen_attention(q, k, v)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_rows_of_minus_inf_are_nan_as_in_softmax() -> None:
    q, k, v = (x.contiguous().abs() for x in qkv((1, 1, 37, 4), torch.float32))
    q[0, 0, 5, 2] = -torch.inf
    out, lse = frozen_attention(q, k, v)
    assert out[0, 0, 5].isnan().all() and int(out.isnan().sum()) == 4
    assert float(lse[0, 0, 5]) == -torch.inf and int(lse.isfinite().sum()) == 36


def test_no_images() -> None:
    q = torch.zeros(0, 3, 5, 8)
    out, lse = frozen_attention(q, q, q)
    assert out.shape == (0, 3, 5, 8) and lse.shape == (0, 3, 5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiles_as_one_graph(dynamic: bool) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = ops.frozen_attention(q * 2, k, v, impl="triton")
        return out.transpose(1, 2).flatten(2) + lse.sum()

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (17, 33):
        inputs = qkv((1, 2, tokens, 10), torch.float32)
        torch.testing.assert_close(compiled(*inputs), attend(*inputs))


def test_what_the_kernel_does_not_take_is_said() -> None:
    q = torch.zeros(1, 1, 3, 129)
    reasons = implementation.unsupported_reasons("frozen_attention", "triton", q, q, q)
    assert reasons == ["it takes a head width of at most 128, got 129"]
    with pytest.raises(ValueError, match="impl='triton' cannot run frozen_attention here"):
        ops.frozen_attention(q, q, q, impl="triton")


def test_the_table_has_a_row_for_every_launch() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for width in (1, 16, 17, 64, 80, 128):
            for architecture in launch_table.ARCHITECTURES:
                padded = launch_table.pad_width(width)
                assert ("frozen_attention", dtype, padded, architecture) in launch_table.TABLE
