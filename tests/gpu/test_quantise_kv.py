"""quantise_kv on a GPU: the bits of the CPU, in every pair of dtypes; NaN; repeats."""

import math

import pytest
import torch

from benchmarks.cases import FULL_PROMPT_CASES, PROMPT_CASES, PromptCase
from fpt_fast.ops import quantise_kv
from helpers import assert_tensors_equal
from on_device import DTYPES, EIGHT_BIT_DTYPES, ON_GPU, REPEATS

pytestmark = pytest.mark.gpu

TINY = PromptCase("tiny", images=2, layers=1, heads=2, kept=19, width=10, prompts=1)
CASES = (*PROMPT_CASES, *FULL_PROMPT_CASES) if ON_GPU else (TINY,)


def bits(parts: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [part.view(torch.int8 if part.dtype.itemsize == 1 else torch.int32) for part in parts]


@pytest.mark.parametrize("target", EIGHT_BIT_DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bits_of_the_cpu(
    case: PromptCase, source: torch.dtype, target: torch.dtype, device: torch.device
) -> None:
    kv = case.kv(source)
    # Half of the largest, a tie that one wrong rounding shows.
    kv[:, :, 0, :, 0] = kv[:, :, 0].abs().amax(-2) / 2
    expected = quantise_kv(kv, target, impl="cpu")
    got = quantise_kv(kv.to(device), target, impl="triton")
    assert_tensors_equal(bits(tuple(part.cpu() for part in got)), bits(expected))
    for _ in range(REPEATS):
        assert_tensors_equal(bits(quantise_kv(kv.to(device), target, impl="triton")), bits(got))


@pytest.mark.parametrize("target", EIGHT_BIT_DTYPES, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 3e38, 1e-37, 1e-44])
def test_numbers_at_the_edges(value: float, target: torch.dtype, device: torch.device) -> None:
    from fptkernels import quantise_kv as kernels

    kv = TINY.kv(torch.float32)
    kv[:, :, 0, 1, :, 3] = kv[:, :, 0, 1, :, 3].sign() * value
    kv[:, :, 1, 0, 5] = value
    got = kernels.quantise_kv(kv.to(device), target)
    again = kernels.quantise_kv(kv.to(device), target)
    for part, other in zip(got, again, strict=True):
        same = (part.float() == other.float()) | (part.float().isnan() & other.float().isnan())
        assert bool(same.all())
    kv8, k_scales, v_scales = (part.cpu() for part in got)
    assert bool(kv8.float().isfinite().all())
    assert int(k_scales.isnan().sum()) == (0 if math.isfinite(value) else TINY.images)
    assert int(v_scales.isnan().sum()) == (0 if math.isfinite(value) else TINY.images)
