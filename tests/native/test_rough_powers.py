"""The polynomials of 2^x and log2 beside what is rounded to bf16, against f64."""

import re

import torch
from torch import Tensor

from helpers import ROOT

KERNELS = ROOT / "csrc" / "kernels"


def factors_of(header: str, function: str) -> list[float]:
    """What a function's lines multiply and add, the highest power's first."""
    text = (KERNELS / header).read_text(encoding="utf-8")
    found = re.search(rf"F {function}\(F x\) {{(.*?)\n}}", text, re.DOTALL)
    assert found is not None
    return [float(word) for word in re.findall(r"splat\((-?[\d.e+-]+)f\)", found[1])]


def polynomial(factors: list[float], x: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    for factor in factors:
        out = out * x + factor
    return out


def test_powers_of_two_have_the_error_that_they_say() -> None:
    x = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    factors = factors_of("tile_attention.h", "rough_power_of_two")
    assert len(factors) == 4 and factors[-1] == 1  # 1 at 0: the highest logit's weight
    error = float((polynomial(factors, x) / 2**x - 1).abs().max())
    assert 4.5e-5 < error < 9e-5


def test_logarithms_have_the_error_that_they_say() -> None:
    t = torch.linspace(0, 1, 100_001, dtype=torch.float64)
    factors = factors_of("side_tiles.h", "rough_log2")
    assert len(factors) == 6
    error = float((polynomial(factors, t) * t - torch.log2(1 + t)).abs().max())
    assert 1.5e-6 < error < 3e-6
