"""token_scores: every implementation beside the plain expression, and beside attention itself.

``pytest --benchmark-only benchmarks/bench_token_scores.py`` measures a tiny layer, ``--full`` one
layer of ViT-B at 512 px.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import counts, flex
from benchmarks.beside import alternate, dtype_name
from benchmarks.cases import FrozenCase, Sizes
from benchmarks.contest import Contest, Planned, Result, cpu_implementations, planned
from fpt_fast.ops import attention_with_scores, reference, token_scores
from fptkernels.launch_table import pad_width

DTYPES = (torch.float32, torch.bfloat16)
FORMS = ("token_scores, log-sum-exp given", "token_scores", "token_scores, class token")


def contests(sizes: Sizes) -> Iterator[Planned]:
    """Every form, size and dtype; bf16 and the form that preloading uses first."""
    for form in FORMS:
        for case in sizes.frozen:
            for dtype in reversed(DTYPES):
                yield planned(contest, form, case, dtype, sizes)


def contest(form: str, case: FrozenCase, dtype: torch.dtype, sizes: Sizes) -> Contest:
    """One layer's scores in one of the three forms."""
    q, k, _ = case.qkv(dtype, device=sizes.device)
    lse = row_lse(q, k) if form == FORMS[0] else None
    importance = "class_token" if form == FORMS[2] else "global"
    kernel = f"token_scores_{('columns', 'rows', 'class_token')[FORMS.index(form)]}"
    queries, passes = (1, 1) if form == FORMS[2] else (0, 2 - (lse is not None))
    return Contest(
        op="token_scores",
        group=form,
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        ours=lambda impl: token_scores(q, k, importance=importance, lse=lse, impl=impl),
        plain=lambda: plain(q, k, importance, lse),
        check=lambda scores: check_scores(scores, q, k, importance),
        count=counts.token_scores(case, dtype, passes, queries),
        tunes=(kernel, dtype, pad_width(case.width)),
        rivals={} if form == FORMS[2] else flex.column_means(q, k, lse),
    )


def plain(q: Tensor, k: Tensor, importance: str, lse: Tensor | None) -> Tensor:
    """The expression that the op replaces; with the log-sum-exp at hand, no softmax."""
    if lse is None:
        return reference.token_scores(q, k, importance)
    logits = q @ k.mT * q.shape[-1] ** -0.5
    return (logits - lse.to(q.dtype).unsqueeze(-1)).exp().mean(-2)


def row_lse(q: Tensor, k: Tensor) -> Tensor:
    """Row log-sum-exp [B, H, N] f32, one image's map at a time."""
    rows = [
        (a.float() @ b.float().mT * q.shape[-1] ** -0.5).logsumexp(-1)
        for a, b in zip(q, k, strict=True)
    ]
    return torch.stack(rows)


def check_scores(scores: Result, q: Tensor, k: Tensor, importance: str = "global") -> None:
    """Non-negative, with a sum of 1, and the first image's like the oracle's."""
    assert isinstance(scores, Tensor)
    assert bool((scores >= 0).all())
    sums = scores.float().sum(-1)
    torch.testing.assert_close(sums, torch.ones_like(sums), rtol=3e-2, atol=0)
    first = reference.token_scores(q[:1].float(), k[:1].float(), importance)
    tolerance = {"rtol": 1e-3, "atol": 1e-6} if q.dtype == torch.float32 else {"rtol": 6e-2}
    torch.testing.assert_close(scores[:1].float(), first, **{"atol": 1e-4, **tolerance})


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("impl", cpu_implementations("token_scores"))
@pytest.mark.parametrize("form", FORMS)
def bench_token_scores(
    beside: Callable[[Contest, str], None],
    sizes: Sizes,
    form: str,
    impl: str,
    dtype: torch.dtype,
) -> None:
    beside(contest(form, sizes.frozen[0], dtype, sizes), impl)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("way", ["attention_alone", "attention_with_scores"])
def bench_attention_with_scores(
    benchmark: BenchmarkFixture, sizes: Sizes, way: str, dtype: torch.dtype
) -> None:
    """What the scores add to a frozen layer; the plain twin makes the map once and uses it for
    both."""
    case = sizes.frozen[0]
    q, k, v = case.qkv(dtype)

    def plain() -> tuple[Tensor, Tensor]:
        weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
        return weights @ v, weights.mean(-2)

    with_scores = way == "attention_with_scores"
    result = alternate(
        benchmark,
        lambda: (
            attention_with_scores(q, k, v)
            if with_scores
            else (F.scaled_dot_product_attention(q, k, v),)
        ),
        plain,
        dtype=dtype_name(dtype),
        count=counts.attention(case, dtype, products=2 + with_scores, passes=1 + with_scores),
        rounds=9,
    )
    benchmark.group = "attention, and token_scores on its way"
    benchmark.extra_info["case"] = case.name
    if with_scores:
        check_scores(result[1], q, k)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(result[0], expected, rtol=2e-2, atol=2e-2)
