"""The Triton kernel of select_tokens in the interpreter: exact sets and exact copies.

Conversions to bf16 are left to a GPU: the interpreter truncates where the hardware rounds.
"""

import math
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast.ops import reference
from fpt_fast.ops import select_tokens as select_tokens_op
from fptkernels import launch_table
from fptkernels.launch_table import ARCHITECTURES, Tile
from fptkernels.select_tokens import DTYPES, compile_specs, select_tokens

INF, NAN = math.inf, math.nan
SMALLEST = struct.unpack("f", struct.pack("I", 1))[0]
NEGATIVE_NAN = torch.tensor([-1], dtype=torch.int32).view(torch.float32).item()


@pytest.fixture(params=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table's launch sizes, then tiny ones: 8 scores and 4 rows at a time."""
    if request.param == "many blocks":
        monkeypatch.setattr(launch_table, "tile", lambda *_: Tile(4, 8, 1, 1))


def assert_selects(scores: Tensor, k: Tensor, v: Tensor, keep: int, dtype: torch.dtype) -> None:
    kv, index = select_tokens(scores, k, v, keep, dtype)
    expected_kv, expected_index = reference.select_tokens(scores, k, v, keep)
    assert kv.dtype == dtype and kv.is_contiguous()
    assert index.dtype == torch.int32 and index.is_contiguous()
    assert torch.equal(index, expected_index)
    assert torch.equal(kv, expected_kv.to(dtype))


def assert_selects_each(scores: Tensor) -> None:
    """For ``scores`` [N] and few, some, all but one and all tokens kept."""
    k = torch.randn(1, 1, len(scores), 3)
    for keep in {1, 2, len(scores) // 2, len(scores) - 1, len(scores)}:
        assert_selects(scores.view(1, 1, -1), k, -k, keep, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", FROZEN_CASES[:3], ids=lambda case: case.name)
def test_equals_the_reference(case: FrozenCase, dtype: torch.dtype) -> None:
    _, k, v = case.qkv(dtype)
    scores = torch.rand(k.shape[:3])
    for keep in {1, case.keep, case.tokens}:
        assert_selects(scores, k, v, keep, dtype)


def test_rows_of_one_head_in_several_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their number, every row is written."""
    scores, k = torch.rand(1, 2, 37), torch.randn(1, 2, 37, 5)
    for block_m, keep in ((1, 5), (4, 13), (4, 37), (16, 16), (16, 17)):
        monkeypatch.setattr(launch_table, "tile", lambda *_, m=block_m: Tile(m, 16, 1, 1))
        assert_selects(scores, k, -k, keep, torch.float32)


@pytest.mark.usefixtures("blocks")
@pytest.mark.parametrize(
    "scores",
    [
        torch.full((21,), 0.25),
        torch.zeros(16),
        torch.linspace(-1, 1, 21),
        torch.linspace(1, -1, 21),
        torch.tensor([0.5, 0.1] * 9 + [0.7]),
        torch.tensor([-0.0, 0.0, -INF, INF, -0.0, 0.0, 1.0, -1.0, INF, -INF]),
        torch.tensor([0.0, SMALLEST, -SMALLEST, 2 * SMALLEST, -0.0, 1e-38, -1e-38, SMALLEST, 0.0]),
        torch.tensor([3.4e38, -3.4e38, 1e-45, INF, -INF, 3.4e38, 1.0]),
        torch.tensor([NAN, 0.5, -INF, 0.1, NAN, -INF, NEGATIVE_NAN, -3.4e38, INF]),
        torch.full((9,), NAN),
        torch.full((9,), -INF),
        torch.full((9,), INF),
    ],
    ids=[
        *("all equal", "zeros of a full block", "ascending", "descending", "two values"),
        *("signed zeros", "denormals", "huge", "nan", "only nan", "only -inf", "only inf"),
    ],
)
def test_order_of_scores(scores: Tensor) -> None:
    assert_selects_each(scores)


@pytest.mark.parametrize("keep", [205, 1025])
def test_tokens_of_a_512_px_image(keep: int) -> None:
    scores = torch.rand(1, 2, 1025)
    scores[0, 1] = torch.randint(0, 3, (1025,))
    k = torch.randn(1, 2, 1025, 1)
    assert_selects(scores, k, -k, keep, torch.float32)


def test_tokens_of_a_2048_px_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ties straddle blocks; large ones, since the interpreter's time goes by steps."""
    monkeypatch.setattr(launch_table, "tile", lambda *_: Tile(4096, 8192, 1, 1))
    scores = torch.rand(1, 1, 16385).square()
    scores[0, 0, 5000:9000] = scores.median()
    scores[0, 0, -1] = 2.0
    k = torch.randn(1, 1, 16385, 1)
    assert_selects(scores, k, -k, 8000, torch.float32)


few_values = st.sampled_from([0.0, -0.0, 0.25, -0.25, INF, -INF, NAN, SMALLEST])


@settings(max_examples=25, deadline=None)
@given(
    scores=st.lists(few_values | st.floats(width=32), min_size=1, max_size=16),
    data=st.data(),
)
def test_selection_equals_a_stable_sort(scores: list[float], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, len(scores)))
    k = torch.arange(len(scores), dtype=torch.float32).view(1, 1, -1, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch_table, "tile", lambda *_: Tile(16, 8, 1, 1))
        assert_selects(torch.tensor([[scores]]), k, -k, keep, torch.float32)


@pytest.mark.usefixtures("blocks")
def test_any_strides() -> None:
    scores = torch.rand(23, 3, 2).permute(2, 1, 0)
    k = torch.randn(11, 23, 2, 3).permute(2, 3, 1, 0)
    v = torch.randn(2, 3, 46, 22)[:, :, ::2, ::2]
    assert_selects(scores, k, v, 9, torch.float32)
    one = torch.randn(1, 1, 1, 11).expand(2, 3, 23, 11)
    assert_selects(scores[:1, :1].expand(2, 3, 23), one, v, 9, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_scores(dtype: torch.dtype) -> None:
    scores = torch.randn(1, 2, 37).to(dtype)
    scores[0, 0, ::5] = torch.finfo(dtype).smallest_normal / 4
    k = torch.randn(1, 2, 37, 4)
    assert_selects(scores, k, -k, 12, torch.float32)


@pytest.mark.parametrize("target", [torch.float16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast:RuntimeWarning")
def test_conversion_rounds_as_torch(source: torch.dtype, target: torch.dtype) -> None:
    k = torch.randn(1, 2, 19, 10).to(source)
    edges = [1 + 2**-11, 1 + 3 * 2**-11, 2**-25, 3 * 2**-25, 65504.0, 1e-6, -0.0, INF, -INF]
    k[0, 0, :9, 0] = torch.tensor(edges).to(source)
    assert_selects(torch.rand(1, 2, 19), k, -k, 19, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_copies_keep_every_bit(dtype: torch.dtype) -> None:
    """Bit patterns of NaN, infinities and denormals too."""
    integer = torch.int32 if dtype == torch.float32 else torch.int16
    limits = torch.iinfo(integer)
    bits = torch.randint(limits.min, limits.max, (1, 1, 64, 16), dtype=integer)
    bits[0, 0, 0] = -1
    kv, index = select_tokens(torch.rand(1, 1, 64), bits.view(dtype), bits.view(dtype), 33, dtype)
    for part in kv.view(integer)[0, :, 0]:
        assert torch.equal(part, bits[0, 0, index[0, 0].long()])


@pytest.mark.parametrize(("batch", "heads"), [(0, 2), (2, 0)])
def test_no_heads(batch: int, heads: int) -> None:
    k = torch.zeros(batch, heads, 5, 4)
    kv, index = select_tokens(torch.zeros(batch, heads, 5), k, k, 3, torch.float16)
    assert kv.shape == (batch, 2, heads, 3, 4) and index.shape == (batch, heads, 3)


def test_through_the_op() -> None:
    _, k, v = FROZEN_CASES[0].qkv(torch.float32)
    scores = torch.rand(k.shape[:3])
    kv, index = select_tokens_op(scores, k, v, 7, impl="triton", dtype=torch.float16)
    expected_kv, expected_index = reference.select_tokens(scores, k, v, 7)
    assert torch.equal(index, expected_index) and torch.equal(kv, expected_kv.half())


def test_opcheck() -> None:
    _, k, v = FROZEN_CASES[0].qkv(torch.float32)
    args = (torch.rand(k.shape[:3]), k, v, 7, torch.float16, "triton")
    torch.library.opcheck(torch.ops.fpt.select_tokens.default, args)


def test_compile_specs_cover_table_and_conversions() -> None:
    specs = compile_specs()
    assert {spec.architecture for spec in specs} == set(ARCHITECTURES)
    names = {spec.name for spec in specs}
    assert "select_tokens fp32->fp16 D64" in names and "select_tokens bf16->bf16 D128" in names
    assert len(specs) == len(ARCHITECTURES) * len(names)
    for spec in specs:
        assert {*spec.signature, *spec.constexprs} == set(spec.kernel.arg_names)
