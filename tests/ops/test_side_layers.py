"""side_layers: output and every gradient against the oracle, at every level of native."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from fpt_fast.ops import SideWeights, explain, reference, side_layers
from helpers import assert_within_budget, implementation, implementations_here

# What is torch's own is the same bits as torch's, and no more: see below.
IMPLEMENTATIONS = [impl for impl in implementations_here("side_layers") if impl != "torch"]
LEVELS = [impl for impl in IMPLEMENTATIONS if impl.startswith("native/")]
# B, T, P, queries, S, heads, MLP width
SHAPES = (
    (1, 1, 0, 1, 1, 1, 1),
    (2, 5, 3, 5, 12, 3, 20),
    (3, 17, 4, 1, 48, 6, 96),
    (5, 65, 16, 65, 96, 12, 384),
    (2, 33, 2, 7, 40, 4, 50),
    (1, 197, 16, 197, 64, 4, 130),
    (2, 20, 3, 19, 32, 2, 40),
    (3, 3, 2, 3, 24, 3, 40),
    (2, 18, 0, 18, 16, 2, 40),
)
Block = Callable[[Tensor, Tensor, SideWeights], Tensor]
Inputs = tuple[Tensor, Tensor, SideWeights]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Values in f64 that ``dtype`` holds exactly."""
    batch, count, prompts, _, width, _, hidden = shape
    generator = torch.Generator().manual_seed(seed)

    def random(*sizes: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(sizes, generator=generator, dtype=torch.float64) * scale
        return drawn.to(dtype).double()

    weights = SideWeights(
        1 + random(width, scale=0.3),
        random(width, scale=0.3),
        random(3 * width, width, scale=1.5 * width**-0.5),
        random(3 * width, scale=0.3),
        random(width, width, scale=width**-0.5),
        random(width, scale=0.3),
        1 + random(width, scale=0.3),
        random(width, scale=0.3),
        random(hidden, width, scale=width**-0.5),
        random(hidden, scale=0.3),
        random(width, hidden, scale=hidden**-0.5),
        random(width, scale=0.3),
    )
    return random(batch, count, width), random(batch, prompts, width), weights


def to(given: Inputs, dtype: torch.dtype) -> Inputs:
    return given[0].to(dtype), given[1].to(dtype), SideWeights(*(w.to(dtype) for w in given[2]))


def leaves_of(given: Inputs) -> Inputs:
    tokens, prompts, *weights = (x.clone().requires_grad_() for x in (*given[:2], *given[2]))
    return tokens, prompts, SideWeights(*weights)


def with_gradients(block: Block, given: Inputs, grad: Tensor) -> Iterator[Tensor]:
    leaves = leaves_of(given)
    out = block(*leaves)
    yield out.detach()
    flat = (*leaves[:2], *leaves[2])
    yield from torch.autograd.grad(out, flat, grad.to(out.dtype))


def block_of(shape: tuple[int, ...], impl: str, products: str = "float32") -> Block:
    *_, queries, _, heads, _ = shape

    def block(tokens: Tensor, prompts: Tensor | None, weights: SideWeights) -> Tensor:
        """One layer."""
        states = None if prompts is None else prompts.unsqueeze(0)
        return side_layers(
            tokens, states, [weights], heads=heads, queries=queries, products=products, impl=impl
        )

    return block


def plain_of(shape: tuple[int, ...]) -> Block:
    *_, queries, _, heads, _ = shape

    def plain(tokens: Tensor, prompts: Tensor, weights: SideWeights) -> Tensor:
        return reference.side_layers(tokens, prompts.unsqueeze(0), weights, heads, queries, 1e-12)

    return plain


def grad_of(shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    size = (shape[0], shape[3], shape[4])
    return torch.randn(size, generator=generator, dtype=torch.float64).float().double()


def assert_all_within_budget(shape: tuple[int, ...], given: Inputs, block: Block) -> None:
    grad = grad_of(shape)
    oracle = with_gradients(plain_of(shape), given, grad)
    eager = with_gradients(plain_of(shape), to(given, torch.float32), grad)
    ours = with_gradients(block, to(given, torch.float32), grad)
    names = ("out", "tokens", "prompts", *SideWeights._fields)
    for name, got, exact, rounded in zip(names, ours, oracle, eager, strict=True):
        assert got.dtype == torch.float32 and got.shape == exact.shape
        if exact.numel():
            try:
                assert_within_budget(got, exact, rounded, factor=2.0 if name == "out" else 3.0)
            except AssertionError as error:
                raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget(impl: str, shape: tuple[int, ...]) -> None:
    assert_all_within_budget(shape, inputs(shape, torch.float32), block_of(shape, impl))


@pytest.mark.parametrize("scale", [1e-3, 2.0, 5.0])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_budget_of_faint_and_of_strong_weights(impl: str, scale: float) -> None:
    # A budget is of the largest error: of many images, or it is a matter of luck.
    shape = (40, 33, 3, 33, 24, 3, 40)
    tokens, prompts, weights = inputs(shape, torch.float32)
    factors = {"qkv": scale, "fc1": scale}
    scaled = {name: getattr(weights, name) * factor for name, factor in factors.items()}
    given = (
        tokens,
        prompts,
        SideWeights(*(w.float().double() for w in weights._replace(**scaled))),
    )
    assert_all_within_budget(shape, given, block_of(shape, impl))


FAR = (-1e18, -1e4, -20.0, -13.6, -13.4, -6.0, 0.0, 6.0, 20.0, 1e5)
NEAR = (-5.0, -4.26, -4.24, -3.0, -1.5, -0.7, -0.01, 0.4, 2.0, 4.3)


@pytest.mark.parametrize("values", [FAR, NEAR], ids=["far", "near"])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_gelu(impl: str, products: str, values: tuple[float, ...]) -> None:
    """Biases alone are what GELU sees, and each has a place of its own in the output."""
    at = torch.tensor(values)
    shape = (2, 3, 1, 3, 10, 2, 10)
    tokens, prompts, weights = inputs(shape, torch.float32)
    weights = weights._replace(
        fc1=0 * weights.fc1, fc1_bias=at.double(), fc2=torch.eye(10).double()
    )
    given, grad = (tokens, prompts, weights), grad_of(shape)
    block = block_of(shape, impl, products)
    oracle = with_gradients(plain_of(shape), given, grad)
    with torch.autocast("cpu", torch.bfloat16, enabled=products == "bfloat16"):
        eager = list(with_gradients(plain_of(shape), to(given, torch.float32), grad))
    ours = with_gradients(block, to(given, torch.float32), grad)
    names = ("out", "tokens", "prompts", *SideWeights._fields)
    for name, *results in zip(names, ours, oracle, eager, strict=True):
        if name in ("out", "fc1_bias"):
            assert_within_budget(*results, factor=2.0)
            # The budget is that of the largest value.
            assert float((results[0] - results[1]).abs().median()) < 2e-2


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_gelu_of_the_lowest_numbers_is_zero(impl: str, products: str) -> None:
    """There torch's slope is NaN; the value is 0 as ever."""
    far = torch.tensor(FAR)
    far[:2] = -3e38
    shape = (2, 3, 1, 3, 10, 2, 10)
    tokens, prompts, weights = to(inputs(shape), torch.float32)
    block = block_of(shape, impl, products)
    weights = weights._replace(fc1=0 * weights.fc1, fc1_bias=far, fc2=torch.eye(10))
    whole = block(tokens, prompts, weights)
    rest = block(tokens, prompts, weights._replace(fc2=0 * weights.fc2))
    assert torch.equal(whole[..., :4], rest[..., :4])


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_products_in_bf16_are_within_the_budget_of_autocast(impl: str) -> None:
    for shape in SHAPES[1:]:
        given = inputs(shape, torch.float32)
        grad = grad_of(shape)
        ours = with_gradients(block_of(shape, impl, "bfloat16"), to(given, torch.float32), grad)
        oracle = with_gradients(plain_of(shape), given, grad)

        def cast(*given: Inputs, shape: tuple[int, ...] = shape) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return block_of(shape, "torch")(*given)

        eager = with_gradients(cast, to(given, torch.float32), grad)
        for i, (got, exact, rounded) in enumerate(zip(ours, oracle, eager, strict=True)):
            if exact.numel():
                assert_within_budget(got, exact, rounded, factor=3.0 if i else 2.0)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_strides_threads_and_reruns_change_no_bit(impl: str, products: str) -> None:
    shape = (21, 29, 3, 29, 24, 3, 40)
    tokens, prompts, weights = to(inputs(shape), torch.float32)
    grad = grad_of(shape)
    strided = (tokens.mT.contiguous().mT, prompts.mT.contiguous().mT, weights)
    block = block_of(shape, impl, products)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        first = list(with_gradients(block, (tokens, prompts, weights), grad))
        for count in (2, 3):
            torch.set_num_threads(count)
            again = with_gradients(block, strided, grad.mT.contiguous().mT)
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_an_image_does_not_depend_on_the_others(impl: str, products: str) -> None:
    shape = (7, 29, 3, 29, 24, 3, 40)
    tokens, prompts, weights = to(inputs(shape), torch.float32)
    block = block_of(shape, impl, products)
    whole = block(tokens, prompts, weights)
    assert torch.equal(block(tokens[3:5], prompts[3:5], weights), whole[3:5])
    assert block(tokens[:0], prompts[:0], weights).shape == (0, 29, 24)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_what_is_not_finite_stays_in_its_image(impl: str, products: str, bad: float) -> None:
    shape = (4, 9, 3, 9, 24, 3, 40)
    for part in (0, 1):
        given = to(inputs(shape), torch.float32)
        given[part][1, 2, 5] = bad
        block = block_of(shape, impl, products)
        ours = list(with_gradients(block, given, grad_of(shape)))
        plain = with_gradients(block_of(shape, "torch"), given, grad_of(shape))
        for got, expected in zip(ours, plain, strict=True):
            assert torch.equal(got.isfinite(), expected.isfinite())


@pytest.mark.parametrize("states", [True, False], ids=["states", "alone"])
@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_several_layers_are_one_after_the_other(impl: str, states: bool) -> None:
    """All tokens of every layer but the last, of which one is asked for."""
    shape, count = (20, 9, 3, 9, 24, 3, 40), 3
    layers = [inputs(shape, torch.float32, seed) for seed in range(count)]
    prompts = torch.stack([given[1] for given in layers]) if states else None
    grad = grad_of((20, 9, 3, 1, 24, 3, 40))

    def results(stack: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [layers[0][0], *([] if prompts is None else [prompts])]
        leaves += [weight for given in layers for weight in given[2]]
        leaves = [leaf.to(dtype).requires_grad_() for leaf in leaves]
        weights = leaves[-12 * count :]
        split = [SideWeights(*weights[12 * i : 12 * i + 12]) for i in range(count)]
        out = stack(leaves[0], leaves[1] if states else None, split)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(dtype))]

    def plain(tokens: Tensor, prompts: Tensor | None, split: list[SideWeights]) -> Tensor:
        none = tokens.new_empty((count, len(tokens), 0, tokens.shape[2]))
        weights = [weight for layer in split for weight in layer]
        own = none if prompts is None else prompts
        return reference.side_layers(tokens, own, weights, 3, 1, 1e-12)

    def ours(tokens: Tensor, prompts: Tensor | None, split: list[SideWeights]) -> Tensor:
        return side_layers(tokens, prompts, split, heads=3, queries=1, impl=impl)

    def one_by_one(tokens: Tensor, prompts: Tensor | None, split: list[SideWeights]) -> Tensor:
        for i, weights in enumerate(split):
            own = None if prompts is None else prompts[i : i + 1]
            queries = 1 if i + 1 == count else 9
            tokens = side_layers(tokens, own, [weights], heads=3, queries=queries, impl=impl)
        return tokens

    got, oracle = results(ours, torch.float32), results(plain, torch.float64)
    for i, (x, exact, rounded) in enumerate(
        zip(got, oracle, results(plain, torch.float32), strict=True)
    ):
        assert_within_budget(x, exact, rounded, factor=3.0 if i else 2.0)
    assert all(map(torch.equal, got, results(one_by_one, torch.float32)))


def test_prompts_may_be_missing() -> None:
    shape = (2, 5, 0, 5, 12, 3, 20)
    tokens, prompts, weights = to(inputs(shape), torch.float32)
    for impl in ("auto", "torch", "reference"):
        block = block_of(shape, impl)
        assert torch.equal(block(tokens, None, weights), block(tokens, prompts, weights))


def test_gradcheck() -> None:
    shape = (2, 3, 2, 2, 6, 2, 5)
    tokens, prompts, weights = leaves_of(inputs(shape))
    for impl in ("reference", "torch"):
        block = block_of(shape, impl)
        assert torch.autograd.gradcheck(
            lambda *x, block=block: block(x[0], x[1], SideWeights(*x[2:])),
            (tokens, prompts, *weights),
        )


def test_f64_goes_to_torch_and_half_precision_comes_back() -> None:
    shape = (2, 5, 3, 5, 12, 3, 20)
    given = inputs(shape)
    assert "runs 'torch'" in explain("side_layers", given[0], given[1].unsqueeze(0), [given[2]], 3)
    assert torch.equal(block_of(shape, "auto")(*given), block_of(shape, "torch")(*given))
    for dtype in (torch.float16, torch.bfloat16):
        for got in with_gradients(block_of(shape, "auto"), to(given, dtype), grad_of(shape)):
            assert got.dtype == dtype and bool(got.isfinite().all())


def test_one_graph_with_either() -> None:
    torch.compiler.reset()
    shape = (2, 5, 3, 5, 12, 3, 20)
    given = to(inputs(shape), torch.float32)
    for impl in ("auto", "native" if LEVELS else "reference"):

        def block(*given: Inputs, impl: str = impl) -> Tensor:
            return block_of(shape, impl)(given[0] * 2, *given[1:]) + 1

        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for got, expected in zip(
            with_gradients(compiled, given, grad_of(shape)),
            with_gradients(block, given, grad_of(shape)),
            strict=True,
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_there_is_no_second_derivative() -> None:
    shape = (2, 5, 3, 5, 12, 3, 20)
    tokens, prompts, weights = leaves_of(to(inputs(shape), torch.float32))
    out = block_of(shape, "reference")(tokens, prompts, weights)
    (grad,) = torch.autograd.grad(out.sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="side_layers_backward has no derivative"):
        grad.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, p, w: (t[0], p, w), r"tokens must be \[B, T, S\], got shape \(5, 12\)"),
        (
            lambda t, p, w: (t, p[:1], w),
            r"states must be \(1, 2, 3, 12\) by its own P, the layers, and tokens' B, S, got "
            r"\(1, 1, 3, 12\)",
        ),
        (lambda t, p, w: (t, p.int(), w), "states must be float16 or .*, got int32"),
        (
            lambda t, p, w: (t, p, w._replace(fc2=w.fc2[:, :7])),
            r"layers\[0\]\.fc2 must be \(12, 20\) by tokens' S and the first layer's fc1, got "
            r"\(12, 7\)",
        ),
        (
            lambda t, p, w: (t, p, w._replace(proj=w.proj.half())),
            r"layers\[0\].proj must be float32, got float16",
        ),
    ],
)
def test_errors_say_what_came(change: Callable[..., Inputs], message: str) -> None:
    shape = (2, 5, 3, 5, 12, 3, 20)
    with pytest.raises(ValueError, match=message):
        block_of(shape, "auto")(*change(*to(inputs(shape), torch.float32)))


def test_settings_that_do_not_fit() -> None:
    tokens, prompts, weights = to(inputs((2, 5, 3, 5, 12, 3, 20)), torch.float32)
    for settings, message in (
        ({"heads": 5}, "heads must divide tokens' S, 12, got 5"),
        ({"heads": 3, "queries": 6}, r"queries must be in 1\.\.5 \(T\), got 6"),
        ({"heads": 3, "products": "int8"}, "products must be one of float32, bfloat16, got 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            side_layers(tokens, prompts.unsqueeze(0), [weights], **settings)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="layers must hold .* at least one layer, got none"):
        side_layers(tokens, prompts[None, :0], [], heads=3)
    with pytest.raises(ValueError, match=r"states must be \(2, 2, 3, 12\) .*, got \(1, 2, 3, 12\)"):
        side_layers(tokens, prompts.unsqueeze(0), [weights] * 2, heads=3)
    other = weights._replace(fc1_bias=weights.fc1_bias[:7])
    with pytest.raises(ValueError, match=r"layers\[1\].fc1_bias must be \(20,\) .*, got \(7,\)"):
        side_layers(tokens, None, [weights, other], heads=3)


def test_reasons_of_native() -> None:
    with implementation("native/") as impl:
        shape = (1, 2, 1, 2, 34, 2, 5)
        for dtype, why in (
            (torch.float32, "it takes heads of at most 16 channels"),
            (torch.float64, "it has no float64 form"),
        ):
            with pytest.raises(ValueError, match=why):
                block_of(shape, impl)(*to(inputs(shape), dtype))


@pytest.mark.parametrize("impl", LEVELS, indirect=True)
def test_what_would_be_read_out_of_bounds_is_refused(impl: str) -> None:
    tokens, prompts, weights = to(inputs((2, 5, 3, 5, 12, 3, 20)), torch.float32)
    op, back = torch.ops.fpt_native.side_layers, torch.ops.fpt_native.side_layers_backward
    states = prompts.unsqueeze(0)
    given = (tokens, states, list(weights))
    out, kept = op(*given, 3, 5, 1e-12, False, "")
    cut = [*weights[:2], weights.qkv[:35], *weights[3:]]
    two = (tokens, states.expand(2, -1, -1, -1).contiguous(), list(weights) * 2)
    _, kept_of_two = op(*two, 3, 5, 1e-12, False, "")
    shorter = [*kept_of_two[:2], kept_of_two[2][:, :4].contiguous(), *kept_of_two[3:]]
    for message, call, args in (
        (r"states must be \(-1, 2, -1, 12\)", op, (tokens, states[:, :1], list(weights), 3, 5)),
        ("weights must be 12 for each of .* got 11 for 1", op, (tokens, states, cut[1:], 3, 5)),
        ("weights must be 12 for each of .* got 0 for 0", op, (tokens, states[:0], [], 3, 5)),
        (r"qkv must be \(36, 12\)", op, (tokens, states, cut, 3, 5)),
        ("tokens must be contiguous", op, (tokens.mT.contiguous().mT, *given[1:], 3, 5)),
        ("heads must divide the width 12", op, (*given, 5, 5)),
        (r"queries must be in 1..5, got 6", op, (*given, 3, 6)),
        (r"grad must be \(2, 5, 12\)", back, (out[:, :4], *given, kept, 3, 5)),
        ("kept must hold 2 tensors, got 1", back, (out, *given, kept[:1], 3, 5)),
        (
            r"softmax must be \(2, 2, 3, 5\)",
            back,
            (out, *given, [kept[0], kept[1][:1]], 3, 5),
        ),
        (r"a layer's input must be \(2, 5, 12\)", back, (out, *two, shorter, 3, 5)),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(*args, 1e-12, False, "")
