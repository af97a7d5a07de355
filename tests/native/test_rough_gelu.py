"""The pieces of csrc/kernels/gelu_table.h against Phi and the slope of GELU, in f64."""

import re
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from helpers import ROOT

END, PIECES = 4.25, 32
HEADER = ROOT / "csrc" / "kernels" / "gelu_table.h"


def numbers_of(text: str, name: str) -> Tensor:
    """Factors of 1, r and r^2 of each piece, [3, 32]."""
    found = re.search(rf"{name}\[3\]\[32\] = (.*?);", text, re.DOTALL)
    assert found is not None
    words = re.findall(r"-?\d[\d.e+-]*", found[1])
    return torch.tensor([float(word) for word in words], dtype=torch.float64).view(3, PIECES)


def by_pieces(name: str, x: Tensor) -> Tensor:
    """What csrc/kernels/gelu.h computes, with its own factors."""
    factors = numbers_of(HEADER.read_text(encoding="utf-8"), name)
    steps = x.abs().clamp(max=END) * ((PIECES - 1) / END)
    place = steps.round().long()
    r = steps - place
    half = (factors[2, place] * r + factors[1, place]) * r + factors[0, place]
    return torch.where(x <= -END, 0.0, 0.5 + half * x.sign())


@pytest.mark.parametrize(
    ("name", "within", "beyond"),
    [("PHI_PIECES", 6e-6, 1.3e-5), ("SLOPE_PIECES", 3e-5, 2e-4)],
)
def test_errors_are_those_that_the_header_says(name: str, within: float, beyond: float) -> None:
    x = torch.linspace(-12, 12, 48_001, dtype=torch.float64)
    phi = torch.special.ndtr(x)
    density = (-x.square() / 2).exp() / (2 * torch.pi) ** 0.5
    exact = phi if name == "PHI_PIECES" else phi + x * density
    error = (by_pieces(name, x) - exact).abs()
    inside = x.abs() < END
    assert within / 2 < float(error[inside].max()) < within
    assert float(error[~inside].max()) < beyond


def test_the_header_is_what_its_script_writes() -> None:
    made = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "fit_gelu.py")],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept = HEADER.read_text(encoding="utf-8")
    for name in ("PHI_PIECES", "SLOPE_PIECES"):
        # Another numpy may round another way.
        torch.testing.assert_close(
            numbers_of(made, name), numbers_of(kept, name), rtol=1e-6, atol=1e-12
        )
    assert re.sub(r"-?\d[\d.e+-]*f?", "", made) == re.sub(r"-?\d[\d.e+-]*f?", "", kept)
