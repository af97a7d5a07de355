"""The Triton kernel of quantise_kv in the interpreter: bits of the oracle, on odd shapes."""

import math

import pytest
import torch
from torch import Tensor

from benchmarks.cases import PromptCase
from fpt_fast.ops import reference
from fptkernels import launch_table
from fptkernels.launch_table import ARCHITECTURES, Tile
from fptkernels.quantise_kv import compile_specs, quantise_kv

TARGETS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
ODD = PromptCase("", images=2, layers=1, heads=3, kept=13, width=10, prompts=1)


def assert_equals_the_oracle(kv: Tensor, target: torch.dtype) -> tuple[Tensor, ...]:
    got = quantise_kv(kv, target)
    for one, other in zip(got, reference.quantise_kv(kv.float(), target), strict=True):
        assert one.dtype == other.dtype and one.is_contiguous()
        integer = torch.int8 if one.dtype.itemsize == 1 else torch.int32
        is_same = (one.view(integer) == other.view(integer)) | (one.isnan() & other.isnan())
        assert bool(is_same.all())
    return got


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("width", [1, 8, 24, 72, 100, 128])
@pytest.mark.parametrize("kept", [1, 17, 67])
def test_odd_shapes(kept: int, width: int, target: torch.dtype) -> None:
    case = PromptCase("", images=1, layers=2, heads=1, kept=kept, width=width, prompts=1)
    assert_equals_the_oracle(case.kv(torch.float16), target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_many_blocks(target: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch_table, "tile", lambda *_: Tile(1, 4, 1, 1))
    assert_equals_the_oracle(ODD.kv(torch.float32), target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_rounding(target: torch.dtype) -> None:
    """f32 around every 8-bit number and every half between two."""
    bits = torch.arange(256, dtype=torch.int16).to(torch.uint8).view(target).float()
    exact = bits[bits.isfinite()].unique()
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2])
    near = torch.cat(
        [points, torch.nextafter(points, points + 1), torch.nextafter(points, points - 1)]
    )
    top = float(exact.max())
    kv = torch.cat([near.clamp(-top, top), torch.tensor([top])]).view(1, 1, 1, 1, -1, 1)
    assert_equals_the_oracle(kv.expand(1, 1, 2, 1, -1, 1), target)
    assert_equals_the_oracle(kv.mT.expand(1, 1, 2, 1, 1, -1)[..., -100:], target)


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_gets_scale_nan(value: float, target: torch.dtype) -> None:
    kv = ODD.kv(torch.float16)
    kv[1, 0, 0, 2, 12, 9] = value
    kv[0, 0, 1, 1, 3, 0] = value
    _, k_scales, v_scales = assert_equals_the_oracle(kv, target)
    assert k_scales.isnan().nonzero().tolist() == [[1, 0, 2, 9]]
    assert v_scales.isnan().nonzero().tolist() == [[0, 0, 1, 3]]


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_huge_tiny_and_zero(target: torch.dtype) -> None:
    kv = ODD.kv(torch.float32)
    sizes = torch.tensor([3.4e38, 1e30, 1.0, 1e-30, 1e-36, 1e-38, 1e-44, 0.0, -0.0, 2.0**-119])
    kv[:, :, 0] = kv[:, :, 0].clamp(-1, 1) * sizes
    kv[:, :, 1] = kv[:, :, 1].clamp(-1, 1) * sizes.repeat(2)[:13, None]
    kv8, _, _ = assert_equals_the_oracle(kv, target)
    assert bool(kv8.float().isfinite().all())


def test_any_strides() -> None:
    kv = ODD.kv(torch.float16)
    turned = kv.permute(5, 4, 3, 2, 1, 0).contiguous().permute(5, 4, 3, 2, 1, 0)
    assert_equals_the_oracle(turned, torch.int8)
    assert_equals_the_oracle(kv[:1].expand(3, -1, -1, -1, -1, -1), torch.float8_e4m3fn)
    assert_equals_the_oracle(kv[..., ::2, 1::3], torch.int8)


@pytest.mark.parametrize("axis", [0, 1, 3])
def test_nothing_to_do(axis: int) -> None:
    kv = ODD.kv(torch.float16).narrow(axis, 0, 0)
    kv8, k_scales, v_scales = quantise_kv(kv, torch.int8)
    assert kv8.shape == kv.shape and k_scales.numel() == v_scales.numel() == 0


def test_compile_specs_name_every_argument() -> None:
    specs = compile_specs()
    assert {spec.architecture for spec in specs} == set(ARCHITECTURES)
    assert len({(spec.name, spec.architecture) for spec in specs}) == len(specs)
    for spec in specs:
        assert {*spec.signature, *spec.constexprs} == set(spec.kernel.arg_names)
        assert {*spec.aligned} <= {*spec.signature}
