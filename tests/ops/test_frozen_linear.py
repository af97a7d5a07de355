"""frozen_linear: maps, activation and residual against the oracle; tiles of amx where it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fpt_fast.ops import explain, frozen_linear, reference
from fpt_fast.ops.implementation import unsupported_reasons
from helpers import assert_within_budget, implementation, implementations_here

WEIGHT = torch.zeros(32, 32, dtype=torch.bfloat16)


def runs(name: str) -> bool:
    with implementation(name) as impl:
        return not unsupported_reasons("frozen_linear", impl, WEIGHT, WEIGHT)


IMPLEMENTATIONS = [impl for impl in implementations_here("frozen_linear") if runs(impl)]
TILES = [impl for impl in IMPLEMENTATIONS if impl.startswith("native/")]
# Rows, I, O: part of a tile, one and two of them, several strips, several groups of panels.
SHAPES = ((1, 32, 32), (15, 64, 96), (16, 96, 32), (31, 32, 64), (33, 128, 96), (67, 4096, 1056))
AFTER = ("nothing", "no bias", "gelu", "residual", "scaled residual")


def inputs(
    shape: tuple[int, int, int],
    after: str = "nothing",
    dtype: torch.dtype = torch.bfloat16,
    scale: float = 1.0,
) -> tuple[tuple[Tensor, Tensor, Tensor | None], dict[str, Any]]:
    """(x, weight, bias) and what comes after; results of about ``scale``."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    x, weight = normal(rows, depth).to(dtype), (normal(columns, depth) * depth**-0.5).to(dtype)
    bias, residual, factor = normal(columns), normal(rows, columns), normal(columns)
    rest: dict[str, Any] = {}
    if after == "gelu":
        rest["activation"] = "gelu"
    if "residual" in after:
        rest["residual"] = residual.to(dtype)
    if "scaled" in after:
        rest["scale"] = factor.to(dtype)
    return ((x * scale).to(dtype), weight, None if after == "no bias" else bias.to(dtype)), rest


def oracle(args: tuple[Tensor | None, ...], rest: dict[str, Any]) -> Tensor:
    x, weight, bias = (None if t is None else t.double() for t in args)
    assert x is not None and weight is not None
    wide = {name: value.double() for name, value in rest.items() if isinstance(value, Tensor)}
    return reference.frozen_linear(x, weight, bias, **{**rest, **wide})


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget(impl: str, shape: tuple[int, int, int], after: str) -> None:
    args, rest = inputs(shape, after)
    out = frozen_linear(*args, **rest, impl=impl)
    assert out.dtype == torch.bfloat16 and out.is_contiguous()
    assert_within_budget(out, oracle(args, rest), frozen_linear(*args, **rest, impl="torch"))


@pytest.mark.parametrize("scale", [1e-3, 0.3, 5.0, 1e3])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_of_gelu_where_it_is_straight_curved_and_flat(impl: str, scale: float) -> None:
    args, rest = inputs((70, 64, 64), "gelu", scale=scale)
    eager = frozen_linear(*args, **rest, impl="torch")
    assert_within_budget(frozen_linear(*args, **rest, impl=impl), oracle(args, rest), eager)


@pytest.mark.parametrize("impl", TILES, indirect=True)
def test_gelu_of_every_bf16(impl: str) -> None:
    """Identity as weights: x itself is what GELU sees."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    x = every.view(-1, 32)
    eye = torch.eye(32, dtype=torch.bfloat16)
    bad = ~x.isfinite()
    out = frozen_linear(x.masked_fill(bad, 0), eye, activation="gelu", impl=impl).double()
    exact = torch.nn.functional.gelu(x.masked_fill(bad, 0).double())
    error = (out - exact).abs()
    assert float((error - exact.abs() * 2**-8).max()) <= 5e-7
    torch.testing.assert_close(
        frozen_linear(
            torch.zeros(1, 32, dtype=torch.bfloat16),
            eye,
            torch.full((32,), torch.inf, dtype=torch.bfloat16),
            activation="gelu",
            impl=impl,
        ),
        torch.full((1, 32), torch.inf, dtype=torch.bfloat16),
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("impl", TILES, indirect=True)
def test_what_is_not_finite_stays_in_its_row(impl: str, after: str, bad: float) -> None:
    (x, weight, bias), rest = inputs((40, 64, 64), after)
    x[33, 5] = bad
    out = frozen_linear(x, weight, bias, **rest, impl=impl)
    assert not out[33].isfinite().all()
    assert out[:33].isfinite().all() and out[34:].isfinite().all()


@pytest.mark.parametrize("after", AFTER)
@pytest.mark.parametrize("impl", TILES, indirect=True)
def test_strides_threads_and_reruns_change_no_bit(impl: str, after: str) -> None:
    (x, weight, bias), rest = inputs((600, 64, 96), after)
    spread = torch.empty(600, 128, dtype=x.dtype)
    spread[:, 32:96] = x
    wide = torch.empty(96, 80, dtype=x.dtype)
    wide[:, 16:] = weight
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = frozen_linear(x, weight, bias, **rest, impl=impl)
        alone = frozen_linear(x[77:90], weight, bias, impl=impl)
        assert torch.equal(alone, frozen_linear(x, weight, bias, impl=impl)[77:90])
        for count in (2, 3, 5):
            torch.set_num_threads(count)
            again = frozen_linear(spread[:, 32:96], wide[:, 16:], bias, **rest, impl=impl)
            assert torch.equal(first, again)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_axes_before_the_last_are_rows(impl: str) -> None:
    (x, weight, bias), rest = inputs((24, 32, 64), "residual")
    flat = frozen_linear(x, weight, bias, **rest, impl=impl)
    residual = rest["residual"].view(2, 3, 4, 64)
    cube = frozen_linear(x.view(2, 3, 4, 32), weight, bias, residual=residual, impl=impl)
    assert torch.equal(cube.view(24, 64), flat)
    assert frozen_linear(x[:0], weight, bias, impl=impl).shape == (0, 64)
    assert frozen_linear(x[3], weight, bias, impl=impl).shape == (64,)


def test_other_dtypes_and_sizes_go_to_torch() -> None:
    for shape, dtype in (((5, 33, 7), torch.bfloat16), ((5, 32, 32), torch.float32)):
        args, rest = inputs(shape, "gelu", dtype)
        assert "runs 'torch'" in explain("frozen_linear", *args)
        assert torch.equal(
            frozen_linear(*args, **rest),
            torch.nn.functional.gelu(torch.nn.functional.linear(*args)),
        )


def test_fp64_is_exact() -> None:
    args, rest = inputs((5, 33, 7), "scaled residual", torch.float64)
    for impl in ("torch", "reference"):
        got = frozen_linear(*args, **rest, impl=impl)
        torch.testing.assert_close(got, oracle(args, rest), rtol=1e-12, atol=1e-12)


def test_one_graph() -> None:
    torch.compiler.reset()
    args, rest = inputs((40, 64, 64), "scaled residual")

    def apply(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return frozen_linear(x * 2, weight, bias, **rest) + 1

    compiled = torch.compile(apply, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*args), apply(*args))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "weight": a["weight"][0]}, r"weight must be \[O, I\], got shape \(32,\)"),
        (lambda a: {**a, "x": a["x"][:, :31]}, r"x must be \(4, 32\) by weight's I, got \(4, 31\)"),
        (lambda a: {**a, "x": a["x"][0, 0]}, r"x must be \[\.\.\., I\], got shape \(\)"),
        (lambda a: {**a, "x": a["x"].int()}, "x must be float16 or .*, got int32"),
        (lambda a: {**a, "bias": a["bias"][:3]}, r"bias must be \(64,\) by weight's O, got \(3,\)"),
        (lambda a: {**a, "scale": a["scale"][:3]}, r"scale must be \(64,\) by weight's O"),
        (lambda a: {**a, "scale": a["scale"].float()}, "scale must be bfloat16, got float32"),
        (lambda a: {**a, "residual": a["residual"][:2]}, r"residual must be \(4, 64\) like the re"),
        (lambda a: {**a, "residual": None}, "scale must come with a residual, got none"),
        (lambda a: {**a, "activation": "relu"}, "activation must be one of none, gelu, got 'relu'"),
        (lambda a: {**a, "activation": "gelu"}, "activation must be none with a residual, got 'g"),
        (lambda a: {**a, "x": a["x"].requires_grad_()}, "x must not require grad: .* no derivati"),
    ],
)
def test_errors_say_what_came(change: Callable[..., dict[str, Any]], message: str) -> None:
    (x, weight, bias), rest = inputs((4, 32, 64), "scaled residual")
    with pytest.raises(ValueError, match=message):
        frozen_linear(**change({"x": x, "weight": weight, "bias": bias, **rest}))


@pytest.mark.parametrize("name", [n for n in implementations_here("frozen_linear") if "/" in n])
def test_a_level_without_tiles_says_so(name: str) -> None:
    with implementation(name) as impl:
        (x, weight, bias), _ = inputs((4, 32, 64))
        if name in TILES:
            frozen_linear(x, weight, bias, impl=impl)
            return
        with pytest.raises(ValueError, match=f"needs the tiles of level amx, and level {name[7:]}"):
            frozen_linear(x, weight, bias, impl=impl)
        with pytest.raises(RuntimeError, match=f"frozen_linear needs level amx, got {name[7:]}"):
            torch.ops.fpt_native.frozen_linear(x, weight, bias, False, None, None, name[7:])


@pytest.mark.parametrize("impl", TILES, indirect=True)
def test_reasons_of_tiles(impl: str) -> None:
    for shape, dtype, why in (
        ((4, 32, 64), torch.float16, "it takes bfloat16 alone"),
        ((4, 48, 64), torch.bfloat16, r"whose sizes 32 divides, got \(64, 48\)"),
    ):
        args, _ = inputs(shape, dtype=dtype)
        with pytest.raises(ValueError, match=why):
            frozen_linear(*args, impl=impl)
    (x, weight, bias), _ = inputs((32, 32, 32))
    with pytest.raises(ValueError, match="whose last axis has stride 1"):
        frozen_linear(x, weight.mT, bias, impl=impl)


@pytest.mark.parametrize("impl", TILES, indirect=True)
def test_what_would_be_read_out_of_bounds_is_refused(impl: str) -> None:
    (x, weight, bias), rest = inputs((4, 32, 64), "scaled residual")
    residual, scale = rest["residual"], rest["scale"]
    for message, args in (
        ("x must be bfloat16", (x.float(), weight, bias, False, None, None)),
        (r"x must be \(-1, -1\)", (x[0], weight, bias, False, None, None)),
        (r"weight must be \(64, 32\)", (x, weight[:, :31], bias, False, None, None)),
        ("sizes that 32 divides", (x, weight[:31], None, False, None, None)),
        (r"bias must be \(64\)", (x, weight, bias[:31], False, None, None)),
        (r"residual must be \(4, 64\)", (x, weight, bias, False, residual[:3], None)),
        (r"scale must be \(64\)", (x, weight, bias, False, residual, scale[:3])),
        ("scale must come with", (x, weight, bias, False, None, scale)),
        ("residual must be none with", (x, weight, bias, True, residual, None)),
        ("weight must have stride 1", (x, weight.mT.contiguous().mT, None, False, None, None)),
    ):
        with pytest.raises(RuntimeError, match=message):
            torch.ops.fpt_native.frozen_linear(*args, "")
