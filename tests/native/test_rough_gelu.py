"""The polynomials of csrc/kernels/gelu.h against Phi and the slope of GELU, in f64."""

import re

import pytest
import torch
from torch import Tensor

from helpers import ROOT

END = 4.25


def polynomial(name: str, x: Tensor) -> Tensor:
    """What the header computes, with its own factors."""
    text = (ROOT / "csrc" / "kernels" / "gelu.h").read_text(encoding="utf-8")
    found = re.search(rf"{name}\(.*?factors\[\] = {{(.*?)}}", text, re.DOTALL)
    assert found is not None
    factors = [float(word.strip().removesuffix("f")) for word in found[1].split(",")]
    near, total = x.clamp(-END, END), torch.zeros_like(x)
    for factor in reversed(factors):
        total = total * near.square() + factor
    return torch.where(near <= -END, 0.0, total * near + 0.5)


@pytest.mark.parametrize(
    ("name", "within", "beyond"), [("rough_phi", 2e-6, 1.3e-5), ("rough_slope", 4e-5, 2e-4)]
)
def test_errors_are_those_that_the_header_says(name: str, within: float, beyond: float) -> None:
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    phi = torch.special.ndtr(x)
    density = (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    exact = phi if name == "rough_phi" else phi + x * density
    error = (polynomial(name, x) - exact).abs()
    inside = x.abs() < END
    assert within / 2 < float(error[inside].max()) < within
    assert float(error[~inside].max()) < beyond
