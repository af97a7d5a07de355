"""The fusion module against its formula, in fp64, and its checks."""

import copy

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.fusion import PromptFusion, dropout_factors
from fpt_fast.ops import dequantise_kv, quantise_kv
from fpt_fast.ops.implementation import implementations
from helpers import assert_within_budget

LAYERS, HEADS, WIDTH, SIDE, PROMPTS, KEPT, BATCH = 3, 4, 24, 8, 5, 7, 2


def fusion(method: str, dropout: float = 0.0) -> PromptFusion:
    plus = method == "fpt_plus"
    module = PromptFusion(
        num_layers=LAYERS,
        frozen_width=WIDTH,
        side_width=SIDE,
        num_heads=HEADS,
        num_prompts=PROMPTS,
        prompt_dim=WIDTH if plus else SIDE,
        prompt_norm=plus,
        prompt_proj=not plus,
        dropout=dropout,
    )
    # Prompts near zero would hide a forgotten addition.
    torch.nn.init.normal_(module.prompts)
    return module


def features(images: int = BATCH) -> Tensor:
    return torch.randn(images, LAYERS, 2, HEADS, KEPT, WIDTH // HEADS)


def formula(module: PromptFusion, kv: Tensor, method: str) -> Tensor:
    """DESIGN.md section 2.5, image by image, layer by layer, head by head."""
    states = torch.empty(LAYERS, len(kv), PROMPTS, SIDE, dtype=kv.dtype)
    head = WIDTH // HEADS
    for layer in range(LAYERS):
        prompts = module.prompts[layer, 0]
        if method == "fpt_plus":
            norm = module.layer_norm
            q = functional.layer_norm(prompts, (WIDTH,), norm.weight, norm.bias, norm.eps)
        else:
            q = prompts @ module.prompt_proj.weight.T + module.prompt_proj.bias
        for image in range(len(kv)):
            heads = []
            for h in range(HEADS):
                k, v = kv[image, layer, 0, h], kv[image, layer, 1, h]
                scores = q[:, h * head : (h + 1) * head] @ k.T / head**0.5
                heads.append(scores.softmax(-1) @ v)
            out = torch.cat(heads, dim=-1)
            if method == "fpt_plus":
                out = module.out_proj(out + prompts)
            else:
                out = module.out_proj(out) + prompts
            states[layer, image] = out
    return states


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_formula_and_gradients(method: str) -> None:
    module = fusion(method).double()
    kv = features().double()
    out, expected = module(kv), formula(module, kv, method)
    assert out.shape == (LAYERS, BATCH, PROMPTS, SIDE)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(out)
    parameters = list(module.parameters())
    got = torch.autograd.grad((out * weight).sum(), parameters)
    wanted = torch.autograd.grad((expected * weight).sum(), parameters)
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_rows_pick_images(method: str) -> None:
    module = fusion(method)
    kv = features(images=4)
    rows = torch.tensor([2, 0, 2])
    torch.testing.assert_close(module(kv, rows), module(kv[rows]), rtol=1e-6, atol=1e-6)


def test_half_precision_features_keep_the_module_in_f32() -> None:
    module = fusion("fpt_plus")
    kv = features().half()
    out = module(kv)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, module(kv.float()), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("impl", implementations("prompt_attention"))
def test_8_bit_features_and_the_choice_of_implementation(impl: str, dtype: torch.dtype) -> None:
    module = fusion("fpt_plus")
    kv8, *scales = quantise_kv(features(images=4), dtype)
    rows = torch.tensor([2, 0, 2])
    # The C++ extension has no fp8 form: auto gives that to another.
    module.impl = "auto" if impl == "native" and dtype != torch.int8 else impl
    out = module(kv8, rows, (scales[0], scales[1]))
    module.impl = "reference"
    wide = module(dequantise_kv(kv8, scales[0], scales[1]), rows)
    torch.testing.assert_close(out, wide, rtol=1e-4, atol=1e-5)
    module.impl = "flash"
    with pytest.raises(ValueError, match="impl must be 'auto' or one of"):
        module(kv8, rows, (scales[0], scales[1]))


def test_queries_do_not_grow_with_the_batch() -> None:
    assert fusion("fpt").queries().shape == (LAYERS, HEADS, PROMPTS, WIDTH // HEADS)


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_queries_are_bf16_under_a_cpus_autocast_to_it(method: str) -> None:
    module = fusion(method)
    for dtype, expected in ((torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)):
        with torch.autocast("cpu", dtype):
            assert module.queries().dtype == expected
    assert module.queries().dtype == torch.float32


def narrow_results(module: PromptFusion, attended: Tensor, grad: Tensor) -> list[Tensor]:
    """States under a CPU's autocast to bf16, and their gradients, in f64."""
    leaves = [attended.clone().requires_grad_(), module.prompts, *module.out_proj.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        states = module.project(leaves[0])
    return [states.detach().double(), *torch.autograd.grad(states, leaves, grad.to(states.dtype))]


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
def test_products_in_bf16_are_within_the_budget_of_torchs(method: str) -> None:
    """A hook sends the projection to torch: the same module, by other hands."""
    plus = method == "fpt_plus"
    module = PromptFusion(LAYERS, 64, 32, HEADS, 16, None if plus else 32, plus, not plus, 0.0)
    torch.nn.init.normal_(module.prompts)
    attended, grad = torch.randn(LAYERS, 9, 16, 64).bfloat16(), torch.randn(LAYERS, 9, 16, 32)
    ours = narrow_results(module, attended, grad)
    seen: list[object] = []
    module.out_proj.register_forward_hook(lambda *args: seen.append(args))
    plain = narrow_results(module, attended, grad)
    assert len(seen) == 1
    wide = copy.deepcopy(module).double()
    leaves = [attended.double().requires_grad_(), wide.prompts, *wide.out_proj.parameters()]
    states = wide.project(leaves[0])
    oracle = [states.detach(), *torch.autograd.grad(states, leaves, grad.double())]
    for number, results in enumerate(zip(ours, oracle, plain, strict=True)):
        assert_within_budget(*results, factor=3.0 if number else 2.0)


def test_a_module_in_bf16_is_torchs_own() -> None:
    module = fusion("fpt_plus").bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert module(features().bfloat16()).dtype == torch.bfloat16


def test_published_start() -> None:
    module = PromptFusion(LAYERS, WIDTH, SIDE, HEADS, 200)
    assert module.prompts.shape == (LAYERS, 1, 200, WIDTH)
    assert float(module.prompts.detach().std()) == pytest.approx(1e-6, rel=0.05)
    assert module.dropout.p == 0.5


def test_dropout_only_while_training() -> None:
    module = fusion("fpt_plus", dropout=0.5)
    kv = features()
    dropped = module(kv)
    share = float((dropped == 0).float().mean())
    assert 0.25 < share < 0.75
    module.eval()
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], 2 * module(kv)[kept], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rate", [0.5, 0.25, 1 / 256, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_factors_are_fair_and_independent(rate: float, dtype: torch.dtype) -> None:
    """The share that is dropped, at every place of a word of eight bytes, and pairs of neighbours:
    each within five standard deviations (of pairs, which overlap, thrice the variance)."""
    count = 1 << 17
    factors = dropout_factors(torch.empty(8, count // 8, 8, dtype=dtype), rate)
    assert factors.dtype == dtype
    kept = torch.tensor(1.0, dtype=dtype).div(1 - rate)
    assert set(factors.unique().tolist()) == {0.0, float(kept)}
    dropped = (factors == 0).double()
    for share, size, expected in (
        (dropped.mean(), count * 8, rate),
        *((dropped[..., place].mean(), count, rate) for place in range(8)),
        ((dropped[..., 1:] * dropped[..., :-1]).mean(), count * 7, rate**2),
        ((dropped[:, 1:] * dropped[:, :-1]).mean(), count * 7, rate**2),
    ):
        assert abs(float(share) - expected) < 5 * (expected * (1 - expected) / size * 3) ** 0.5


def test_dropout_is_drawn_from_the_generator() -> None:
    """One seed, one draw, whatever generator has it; the next draw is another."""
    like = torch.empty(3, 5, 7)
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append([dropout_factors(like, 0.5), dropout_factors(like, 0.5)])
    generator = torch.Generator().manual_seed(3)
    draws.append([dropout_factors(like, 0.5, generator) for _ in range(2)])
    for first, second in draws:
        assert torch.equal(first, draws[0][0]) and torch.equal(second, draws[0][1])
        assert not torch.equal(first, second)


def test_dropout_of_all_and_of_none() -> None:
    kv = features()
    for rate in (0.0, 1.0):
        module = fusion("fpt_plus", dropout=rate)
        out, kept = module(kv), module.eval()(kv)
        assert torch.equal(out, torch.zeros_like(out) if rate else kept)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, "num_heads must divide"),
        ({"prompt_dim": SIDE}, "prompt_proj must be True"),
        ({"num_prompts": 0}, "num_prompts must be at least 1"),
        ({"num_layers": 0}, "num_layers must be at least 1"),
    ],
)
def test_widths_that_do_not_fit(changes: dict[str, int], message: str) -> None:
    widths = {
        "num_layers": LAYERS,
        "frozen_width": WIDTH,
        "side_width": SIDE,
        "num_heads": HEADS,
        "num_prompts": PROMPTS,
    }
    with pytest.raises(ValueError, match=message):
        PromptFusion(**{**widths, **changes})


@pytest.mark.parametrize(
    "shape",
    [
        (BATCH, LAYERS + 1, 2, HEADS, KEPT, WIDTH // HEADS),
        (BATCH, LAYERS, 2, HEADS + 1, KEPT, WIDTH // HEADS),
        (BATCH, LAYERS, 2, HEADS, KEPT, WIDTH),
        (LAYERS, 2, HEADS, KEPT, WIDTH // HEADS),
    ],
)
def test_features_of_another_model_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="kv must be"):
        fusion("fpt")(torch.zeros(shape))
