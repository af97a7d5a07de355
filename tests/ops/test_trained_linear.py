"""trained_linear: map and three gradients against the oracle, rows side by side and in patches."""

import pytest
import torch
from torch import Tensor

from fpt_fast.ops import explain, reference, trained_linear
from fpt_fast.ops.implementation import unsupported_reasons
from helpers import (
    assert_tensors_equal,
    assert_within_budget,
    implementation,
    implementations_here,
)

WEIGHT = torch.zeros(16, 32)


def runs(name: str) -> bool:
    with implementation(name) as impl:
        return not unsupported_reasons("trained_linear", impl, WEIGHT, WEIGHT, None)


# What is torch's own is the same bits as torch's, and no more: see below.
IMPLEMENTATIONS = [
    impl for impl in implementations_here("trained_linear") if runs(impl) and impl != "torch"
]
LEVELS = [impl for impl in IMPLEMENTATIONS if impl.startswith("native/")]
# Rows, K, O: one row, parts of a tile, odd numbers of tiles, several groups of rows, more than one
# block of the depth both ways.
SHAPES = ((1, 32, 16), (15, 64, 48), (16, 96, 32), (33, 32, 80), (131, 800, 96), (401, 224, 16))


def inputs(
    shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, weight, bias and the output's gradient."""
    rows, depth, columns = shape
    generator = torch.Generator().manual_seed(seed)
    x, weight, bias, grad = (
        torch.randn(size, generator=generator, dtype=torch.float64)
        for size in ((rows, depth), (columns, depth), (columns,), (rows, columns))
    )
    return x.to(dtype), (weight * depth**-0.5).float(), bias.float(), grad.float()


def patches() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same of 2 x 3 patches of 16 x 32 pixels of three images with three channels, as a view;
    of images that are every second of five."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(5, 3, 2 * 16, 3 * 32, generator=generator)[::2]
    x = pixels.view(3, 3, 2, 16, 3, 32).permute(0, 2, 4, 1, 3, 5)
    weight = torch.randn(48, 3, 16, 32, generator=generator) * 0.03
    grad = torch.randn(3, 2, 3, 48, generator=generator)
    return x, weight, torch.randn(48, generator=generator), grad


def with_gradients(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    grad: Tensor,
    impl: str,
    added: Tensor | None = None,
) -> list[Tensor]:
    """Output, and gradients to what there is."""
    given = [None if t is None else t.detach().requires_grad_() for t in (x, weight, bias, added)]
    out = trained_linear(given[0], given[1], *given[2:], impl=impl)  # type: ignore[arg-type]
    leaves = [leaf for leaf in given if leaf is not None]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def exact(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor, added: Tensor | None = None
) -> list[Tensor]:
    wide, rows = (x.double(), weight.double()), None if added is None else added.double()
    out = reference.trained_linear(*wide, None if bias is None else bias.double(), rows)
    gradients = reference.trained_linear_backward(grad.double(), *wide, rows)
    of_added = [] if added is None else [gradients[0].sum_to_size(added.shape)]
    return [out, *(gradients if bias is not None else gradients[:2]), *of_added]


def assert_all_within_budget(
    impl: str, args: tuple[Tensor, Tensor, Tensor | None, Tensor], added: Tensor | None = None
) -> None:
    ours, oracle = with_gradients(*args, impl, added), exact(*args, added)
    eager = with_gradients(*args, "torch", added)
    assert [t.dtype for t in ours] == [t.dtype for t in eager]
    for number, (got, expected, plain) in enumerate(zip(ours, oracle, eager, strict=True)):
        assert_within_budget(got, expected, plain, 3.0 if number else 2.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget(impl: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    assert_all_within_budget(impl, inputs(shape, dtype))


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_of_patches(impl: str) -> None:
    assert_all_within_budget(impl, patches())


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_without_bias(impl: str) -> None:
    x, weight, _, grad = inputs((37, 64, 48))
    assert_all_within_budget(impl, (x, weight, None, grad))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sizes", [(3, 7, 1), (1, 7, 13), (3, 1, 13), (1, 1, 1), (3, 7, 13)])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_of_rows_that_are_added(
    impl: str, sizes: tuple[int, int, int], dtype: torch.dtype
) -> None:
    """Along any axis the same, with groups of rows that end anywhere within them."""
    x, weight, bias, grad = inputs((3 * 7 * 13, 64, 48))
    x, grad = x.view(3, 7, 13, 64).to(dtype), grad.view(3, 7, 13, 48)
    added = torch.randn(*sizes, 64, generator=torch.Generator().manual_seed(1))
    assert_all_within_budget(impl, (x, weight, bias, grad), added)
    assert_all_within_budget(impl, (x, weight, None, grad), added)


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_rows_of_nothing_are_added(impl: str) -> None:
    """Rows of zeros change no bit; and they have a gradient where x has no rows."""
    x, weight, bias, grad = inputs((96, 64, 48), torch.bfloat16)
    x, grad = x.view(6, 16, 64), grad.view(6, 16, 48)
    added = torch.zeros(1, 16, 64)
    with_added = with_gradients(x, weight, bias, grad, impl, added)
    assert_tensors_equal(with_added[:4], with_gradients(x, weight, bias, grad, impl))
    *_, grad_added = with_gradients(x[:0], weight, bias, grad[:0], impl, added)
    assert grad_added.shape == added.shape and not bool(grad_added.any())


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_sums_are_not_rounded_to_bf16(impl: str) -> None:
    """Of factors that bf16 holds, results are those of f32: torch's are rounded once more."""
    x, weight, bias, grad = inputs((77, 160, 32))
    narrow = [t.bfloat16().float() for t in (x, weight, bias, grad)]
    ours, oracle = with_gradients(*narrow, impl), exact(*narrow)  # type: ignore[arg-type]
    for got, expected in zip(ours, oracle, strict=True):
        assert float((got - expected).abs().max()) < 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_rows_that_are_a_view_are_read_where_they_are(impl: str) -> None:
    x, weight, bias, grad = inputs((45, 64, 32), torch.bfloat16)
    wide = torch.zeros(90, 3, 80, dtype=torch.bfloat16)
    view = wide[::2, 1, 8:72]
    view.copy_(x)
    results = with_gradients(view, weight, bias, grad, impl)
    assert_tensors_equal(results, with_gradients(x, weight, bias, grad, impl))


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_threads_do_not_change_a_bit(impl: str) -> None:
    threads = torch.get_num_threads()
    args, added, results = inputs((517, 608, 96)), torch.randn(1, 608), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(with_gradients(*args, impl, added))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_tensors_equal(result, results[0])


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_no_rows(impl: str) -> None:
    x, weight, bias, grad = inputs((0, 64, 32))
    out, *gradients = with_gradients(x, weight, bias, grad, impl)
    assert out.shape == (0, 32)
    assert [g.shape for g in gradients] == [x.shape, weight.shape, bias.shape]
    assert not any(bool(g.any()) for g in gradients)


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_only_what_is_asked_for_has_a_gradient(impl: str) -> None:
    x, weight, bias, grad = patches()
    weight.requires_grad_()
    trained_linear(x, weight, bias, impl=impl).backward(grad)
    (expected,) = (exact(x, weight.detach(), bias, grad)[2],)
    assert weight.grad is not None and x.grad is None and bias.grad is None
    assert_within_budget(weight.grad, expected, with_gradients(x, weight, bias, grad, "torch")[2])


def test_gradcheck() -> None:
    x, weight, bias, _ = (t.double().requires_grad_() for t in inputs((3, 32, 16)))
    torch.autograd.gradcheck(
        lambda *args: trained_linear(*args, impl="reference"), (x, weight, bias)
    )


def test_torch_is_torch_and_compiled_code_is_torch() -> None:
    x, weight, bias, _ = inputs((5, 64, 32))
    narrow = (t.bfloat16() for t in (x, weight, bias))
    plain = torch.nn.functional.linear(*narrow).float()
    assert torch.equal(trained_linear(x, weight, bias, impl="torch"), plain)
    torch.compiler.reset()
    compiled = torch.compile(trained_linear, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, weight, bias), plain)


@pytest.mark.parametrize("impl", LEVELS[:1] or ["reference"], indirect=True)
def test_compiles_by_name(impl: str) -> None:
    torch.compiler.reset()
    args = inputs((5, 64, 32))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return (trained_linear(x * 2, weight, bias, impl=impl) + 1).square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (compiled, loss):
        leaves = [t.clone().requires_grad_() for t in args[:3]]
        out = function(*leaves)
        results.append([out.detach(), *torch.autograd.grad(out, leaves)])
    torch.testing.assert_close(*results)


def test_what_native_cannot_take_goes_to_torch() -> None:
    x, weight, bias, _ = inputs((5, 64, 32))
    for args, reason in (
        ((x.half(), weight, bias), "it takes x in bfloat16 or float32"),
        ((x, weight.double(), bias.double()), "and weights in float32"),
        ((x, weight[:20].contiguous(), bias[:20]), "with O and the last axis that 16 divides"),
        ((x[:, :48], weight[:, :48].contiguous(), bias), "in all that 32 divides"),
        ((x, weight.t().contiguous().t(), bias), "it takes contiguous weights"),
        ((x.t().contiguous().t(), weight, bias), "whose last axis has stride 1"),
        ((x, weight, bias, x.half()), "it takes x in bfloat16 or float32"),
        ((x, weight, bias, x.t().contiguous().t()), "whose last axis has stride 1"),
    ):
        assert "impl='auto' runs 'torch'" in explain("trained_linear", *args)
        if LEVELS:
            assert reason in explain("trained_linear", *args)
        wide = args[1].dtype
        expected = trained_linear(*args, impl="reference")
        out = trained_linear(*args)
        assert out.dtype == wide
        torch.testing.assert_close(out, expected, rtol=2e-2, atol=5e-2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(32)}, r"weight must be \[O, K\], got shape \(32,\)"),
        ({"x": torch.zeros(())}, r"x must be \[\.\.\., K\] with weight's K, got shape \(\)"),
        ({"x": torch.zeros(5, 63)}, r"x must be \(5, 64\) by weight's K, got \(5, 63\)"),
        ({"x": torch.zeros(5, 64, dtype=torch.int64)}, "x must be float16 or .*, got int64"),
        ({"weight": torch.zeros(32, 64).half()}, "weight must be float32 or float64, got float16"),
        ({"bias": torch.zeros(31)}, r"bias must be \(32,\) by weight's O, got \(31,\)"),
        ({"bias": torch.zeros(32).double()}, "bias must be float32, got float64"),
        ({"weight": torch.zeros(32, 64, device="meta")}, "weight must be on cpu like x, got meta"),
        ({"bias": torch.zeros(32, device="meta")}, "bias must be on cpu like x, got meta"),
        ({"added": torch.zeros(64)}, r"added must be \(5, 64\) like x, or 1 .*, got \(64,\)"),
        ({"added": torch.zeros(3, 64)}, r"added must be \(5, 64\) like x, .*, got \(3, 64\)"),
        ({"added": torch.zeros(1, 1)}, r"added must be \(1, 64\) like x, .*, got \(1, 1\)"),
        ({"added": torch.zeros(1, 64).int()}, "added must be float16 or .*, got int32"),
        ({"added": torch.zeros(1, 64, device="meta")}, "added must be on cpu like x, got meta"),
        ({"impl": "triton"}, "impl must be 'auto' or one of 'native', 'torch', 'reference'"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    x, weight, bias, _ = inputs((5, 64, 32))
    with pytest.raises(ValueError, match=message):
        trained_linear(**{"x": x, "weight": weight, "bias": bias, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize("impl", LEVELS[:1], indirect=True)
def test_what_would_leave_a_tensor_is_refused(impl: str) -> None:
    native = torch.ops.fpt_native
    x, weight, bias, grad = inputs((5, 64, 32))
    for args, message in (
        (
            (torch.zeros(5, 48), weight, bias),
            "x must have size 64 like weight along axis 1, got 48",
        ),
        ((x.t().contiguous().t(), weight, bias), "x must have stride 1"),
        ((x, weight, bias[:31]), r"bias must be \(32\)"),
        ((x.half(), weight, bias), "x must be bfloat16 or float32, got float16"),
        ((x, weight.double(), bias), "weight must be float32"),
        ((x[:, :48], weight[:, :48].contiguous(), bias), "got 48, 48 and 32"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.trained_linear(*args, None, "")
    with pytest.raises(RuntimeError, match=r"grad must be \(5, 32\)"):
        native.trained_linear_backward(grad[:4], x, weight, None, True, "")
    for added, message in (
        (torch.zeros(4, 64), r"added must have the axes of x, or 1 .*, got \(4\) and \(5\)"),
        (torch.zeros(64), "added must have the axes of x"),
        (torch.zeros(5, 64).half(), "added must be bfloat16 or float32, got float16"),
    ):
        with pytest.raises(RuntimeError, match=message):
            native.trained_linear(x, weight, bias, added, "")
        with pytest.raises(RuntimeError, match=message):
            native.trained_linear_backward(grad, x, weight, added, True, "")
