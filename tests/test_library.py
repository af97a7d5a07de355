"""The ops as torch.library sees them: schemas, fakes, gradients, compilation, dispatch."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, PROMPT_CASES
from fpt_fast import ops
from fpt_fast.ops import explain, implementation
from fpt_fast.ops.implementation import Implementation
from fpt_fast.ops.native_reasons import native_missing

FROZEN = FROZEN_CASES[0]
PROMPT = PROMPT_CASES[0]
NAMES = (
    "frozen_attention",
    "token_scores",
    "select_tokens",
    "quantise_kv",
    "prompt_attention",
    "prompt_attention_backward",
    "prompt_attention_indexed",
    "prompt_attention_indexed_backward",
    "side_attention",
    "side_attention_backward",
    "frozen_linear",
    "side_layers",
    "side_layers_backward",
    "trained_linear",
    "trained_linear_backward",
)


def indexed_inputs() -> tuple[Tensor, Tensor, Tensor]:
    shape = (PROMPT.layers, PROMPT.images, PROMPT.heads, 11, PROMPT.width)
    index = torch.rand(PROMPT.images, PROMPT.layers, PROMPT.heads, 11).argsort(-1)
    return torch.randn(shape), torch.randn(shape), index[..., : PROMPT.kept].int()


def layers_inputs() -> tuple[Tensor, Tensor, list[Tensor]]:
    sizes = [(8,), (8,), (24, 8), (24,), (8, 8), (8,), (8,), (8,), (5, 8), (5,), (8, 5), (8,)]
    weights = [torch.randn(size) for _ in range(2) for size in sizes]
    return torch.randn(2, 3, 8), torch.randn(2, 2, 1, 8), weights


def op_calls(impl: str) -> list[tuple[str, tuple[object, ...]]]:
    """Arguments of every op, its optional ones once given and once not."""
    q, k, v = FROZEN.qkv(torch.float32)
    scores = torch.rand(q.shape[:3])
    prompts = PROMPT.q(torch.float32)
    kv, int8 = PROMPT.kv(torch.float16), PROMPT.kv(torch.float32).to(torch.int8)
    scales = (
        torch.rand(PROMPT.images, PROMPT.layers, PROMPT.heads, PROMPT.width),
        torch.rand(PROMPT.images, PROMPT.layers, PROMPT.heads, PROMPT.kept),
    )
    rows = torch.tensor([2, 0])
    indexed = indexed_inputs()
    stored = torch.ops.fpt.prompt_attention(prompts, kv, rows, None, None, "auto")
    online = torch.ops.fpt.prompt_attention_indexed(prompts, *indexed, "auto")
    leaf = prompts.clone().requires_grad_()
    qkv = (q[..., :8].clone().requires_grad_(), k[..., :8], v[..., :8])
    rows16, weight = torch.randn(2, 5, 32).bfloat16(), torch.randn(64, 32).bfloat16()
    added, factor = torch.randn(2, 5, 64).bfloat16(), torch.randn(64).bfloat16()
    attended = torch.ops.fpt.side_attention(*(x.detach() for x in qkv), "auto")
    tokens, *layers = layers_inputs()
    rows32, learned = torch.randn(2, 5, 2, 16), torch.randn(48, 2, 16)
    learning, shared = (torch.randn(2, 5, 48), rows32.clone(), learned), torch.randn(2, 1, 2, 16)
    settings = (2, 1, 1e-12, False, impl)
    out, kept = torch.ops.fpt.side_layers(tokens, *layers, 2, 1, 1e-12, False, "auto")
    return [
        ("frozen_attention", (q, k, v, impl)),
        ("token_scores", (q, k, "global", None, impl)),
        ("token_scores", (q, k, "class_token", torch.rand(q.shape[:3]), impl)),
        ("select_tokens", (scores, k, v, FROZEN.keep, torch.float16, impl)),
        ("quantise_kv", (kv, torch.int8, impl)),
        ("frozen_linear", (rows16, weight, None, "gelu", None, None, impl)),
        ("frozen_linear", (rows16, weight, factor, "none", added, factor, impl)),
        ("prompt_attention", (leaf, kv, None, None, None, impl)),
        ("prompt_attention", (leaf, int8, rows, *scales, impl)),
        (
            "prompt_attention_backward",
            (torch.rand_like(stored[0]), prompts, kv, *stored, rows, None, None, impl),
        ),
        ("prompt_attention_indexed", (leaf, *indexed, impl)),
        (
            "prompt_attention_indexed_backward",
            (torch.rand_like(online[0]), prompts, *indexed, *online, impl),
        ),
        ("side_attention", (*qkv, impl)),
        (
            "side_attention_backward",
            (torch.rand_like(attended[0]), *(x.detach() for x in qkv), *attended, impl),
        ),
        ("side_layers", (tokens.clone().requires_grad_(), *layers, *settings)),
        (
            "side_layers_backward",
            (torch.rand_like(out), tokens, *layers, kept, *settings),
        ),
        ("trained_linear", (rows16, learned.flatten(1).requires_grad_(), None, None, impl)),
        ("trained_linear", (rows32.requires_grad_(), learned, torch.randn(48), shared, impl)),
        ("trained_linear_backward", (*learning, None, True, impl)),
        ("trained_linear_backward", (*learning, shared, False, impl)),
    ]


def public_args(name: str, args: tuple[object, ...]) -> tuple[object, ...]:
    """What the public function would get, as far as reasons look at it."""
    if not name.startswith("side_layers"):
        return args
    first = int(name.endswith("backward"))
    return *args[first : first + 3], 2


CALLS_THAT_RUN = [
    (call, impl)
    for call, (name, _) in enumerate(op_calls("auto"))
    for impl in implementation.implementations(name)
    if not implementation.unsupported_reasons(
        name, impl, *public_args(name, op_calls(impl)[call][1])
    )
]


@pytest.mark.parametrize(("call", "impl"), CALLS_THAT_RUN)
def test_opcheck(call: int, impl: str) -> None:
    name, args = op_calls(impl)[call]
    torch.library.opcheck(getattr(torch.ops.fpt, name).default, args)


def test_opcheck_covers_every_op() -> None:
    assert {name for name, _ in op_calls("auto")} == set(NAMES) == set(implementation.ops())


def attend(q: Tensor, kv: Tensor, rows: Tensor | None, impl: str = "auto") -> Tensor:
    """Op between ordinary operations, so that a compiler has something to fuse around it."""
    return (ops.prompt_attention(q * 2, kv, rows, impl=impl) + 1).square().mean()


def attend_indexed(q: Tensor, k: Tensor, v: Tensor, index: Tensor, impl: str = "auto") -> Tensor:
    return (ops.prompt_attention_indexed(q * 2, k, v, index, impl=impl) + 1).square().mean()


def score_and_select(
    q: Tensor, k: Tensor, v: Tensor, keep: int, impl: str = "auto"
) -> tuple[Tensor, ...]:
    out, lse = ops.frozen_attention(q * 2, k, v, impl=impl)
    scores = ops.token_scores(q * 2, k, lse=lse, impl=impl)
    kv, index = ops.select_tokens(scores * 3, k, v, keep, dtype=torch.float16, impl=impl)
    kv8, k_scales, v_scales = ops.quantise_kv(kv.unsqueeze(1), impl=impl)
    return kv + out.transpose(1, 2).flatten(2).mean(), index, kv8, k_scales * 2, v_scales


def assert_same_with_gradient(
    compiled: Callable[..., Tensor], eager: Callable[..., Tensor], q: Tensor, *rest: object
) -> None:
    results = []
    for function in (compiled, eager):
        leaf = q.clone().requires_grad_()
        loss = function(leaf, *rest)
        loss.backward()
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_training_ops_compile_as_one_graph(dynamic: bool, impl: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for images in (3, 2):
        kv = PROMPT.kv(torch.float16)[:images]
        for rows in (None, torch.tensor([1, 0, 1, 1])):
            assert_same_with_gradient(compiled, attend, PROMPT.q(torch.float32), kv, rows, impl)
    indexed = torch.compile(attend_indexed, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    inputs = (PROMPT.q(torch.float32), *indexed_inputs(), impl)
    assert_same_with_gradient(indexed, attend_indexed, *inputs)


@pytest.mark.parametrize("impl", ["auto", "triton"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_preloading_ops_compile_as_one_graph(dynamic: bool, impl: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(score_and_select, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens, keep in ((37, 7), (20, 5)):
        q, k, v = (x[:, :, :tokens] for x in FROZEN.qkv(torch.float32))
        expected = score_and_select(q, k, v, keep, impl)
        torch.testing.assert_close(compiled(q, k, v, keep, impl), expected)


@pytest.mark.slow
def test_inductor_compiles_forward_and_backward() -> None:
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True)
    rows = torch.tensor([2, 2, 0])
    assert_same_with_gradient(
        compiled, attend, PROMPT.q(torch.float32), PROMPT.kv(torch.float16), rows
    )


def test_values_are_checked_in_compiled_code_too() -> None:
    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"rows must be in 0\.\.2"):
        compiled(PROMPT.q(torch.float32), PROMPT.kv(torch.float16), torch.tensor([0, 3]))


def test_there_is_no_second_derivative_and_none_of_the_frozen_ops() -> None:
    q = PROMPT.q(torch.float32).requires_grad_()
    out = ops.prompt_attention(q, PROMPT.kv(torch.float16))
    (grad,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="prompt_attention_backward has no derivative"):
        grad.sum().backward()
    x = torch.zeros(1, 1, 3, 8, requires_grad=True)
    scores = torch.ops.fpt.token_scores(x, x, "global", None, "auto")
    with pytest.raises(RuntimeError, match="token_scores has no derivative"):
        scores.sum().backward()
    out, _ = torch.ops.fpt.frozen_attention(x, x, x, "auto")
    with pytest.raises(RuntimeError, match="frozen_attention has no derivative"):
        out.sum().backward()


def test_explain_names_the_choice_and_every_reason() -> None:
    q = torch.zeros(1, 1, 3, 8)
    missing = native_missing()
    best = "cpu" if missing else "native"
    assert explain("token_scores", q, q).splitlines() == [
        f"token_scores: impl='auto' runs '{best}'",
        f"  native: {missing}" if missing else "  cpu: can run, but 'native' is preferred",
        f"  blocked: can run, but '{best}' is preferred",
        f"  reference: can run, but '{best}' is preferred",
        f"  triton: can run, but '{best}' is preferred",
    ]
    elsewhere = q.to("meta")
    assert explain("token_scores", elsewhere, elsewhere).splitlines() == [
        "token_scores: impl='auto' runs 'blocked'",
        f"  native: {missing or 'it runs on cpu tensors, got tensors on meta'}",
        "  cpu: it runs on cpu tensors, got tensors on meta",
        "  reference: can run, but 'blocked' is preferred",
        "  triton: it runs on cuda tensors, got tensors on meta",
    ]
    with pytest.raises(ValueError, match=r"op must be one of frozen_attention, .*, got 'softmax'"):
        explain("softmax", q)


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Registers an implementation of token_scores that auto prefers, for one test."""

    def register(reasons: list[str]) -> None:
        mine = Implementation("token_scores", "picky", __name__, "unused", lambda args: reasons)
        others: dict[str, Any] = implementation._registry["token_scores"]
        monkeypatch.setitem(implementation._registry, "token_scores", {"picky": mine, **others})

    return register


def test_auto_falls_back_and_an_explicit_choice_says_why_not(picky: Callable[..., None]) -> None:
    picky(["D must be a power of two, got 10", "it needs compute capability 8.0"])
    q, k, _ = FROZEN.qkv(torch.float32)
    ops.token_scores(q, k)
    best = "cpu" if native_missing() else "native"
    assert implementation.resolve("token_scores", "auto", (q, k)).name == best
    assert "  picky: D must be a power of two, got 10; it needs" in explain("token_scores", q, k)
    assert len(implementation.unsupported_reasons("token_scores", "picky", q, k)) == 2
    with pytest.raises(
        ValueError, match="impl='picky' cannot run token_scores here: D must be a power of two"
    ):
        ops.token_scores(q, k, impl="picky")


def test_no_implementation_at_all_lists_every_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    only = Implementation("token_scores", "picky", __name__, "unused", lambda args: ["too tired"])
    monkeypatch.setitem(implementation._registry, "token_scores", {"picky": only})
    q, k, _ = FROZEN.qkv(torch.float32)
    with pytest.raises(ValueError, match=r"(?s)no implementation can run.*picky: too tired"):
        ops.token_scores(q, k)


def test_an_implementation_is_registered_once() -> None:
    again = Implementation("token_scores", "cpu", __name__, "unused", implementation.anywhere)
    with pytest.raises(ValueError, match="token_scores already has an implementation cpu"):
        implementation.register(again)


FRESH = f"""
import sys
sys.modules["triton"] = None  # importing it raises ImportError
import torch, fpt_fast.ops
for name in {NAMES}:
    assert getattr(torch.ops.fpt, name).default._schema.name == "fpt::" + name
assert not [m for m in sys.modules if m.startswith("fptkernels")]
assert "fpt_fast.ops.reference_ops" not in sys.modules, "implementations are imported lazily"
q = torch.randn(1, 1, 3, 8)
fpt_fast.ops.token_scores(q, q, impl="reference")
assert "fpt_fast.ops.reference_ops" in sys.modules
"""


def test_registering_needs_no_triton_and_imports_no_implementation() -> None:
    done = subprocess.run([sys.executable, "-c", FRESH], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
