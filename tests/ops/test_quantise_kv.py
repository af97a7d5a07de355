"""quantise_kv: the same bits from every implementation, errors of half a step, its errors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import PROMPT_CASES, PromptCase
from fpt_fast.ops import cpu, dequantise_kv, prompt_attention, quantise_kv, reference
from fpt_fast.ops.implementation import implementations
from helpers import relative_error

IMPLEMENTATIONS = implementations("quantise_kv")
SOURCES = (torch.float16, torch.bfloat16, torch.float32)
TARGETS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0, torch.float8_e5m2: 57344.0}
SMALL = PromptCase("", images=2, layers=3, heads=2, kept=7, width=10, prompts=5)


def assert_bits_equal(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    """NaN scales and signed zeros too."""
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape and one.is_contiguous()
        integer = torch.int8 if one.dtype.itemsize == 1 else torch.int32
        same = (one.view(integer) == other.view(integer)) | (one.isnan() & other.isnan())
        assert bool(same.all()), f"differ in {int((~same).sum())} of {same.numel()} values"


def spread(case: PromptCase, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Channels and tokens of very different sizes; some of a whole row are zero."""
    kv = case.kv(torch.float32, seed)
    generator = torch.Generator().manual_seed(seed)
    kv[:, :, 0] *= torch.randn(kv.shape[-1], generator=generator).exp()
    kv[:, :, 1] *= torch.randn(kv.shape[-2], 1, generator=generator).exp()
    kv[0, 0, 0, 0, :, 0] = 0.0
    kv[0, 0, 1, 0, 0] = -0.0
    return kv.to(dtype)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", [SMALL, *PROMPT_CASES], ids=lambda case: case.name)
def test_bits_of_the_oracle_in_f32(
    case: PromptCase, impl: str, source: torch.dtype, target: torch.dtype
) -> None:
    kv = spread(case, source)
    got = quantise_kv(kv, target, impl=impl)
    assert [part.dtype for part in got] == [target, torch.float32, torch.float32]
    assert_bits_equal(got, reference.quantise_kv(kv.float(), target))


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_halves_are_rounded_to_even_and_the_largest_is_kept(impl: str, target: torch.dtype) -> None:
    """Every number half way between two neighbours, where no scaling interferes."""
    top = LARGEST[target]
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(target).float()
    exact = bits[bits.isfinite() & (bits.abs() <= top)].unique()  # sorted
    halves = (exact[1:] + exact[:-1]) / 2
    channel = torch.cat([exact, halves, torch.tensor([top])])
    kv = channel.view(1, 1, 1, 1, -1, 1).expand(1, 1, 2, 1, -1, 3)
    kv8, k_scales, _ = quantise_kv(kv, target, impl=impl)
    assert torch.equal(k_scales, torch.ones(1, 1, 1, 3))
    expected = channel.round() if target == torch.int8 else channel
    assert torch.equal(kv8[0, 0, 0, 0, :, 1].float(), expected.to(target).float())
    # The values see the same numbers, each token some of them and the largest.
    tokens = torch.stack([channel, torch.full_like(channel, top)], dim=-1)  # [K, 2]
    turned = tokens.view(1, 1, 1, 1, -1, 2).expand(1, 1, 2, 1, -1, 2)
    kv8, _, v_scales = quantise_kv(turned, target, impl=impl)
    assert bool((v_scales == 1).all())
    assert torch.equal(kv8[0, 0, 1, 0, :, 0].float(), expected.to(target).float())


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_error_is_half_a_step_at_most(impl: str, target: torch.dtype) -> None:
    case = PROMPT_CASES[2]
    kv = spread(case, torch.float32)
    kv8, k_scales, v_scales = quantise_kv(kv, target, impl=impl)
    error = (dequantise_kv(kv8, k_scales, v_scales).double() - kv.double()).abs()
    scales = torch.stack(
        [
            k_scales.unsqueeze(-2).expand_as(kv[:, :, 0]),
            v_scales.unsqueeze(-1).expand_as(kv[:, :, 1]),
        ],
        dim=2,
    ).double()
    if target == torch.int8:
        step = scales
    else:
        relative = torch.finfo(target).eps
        smallest = torch.finfo(target).tiny * relative
        step = torch.maximum(kv.double().abs() * relative, scales * smallest)
    # Rounding of the scale, the product and the way back: a few units of f32.
    assert bool((error <= 0.5 * step + 4e-7 * kv.double().abs()).all())


@settings(max_examples=25, deadline=None)
@given(
    values=st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), min_size=1),
    target=st.sampled_from(TARGETS),
)
def test_any_finite_numbers(values: list[float], target: torch.dtype) -> None:
    kv = torch.tensor(values).view(1, 1, 1, 1, -1, 1).expand(1, 1, 2, 1, -1, 1)
    expected = reference.quantise_kv(kv.contiguous(), target)
    assert all(bool(part.float().isfinite().all()) for part in expected)
    for impl in IMPLEMENTATIONS:
        assert_bits_equal(quantise_kv(kv, target, impl=impl), expected)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_too_small_for_a_scale_becomes_zero_of_scale_zero(impl: str) -> None:
    kv = torch.full((1, 1, 2, 1, 3, 4), 1e-37)
    kv[..., 1] = 0.0
    kv8, k_scales, v_scales = quantise_kv(kv, impl=impl)
    assert not kv8.any() and not k_scales.any() and not v_scales.any()
    assert not dequantise_kv(kv8, k_scales, v_scales).any()
    normal = torch.full_like(kv, 2.0**-118)  # a scale of just above 2^-126
    kv8, k_scales, v_scales = quantise_kv(normal, impl=impl)
    assert bool((kv8 == 127).all()) and bool((k_scales >= 2.0**-126).all())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_no_images(impl: str) -> None:
    kv8, k_scales, v_scales = quantise_kv(torch.zeros(0, 3, 2, 4, 7, 8).half(), impl=impl)
    assert kv8.shape == (0, 3, 2, 4, 7, 8) and kv8.dtype == torch.int8
    assert k_scales.shape == (0, 3, 4, 8) and v_scales.shape == (0, 3, 4, 7)
    assert dequantise_kv(kv8, k_scales, v_scales).shape == kv8.shape


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_any_strides(impl: str) -> None:
    kv = spread(SMALL, torch.float16)
    turned = kv.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    expected = quantise_kv(kv, impl=impl)
    assert_bits_equal(quantise_kv(turned, impl=impl), expected)
    one = kv[:1].expand(3, -1, -1, -1, -1, -1)
    assert_bits_equal(
        quantise_kv(one, impl=impl),
        tuple(p[:1].expand(3, *p.shape[1:]).contiguous() for p in expected),
    )


@pytest.mark.parametrize(("target", "bound"), [*zip(TARGETS, (0.01, 0.04, 0.08), strict=True)])
def test_prompt_attention_reads_what_is_written(target: torch.dtype, bound: float) -> None:
    case = PROMPT_CASES[2]
    q, kv = case.q(torch.float32), case.kv(torch.float16)
    kv8, *scales = quantise_kv(kv, target)
    out = prompt_attention(q, kv8, None, (scales[0], scales[1]))
    plain = prompt_attention(q, dequantise_kv(kv8, scales[0], scales[1]))
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    assert relative_error(out, prompt_attention(q, kv)) < bound


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest new memory that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and not func.is_view:
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_no_wide_copy_of_the_features() -> None:
    kv = PromptCase("", images=8, layers=4, heads=4, kept=31, width=16, prompts=1).kv(torch.float16)
    with LargestTensor() as seen:
        cpu.quantise_kv(kv, torch.int8)
    assert 0 < seen.largest <= kv.numel()  # the result itself


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_what_is_not_finite_is_refused_by_place(impl: str, value: float) -> None:
    kv = SMALL.kv(torch.float16)
    kv[1, 2, 1, 0, 5, 3:5] = value
    place = "the first in the values of image 1, layer 2, head 0, token 5"
    message = f"kv must be finite, got NaN or infinity in 2 of 1680 values, {place}; look for"
    with pytest.raises(ValueError, match=message):
        quantise_kv(kv, impl=impl)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_the_oracle_turns_it_into_zeros_of_scale_nan(target: torch.dtype, value: float) -> None:
    kv = SMALL.kv(torch.float32)
    kv[1, 2, 0, 1, 4, 3] = value
    kv8, k_scales, v_scales = reference.quantise_kv(kv, target)
    assert k_scales.isnan().nonzero().tolist() == [[1, 2, 1, 3]]
    assert not v_scales.isnan().any()
    assert not kv8[1, 2, 0, 1, :, 3].float().any()
    assert bool(kv8.float().isfinite().all())
    wide = dequantise_kv(kv8, k_scales, v_scales)
    assert wide[1, 2, 0, 1, :, 3].isnan().all() and int(wide.isnan().sum()) == SMALL.kept


GOOD = torch.zeros(4, 2, 2, 3, 7, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv": GOOD[0]}, r"kv must be \[M, L, 2, H, K, D\], got shape \(2, 2, 3, 7, 8\)"),
        (
            {"kv": GOOD[:, :, :1]},
            r"kv must be \(4, 2, 2, 3, 7, 8\) with keys and values in its 3rd",
        ),
        ({"kv": GOOD[..., :0, :]}, "kv must have K of at least 1"),
        ({"kv": GOOD[..., :0]}, "kv must have D of at least 1"),
        ({"kv": GOOD.double()}, "kv must be float16 or bfloat16 or float32, got float64"),
        ({"dtype": torch.uint8}, "dtype must be int8 or float8_e4m3fn or .*, got torch.uint8"),
        ({"kv": GOOD.clone().requires_grad_()}, "kv must not require grad: quantise_kv has no"),
        ({"impl": "fast"}, "impl must be 'auto' or one of .* for quantise_kv, got 'fast'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_the_argument(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantise_kv(**{"kv": GOOD, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv8": torch.zeros(2, 3, 7, 8).to(torch.int8)}, r"kv8 must be \[M, L, 2, H, K, D\], got"),
        ({"kv8": GOOD}, "kv8 must be int8 or .*, got float32"),
        ({"k_scales": torch.ones(4, 2, 3, 7)}, r"k_scales must be \(4, 2, 3, 8\) \[M, L, H, D\]"),
        ({"v_scales": torch.ones(4, 2, 3, 8)}, r"v_scales must be \(4, 2, 3, 7\) \[M, L, H, K\]"),
        ({"v_scales": torch.ones(4, 2, 3, 7).half()}, "v_scales must be float32, got float16"),
        ({"k_scales": torch.ones(4, 2, 3, 8, device="meta")}, "k_scales must be on cpu like kv8"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_on_the_way_back(change: dict[str, Tensor], message: str) -> None:
    good = {
        "kv8": GOOD.to(torch.int8),
        "k_scales": torch.ones(4, 2, 3, 8),
        "v_scales": torch.ones(4, 2, 3, 7),
    }
    with pytest.raises(ValueError, match=message):
        dequantise_kv(**{**good, **change})
