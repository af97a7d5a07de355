"""side_attention: output and three gradients against the oracle, at every level of native."""

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.ops import explain, reference, side_attention
from helpers import assert_within_budget, implementation, implementations_here

# What is torch's own is the same bits as torch's, and no more: see below.
IMPLEMENTATIONS = [impl for impl in implementations_here("side_attention") if impl != "torch"]
LEVELS = [impl for impl in IMPLEMENTATIONS if impl.startswith("native/")]
# B, H, Q, T, D
SHAPES = (
    (1, 1, 1, 1, 1),
    (2, 3, 5, 7, 8),
    (1, 2, 33, 49, 5),
    (2, 1, 1, 81, 8),
    (1, 2, 16, 16, 16),
    (1, 1, 37, 213, 11),
)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v as the side network has them: views of one projection."""
    batch, heads, queries, tokens, width = shape
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(batch, tokens, 3, heads, width, generator=generator, dtype=torch.float64)
    q, k, v = wide.to(dtype).permute(2, 0, 3, 1, 4)
    return q[:, :, :queries] if queries <= tokens else q, k, v


def with_gradients(attend: Attend, qkv: tuple[Tensor, ...], grad: Tensor) -> Iterator[Tensor]:
    q, k, v = (x.detach().clone().requires_grad_() for x in qkv)
    out = attend(q, k, v)
    yield out.detach()
    yield from torch.autograd.grad(out, (q, k, v), grad.to(out.dtype))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return reference.side_attention(q, k, v)[0]


def assert_all_within_budget(qkv: tuple[Tensor, ...], attend: Attend) -> None:
    grad = torch.randn(qkv[0].shape, dtype=torch.float64).to(qkv[0].dtype)
    oracle = with_gradients(plain, tuple(x.double() for x in qkv), grad)
    eager = with_gradients(plain, qkv, grad)
    ours = with_gradients(attend, qkv, grad)
    for i, (got, exact, rounded) in enumerate(zip(ours, oracle, eager, strict=True)):
        assert got.dtype == qkv[0].dtype and got.shape == exact.shape
        assert_within_budget(got, exact, rounded, factor=3.0 if i else 2.0)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget(impl: str, shape: tuple[int, ...]) -> None:
    assert_all_within_budget(inputs(shape), lambda q, k, v: side_attention(q, k, v, impl=impl))


@pytest.mark.parametrize("scale", [1e-3, 5.0, 30.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_of_flat_and_of_peaked_attention(impl: str, scale: float) -> None:
    q, k, v = inputs((1, 2, 21, 35, 8))
    assert_all_within_budget((q * scale, k, v), lambda q, k, v: side_attention(q, k, v, impl=impl))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_in_half_precision(impl: str, dtype: torch.dtype) -> None:
    for shape in ((2, 3, 5, 7, 8), (1, 1, 37, 213, 11)):
        attend = partial(side_attention, impl=impl)
        assert_all_within_budget(inputs(shape, dtype), attend)


def test_f64_goes_to_torch() -> None:
    qkv = inputs((1, 2, 5, 7, 8), torch.float64)
    assert "runs 'torch'" in explain("side_attention", *qkv)
    grad = torch.randn(1, 2, 5, 8)
    ours = with_gradients(side_attention, qkv, grad)
    theirs = with_gradients(functional.scaled_dot_product_attention, qkv, grad)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_gradcheck() -> None:
    qkv = [x.requires_grad_() for x in inputs((1, 2, 2, 3, 4), torch.float64)]
    for impl in ("reference", "torch"):
        assert torch.autograd.gradcheck(
            lambda q, k, v, impl=impl: side_attention(q, k, v, impl=impl), qkv
        )


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_strides_threads_and_reruns_change_no_bit(impl: str) -> None:
    qkv = inputs((3, 2, 19, 37, 8))
    grad = torch.randn(3, 19, 2, 8).transpose(1, 2)
    constant = grad[:1, :1, :1, :1].expand(grad.shape)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return side_attention(q, k, v, impl=impl)

    threads = torch.get_num_threads()
    try:
        for given in (grad, constant):
            torch.set_num_threads(1)
            first = list(with_gradients(attend, tuple(x.contiguous() for x in qkv), given))
            for count in (2, 3):
                torch.set_num_threads(count)
                again = with_gradients(attend, qkv, given.clone())
                assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_what_is_not_finite_spreads_as_in_torch(impl: str, part: int, bad: float) -> None:
    qkv = inputs((2, 2, 5, 20, 8))
    qkv[part][0, 1, 3, 2] = bad
    grad = torch.randn(2, 2, 5, 8)
    ours = with_gradients(lambda q, k, v: side_attention(q, k, v, impl=impl), qkv, grad)
    for got, expected in zip(ours, with_gradients(plain, qkv, grad), strict=True):
        assert torch.equal(got[1].isfinite(), expected[1].isfinite())
        assert got[0, 0].isfinite().all() and got[1].isfinite().all()
    out = side_attention(*qkv, impl=impl)
    torch.testing.assert_close(out, plain(*qkv), equal_nan=True)


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_no_images_and_no_queries(impl: str) -> None:
    q, k, v = (x.detach().requires_grad_() for x in inputs((1, 2, 5, 7, 8)))
    assert side_attention(q[:0], k[:0], v[:0], impl=impl).shape == (0, 2, 5, 8)
    out = side_attention(q[:, :, :0], k, v, impl=impl)
    assert out.shape == (1, 2, 0, 8)
    for grad in torch.autograd.grad(out.sum(), (k, v)):
        assert not grad.any()


def test_one_graph_with_either() -> None:
    torch.compiler.reset()
    qkv = inputs((1, 2, 5, 7, 8))
    for impl in ("auto", "native" if LEVELS else "reference"):

        def attend(q: Tensor, k: Tensor, v: Tensor, impl: str = impl) -> Tensor:
            return side_attention(q * 2, k, v, impl=impl) + 1

        compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
        grad = torch.randn(1, 2, 5, 8)
        for got, expected in zip(
            with_gradients(compiled, qkv, grad), with_gradients(attend, qkv, grad), strict=True
        ):
            torch.testing.assert_close(got, expected)


def test_there_is_no_second_derivative() -> None:
    q, k, v = (x.detach().requires_grad_() for x in inputs((1, 2, 5, 7, 8)))
    out = side_attention(q, k, v, impl="reference")
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="side_attention_backward has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[0], k, v), r"q must be \[B, H, Q, D\], got shape \(2, 5, 8\)"),
        (lambda q, k, v: (q, k[:, :1], v), r"k must be \(1, 2, 7, 8\) by its own T and q's B"),
        (lambda q, k, v: (q, k, v[:, :, :6]), r"v must be \(1, 2, 7, 8\) like k"),
        (lambda q, k, v: (q, k[:, :, :0], v[:, :, :0]), "k must have T of at least 1"),
        (lambda q, k, v: (q, k, v.half()), "v must be float32, got float16"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), "q must be float16 or .*, got int32"),
    ],
)
def test_errors_say_what_came(change: Callable[..., tuple[Tensor, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        side_attention(*change(*inputs((1, 2, 5, 7, 8))))


def test_reasons_of_native() -> None:
    with implementation("native/") as impl:
        for qkv, why in (
            (inputs((1, 1, 2, 3, 17)), "it takes heads of at most 16 channels"),
            (inputs((1, 1, 2, 3, 8), torch.float64), "it has no float64 form"),
        ):
            with pytest.raises(ValueError, match=why):
                side_attention(*qkv, impl=impl)


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_what_would_be_read_out_of_bounds_is_refused(impl: str) -> None:
    q, k, v = inputs((1, 2, 5, 7, 8))
    out, softmax = torch.ops.fpt_native.side_attention(q, k, v, "")
    out = out.transpose(1, 2)
    op, back = torch.ops.fpt_native.side_attention, torch.ops.fpt_native.side_attention_backward
    for message, call, args in (
        (r"k must be \(1, 2, -1, 8\)", op, (q, k[..., :7], v)),
        (r"v must be \(1, 2, 7, 8\)", op, (q, k, v[:, :, :6])),
        ("v must be float32", op, (q, k, v.double())),
        (r"q must have D in 1..16, got 24", op, (q.repeat(1, 1, 1, 3), k, v)),
        (r"grad must be \(1, 2, 5, 8\)", back, (out[:, :, :4], q, k, v, out, softmax)),
        (r"out must be \(1, 2, 5, 8\)", back, (out, q, k, v, out[:, :, :4], softmax)),
        (r"softmax must be \(2, 1, 2, 5\)", back, (out, q, k, v, out, softmax[:1])),
        ("softmax must be contiguous", back, (out, q, k, v, out, softmax.mT.contiguous().mT)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args, "")
