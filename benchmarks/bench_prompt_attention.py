"""prompt_attention: the implementations and the plain expression, alone and with its gradient.

Features are f16 and prompts f32, as in training.  ``prompt_attention_indexed`` is measured in
``bench_prompt_attention_indexed.py``.
"""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.cases import PromptCase, cpu_implementations, prompt_case
from fpt_fast.ops import prompt_attention, reference

IMPLEMENTATIONS = ["plain", *cpu_implementations("prompt_attention")]


def attend(impl: str, q: Tensor, kv: Tensor) -> Tensor:
    """The op, or the expression that it replaces."""
    if impl == "plain":
        return reference.prompt_attention(q, kv)[0]
    return prompt_attention(q, kv, impl=impl)


def note(benchmark: BenchmarkFixture, case: PromptCase, products: float, passes: int) -> None:
    """Counted work: ``products`` in units of the forward's two, features read ``passes`` times."""
    benchmark.extra_info["case"] = case.name
    benchmark.extra_info["flops"] = int(products / 2 * case.forward_flops)
    benchmark.extra_info["bytes"] = passes * case.kv_bytes(torch.float16)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.benchmark(group="prompt_attention")
def bench_prompt_attention(benchmark: BenchmarkFixture, full: bool, impl: str) -> None:
    case = prompt_case(full)
    q, kv = case.q(torch.float32), case.kv(torch.float16)
    note(benchmark, case, products=2, passes=1)
    out = benchmark(attend, impl, q, kv)
    torch.testing.assert_close(out, reference.prompt_attention(q, kv)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.benchmark(group="prompt_attention, forward and backward")
def bench_prompt_attention_backward(benchmark: BenchmarkFixture, full: bool, impl: str) -> None:
    case = prompt_case(full)
    q, kv = case.q(torch.float32).requires_grad_(), case.kv(torch.float16)
    grad = torch.randn(case.layers, case.images, case.prompts, case.heads * case.width)
    note(benchmark, case, products=5, passes=2)

    def forward_and_backward() -> Tensor:
        (grad_q,) = torch.autograd.grad(attend(impl, q, kv), q, grad)
        return grad_q

    grad_q = benchmark(forward_and_backward)
    expected = reference.prompt_attention_backward(grad, q.detach(), kv)
    torch.testing.assert_close(grad_q, expected, rtol=1e-4, atol=1e-4)
