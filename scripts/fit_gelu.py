"""csrc/kernels/gelu_table.h: Phi and the slope of GELU, less 1/2, by pieces.

``python scripts/fit_gelu.py > csrc/kernels/gelu_table.h`` makes it anew.  A piece lies around each
of 32 places, ``STEP`` apart from 0 on, and is a quadratic in the distance from it, in steps: the
interpolation at Chebyshev's nodes, which is near the best there is.
"""

from collections.abc import Callable
from math import erf, exp, pi, sqrt

import numpy as np

PIECES, END = 32, 4.25
STEP = END / (PIECES - 1)
HEAD = """\
// Written by scripts/fit_gelu.py: Phi(a) and the slope of GELU, less 1/2, by pieces, for a >= 0.

constexpr float GELU_END = {end}f, GELU_STEPS = {steps}f;  // the last place, and places to 1
"""


def phi(a: float) -> float:
    return erf(a / sqrt(2)) / 2


def slope(a: float) -> float:
    return phi(a) + a * exp(-a * a / 2) / sqrt(2 * pi)


def piece(function: Callable[[float], float], place: int) -> np.ndarray:
    """Factors of 1, r and r^2 of one piece, r from -1/2 to 1/2; at the ends from 0, and to 0."""
    low, high = -0.5 if place else 0.0, 0.5 if place < PIECES - 1 else 0.0
    nodes = (low + high) / 2 + (high - low) / 2 * np.cos(pi * (np.arange(3) + 0.5) / 3)
    values = [function((place + node) * STEP) for node in nodes]
    return np.polynomial.Polynomial.fit(nodes, values, 2, domain=[-1, 1], window=[-1, 1]).coef


def table(name: str, function: Callable[[float], float]) -> str:
    factors = np.array([piece(function, place) for place in range(PIECES)]).T
    rows = []
    for of_degree in factors:
        words = [f"{np.float32(factor):.9g}" for factor in of_degree]
        words = [word + "f" if "." in word or "e" in word else word + ".0f" for word in words]
        lines = [", ".join(words[i : i + 6]) for i in range(0, PIECES, 6)]
        rows.append("    {" + ",\n     ".join(lines) + "}")
    return f"alignas(64) constexpr float {name}[3][{PIECES}] = {{\n" + ",\n".join(rows) + "};\n"


if __name__ == "__main__":
    print(HEAD.format(end=END, steps=f"{np.float32(1 / STEP):.9g}"))
    print(table("PHI_PIECES", phi))
    print(table("SLOPE_PIECES", slope), end="")
