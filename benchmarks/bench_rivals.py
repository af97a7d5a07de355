"""Who else computes an op on a CPU: ``torch.compile`` of the plain one, FlexAttention, torch.

Each row is a rival, measured beside the plain expression like ours in ``bench_<op>.py``; on a GPU
``make device`` measures them all, xformers among them.
"""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Sizes
from benchmarks.contest import Contest, Planned
from benchmarks.device.contests import all_contests

# The first of each op: f32 where the CPU's training uses it.
_OPS = ("token_scores", "select_tokens", "prompt_attention", "frozen_attention", "quantise_kv")


def first_of(op: str, sizes: Sizes) -> Contest:
    """The op's first form in f32, or in its first dtype where it has no f32."""
    plans: list[Planned] = [p for p in all_contests(sizes) if p.name.split(",")[0].split()[0] == op]
    plans.sort(key=lambda plan: "float32" not in plan.name)
    return plans[0].make()


@pytest.mark.parametrize("op", _OPS)
def bench_compiled_plain(
    beside: Callable[[Contest, str], None], benchmark: BenchmarkFixture, sizes: Sizes, op: str
) -> None:
    """Inductor's C++; seconds of compilation are outside."""
    contest = first_of(op, sizes)
    torch.compiler.reset()
    backend = "inductor" if benchmark.enabled else "eager"
    run = torch.compile(contest.plain, dynamic=False, backend=backend)
    beside(replace(contest, ours=lambda impl: run()), "torch.compile")


@pytest.mark.parametrize("op", ["token_scores", "frozen_attention"])
def bench_rivals(beside: Callable[[Contest, str], None], sizes: Sizes, op: str) -> None:
    """FlexAttention's two passes for the scores, torch's own attention for the frozen layer."""
    contest = first_of(op, sizes)
    name, run = next(iter(contest.rivals.items()))
    beside(replace(contest, ours=lambda impl: run()), name)
