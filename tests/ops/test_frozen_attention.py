"""frozen_attention against its oracle; and others' kernels for CUDA, as far as a CPU goes.

What those compute is shown by ``tests/gpu/test_frozen_attention.py``; here it is how they are
called, and what is made of what they return.
"""

import math
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from benchmarks.cases import FROZEN_CASES, FrozenCase
from fpt_fast import ops
from fpt_fast.ops import (
    cuda_attention,
    cuda_reasons,
    frozen_attention,
    implementation,
    native_reasons,
    reference,
)
from fpt_fast.records import Attention
from helpers import assert_within_budget, budget_cases, implementations_here

OF_OTHERS = ("flash", "efficient", "cudnn", "xformers")
IMPLEMENTATIONS = [
    name for name in implementations_here("frozen_attention") if name not in OF_OTHERS
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_budget(out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor) -> None:
    oracle = reference.frozen_attention(q.double(), k.double(), v.double())
    eager = reference.frozen_attention(q, k, v)
    assert_within_budget(out, oracle[0], eager[0])
    assert_within_budget(lse, oracle[1], eager[1])


@pytest.mark.parametrize(
    ("case", "impl", "dtype"),
    budget_cases(FROZEN_CASES, IMPLEMENTATIONS, DTYPES),
    indirect=["impl"],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_budget(case: FrozenCase, impl: str, dtype: torch.dtype) -> None:
    q, k, v = case.qkv(dtype)
    out, lse = frozen_attention(q, k, v, impl=impl)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert out.transpose(1, 2).is_contiguous() and lse.is_contiguous()
    assert_budget(out, lse, q, k, v)


def test_the_oracle_is_attention() -> None:
    q, k, v = FROZEN_CASES[0].qkv(torch.float64)
    out, lse = reference.frozen_attention(q, k, v)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    row = [float(q[1, 2, 5] @ k[1, 2, n]) / math.sqrt(10) for n in range(37)]
    assert float(lse[1, 2, 5]) == pytest.approx(math.log(sum(map(math.exp, row))), rel=1e-12)


@pytest.mark.parametrize("impl", ["cpu", "blocked"], indirect=True)
def test_f64_is_exact(impl: str) -> None:
    q, k, v = FROZEN_CASES[0].qkv(torch.float64)
    out, lse = frozen_attention(q, k, v, impl=impl)
    expected = reference.frozen_attention(q, k, v)
    torch.testing.assert_close(out, expected[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(lse.double(), expected[1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_its_lse_gives_the_scores(impl: str) -> None:
    q, k, v = FROZEN_CASES[0].qkv(torch.float32)
    _, lse = frozen_attention(q, k, v, impl=impl)
    scores = ops.token_scores(q, k, lse=lse)
    torch.testing.assert_close(scores, ops.token_scores(q, k), rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", ["blocked", "reference", "triton"], indirect=True)
def test_attention_with_scores_through_any_implementation(impl: str) -> None:
    q, k, v = FROZEN_CASES[0].qkv(torch.float32)
    out, scores, lse = ops.attention_with_scores(q, k, v, impl=impl)
    assert out is not None and scores is not None and lse is not None
    expected = frozen_attention(q, k, v, impl=impl)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    assert torch.equal(scores, ops.token_scores(q, k, lse=lse))
    alone = ops.attention_with_scores(q, k, v, need_output=False, impl=impl)
    assert alone[0] is None and alone[2] is None and alone[1] is not None
    torch.testing.assert_close(alone[1], scores, rtol=1e-5, atol=0)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS, indirect=True)
def test_opcheck(impl: str) -> None:
    q, k, v = FROZEN_CASES[0].qkv(torch.float32)
    torch.library.opcheck(torch.ops.fpt.frozen_attention.default, (q, k, v, impl))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 5, 8)}, r"q must be \[B, H, N, D\], got shape \(3, 5, 8\)"),
        ({"v": torch.zeros(2, 3, 5, 9)}, r"v must be \(2, 3, 5, 8\) like q, got \(2, 3, 5, 9\)"),
        ({"k": torch.zeros(2, 3, 5, 8).half()}, "k must be float32, got float16"),
        ({"v": torch.zeros(2, 3, 5, 8, device="meta")}, "v must be on cpu like q, got meta"),
        ({"v": torch.zeros(2, 3, 5, 8, requires_grad=True)}, "v must not require grad"),
        (dict.fromkeys("qkv", torch.zeros(2, 3, 0, 8)), "q must have N of at least 1"),
        (dict.fromkeys("qkv", torch.zeros(2, 3, 5, 0)), "q must have D of at least 1"),
        (dict.fromkeys("qkv", torch.zeros(2, 3, 5, 8).int()), "q must be float16 or bfloat16"),
        (
            {"impl": "cuda"},
            "impl must be 'auto' or one of 'native', 'cpu', 'flash', .*, got 'cuda'",
        ),
        (
            {"impl": "flash"},
            "impl='flash' cannot run frozen_attention here: it runs on cuda tensors, got tensors "
            "on cpu; it takes float16, bfloat16, got float32",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(value),
)
def test_errors_name_the_argument(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {name: torch.zeros(2, 3, 5, 8) for name in "qkv"}
    with pytest.raises(ValueError, match=message):
        frozen_attention(**{**good, **change})


def test_the_setting_knows_every_implementation() -> None:
    names = implementation.implementations("frozen_attention")
    assert set(get_args(Attention)) == {"auto", *names}


class OnCuda:
    """A tensor's shape, dtype and device, as far as reasons look."""

    def __init__(self, dtype: torch.dtype, width: int) -> None:
        self.dtype, self.shape, self.device = dtype, (1, 1, 5, width), torch.device("cuda")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Reasons as on a machine with a GPU of some capability and everything installed."""

    def have(capability: tuple[int, int] = (9, 0), built: bool = True) -> None:
        monkeypatch.setattr(implementation, "Tensor", OnCuda)
        monkeypatch.setattr(cuda_reasons, "Tensor", OnCuda)
        monkeypatch.setattr(native_reasons, "Tensor", OnCuda)
        monkeypatch.setattr(cuda_reasons, "_has_xformers", lambda: built)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: built)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)

    return have


def reasons(name: str, dtype: torch.dtype, width: int) -> list[str]:
    q = OnCuda(dtype, width)
    return implementation.unsupported_reasons("frozen_attention", name, q, q, q)


@pytest.mark.parametrize("name", OF_OTHERS)
def test_on_a_gpu_each_runs(name: str, gpu: Callable[..., None]) -> None:
    gpu()
    assert reasons(name, torch.bfloat16, 64) == []


def test_on_a_gpu_auto_takes_flash_and_for_f32_efficient(gpu: Callable[..., None]) -> None:
    gpu()
    for dtype, name in (
        (torch.float16, "flash"),
        (torch.bfloat16, "flash"),
        (torch.float32, "efficient"),
    ):
        q = OnCuda(dtype, 64)
        assert implementation.resolve("frozen_attention", "auto", (q, q, q)).name == name


def test_reasons_name_what_is_missing(gpu: Callable[..., None]) -> None:
    gpu()
    assert reasons("flash", torch.float32, 64) == ["it takes float16, bfloat16, got float32"]
    assert reasons("flash", torch.float16, 257) == ["it takes a head width of at most 256, got 257"]
    assert reasons("cudnn", torch.float16, 129) == ["it takes a head width of at most 128, got 129"]
    assert reasons("efficient", torch.float32, 300) == []
    gpu(capability=(7, 5))
    assert reasons("cudnn", torch.float16, 64) == [
        "it needs compute capability 8.0 or newer, got 7.5"
    ]
    assert reasons("efficient", torch.float16, 64) == []
    gpu(built=False)
    assert reasons("flash", torch.float16, 64) == ["this build of torch has no FlashAttention"]
    assert reasons("cudnn", torch.float16, 64) == ["this torch finds no cuDNN"]
    assert reasons("xformers", torch.float16, 64) == [
        "xformers is not installed (pip install 'fpt-fast[xformers]')"
    ]


ATEN = {
    "flash": "_scaled_dot_product_flash_attention",
    "efficient": "_scaled_dot_product_efficient_attention",
    "cudnn": "_scaled_dot_product_cudnn_attention",
}


@pytest.mark.parametrize("width", [10, 64])
@pytest.mark.parametrize("name", sorted(ATEN))
def test_torch_takes_the_call_and_returns_such_shapes(name: str, width: int) -> None:
    """torch's own description of its kernels, on tensors without data."""
    q = torch.empty((2, 3, 37, width), dtype=torch.float16, device="meta")
    out, lse = getattr(cuda_attention, name)(q, q, q)
    assert out.shape == q.shape and out.dtype == q.dtype
    assert lse.shape == (2, 3, 37) and lse.dtype == torch.float32


def as_the_kernels_do(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of [B, H, N, D] that refuses what they refuse."""
    for tensor in (q, k, v):
        *steps, last = tensor.stride()
        used = [step for step, size in zip(steps, tensor.shape, strict=False) if size > 1]
        assert tensor.shape[-1] % 8 == 0 and last == 1 and all(step % 8 == 0 for step in used)
        assert tensor.storage_offset() % 8 == 0
    logits = q @ k.mT * scale
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def rounded_up(lse: Tensor) -> Tensor:
    return torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's and xformers' kernels, computed on the CPU in the layouts that they have."""

    def flash(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, ...]:
        return (*as_the_kernels_do(q, k, v, scale), None, None)

    def efficient(
        q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        out, lse = as_the_kernels_do(q, k, v, scale)
        return (out, rounded_up(lse) if with_lse else lse[..., :0], None)

    def cudnn(
        q: Tensor, k: Tensor, v: Tensor, bias: None, with_lse: bool, *, scale: float
    ) -> tuple[Tensor, ...]:
        out, lse = as_the_kernels_do(q, k, v, scale)
        return (out, lse.unsqueeze(-1) if with_lse else lse[..., :0], None)

    def of_xformers(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = as_the_kernels_do(*(x.transpose(1, 2) for x in (q, k, v)), scale)
        return out.transpose(1, 2), rounded_up(lse)

    for name, function in {"flash": flash, "efficient": efficient, "cudnn": cudnn}.items():
        monkeypatch.setattr(torch.ops.aten, ATEN[name], function)
    package = ModuleType("xformers.ops")
    package.memory_efficient_attention_forward_requires_grad = of_xformers  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", package)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", OF_OTHERS)
@pytest.mark.parametrize("case", FROZEN_CASES, ids=lambda case: case.name)
def test_padding_alignment_and_lse_of_every_kernel(case: FrozenCase, name: str) -> None:
    q, k, v = case.qkv(torch.float32)
    out, lse = getattr(cuda_attention, name)(q, k, v)
    assert out.shape == q.shape and lse.shape == q.shape[:3] and lse.is_contiguous()
    assert_budget(out, lse, q, k, v)


@pytest.mark.usefixtures("kernels")
@pytest.mark.parametrize("name", OF_OTHERS)
def test_views_that_the_kernels_cannot_load_are_copied(name: str) -> None:
    """An offset or a stride that is no multiple of 8 elements, or a last axis with gaps."""
    wide = torch.randn(1, 2, 5, 33)
    views = (wide[..., 1:17], wide[..., :32:2], torch.randn(1, 2, 16, 5).transpose(2, 3))
    for q in (*views, torch.randn(161)[1:].view(1, 2, 5, 16)):
        out, lse = getattr(cuda_attention, name)(q, q, q)
        assert_budget(out, lse, q, q, q)


def test_views_of_one_projection_are_not_copied() -> None:
    q, k, v = FROZEN_CASES[3].qkv(torch.float16)
    for given, taken in zip((q, k, v), cuda_attention._aligned(q, k, v), strict=True):
        assert taken.data_ptr() == given.data_ptr()
