"""Inputs of prompt_attention, and the judgement of its output and gradient by the error budget."""

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import PromptCase
from fpt_fast.ops.reference import Scales
from helpers import assert_within_budget


def oracle_with_gradient(
    q: Tensor, grad: Tensor, forward: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Output and gradient to q in fp64, the gradient by autograd of the oracle's forward."""
    wide = q.detach().double().requires_grad_()
    out, _ = forward(wide)
    out.backward(grad.double())
    assert wide.grad is not None
    return out.detach(), wide.grad


def assert_both_within_budget(
    q: Tensor,
    attend: Callable[[Tensor], Tensor],
    forward: Callable[[Tensor], tuple[Tensor, Tensor]],
) -> None:
    """``attend`` is the op, ``forward`` its oracle, both as functions of q alone."""
    leaf = q.detach().clone().requires_grad_()
    out = attend(leaf)
    grad = torch.randn(out.shape, dtype=torch.float64).to(q.dtype)
    out.backward(grad)
    assert out.dtype == q.dtype and out.is_contiguous()
    assert leaf.grad is not None and leaf.grad.dtype == q.dtype
    oracle, oracle_grad = oracle_with_gradient(q, grad, forward)
    eager_q = q.detach().clone().requires_grad_()
    eager, _ = forward(eager_q)
    eager.backward(grad)
    assert eager_q.grad is not None
    assert_within_budget(out.detach(), oracle, eager.detach())
    assert_within_budget(leaf.grad, oracle_grad, eager_q.grad, factor=3.0)


def eight_bit(case: PromptCase, dtype: torch.dtype) -> tuple[Tensor, Scales]:
    top = 127.0 if dtype == torch.int8 else 8.0
    values = case.kv(torch.float32) * (top / 4)
    kv = (values.round() if dtype == torch.int8 else values).clamp(-top, top).to(dtype)
    k_scales = torch.rand(case.images, case.layers, case.heads, case.width) / top + 0.01
    v_scales = torch.rand(case.images, case.layers, case.heads, case.kept) / top + 0.01
    return kv, (k_scales, v_scales)


def indexed_inputs(
    case: PromptCase, dtype: torch.dtype, tokens: int = 211
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v [L, B, H, N, D] as views of a packed projection, and distinct ascending tokens."""
    generator = torch.Generator().manual_seed(3)
    shape = (case.layers, case.images, tokens, 2, case.heads, case.width)
    packed = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    k, v = packed.permute(3, 0, 1, 4, 2, 5)
    ranks = torch.rand(case.images, case.layers, case.heads, tokens, generator=generator)
    index = ranks.argsort(-1)[..., : case.kept].sort(-1).values
    return k, v, index.int()
