"""The plain expression beside every benchmark, and the counts that shares of a floor rest on."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import (
    bench_frozen_attention,
    bench_prompt_attention,
    bench_prompt_attention_indexed,
    bench_quantise_kv,
    bench_select_tokens,
    bench_token_scores,
    counts,
)
from benchmarks.cases import FULL_PROMPT_CASES, GPU_FROZEN_CASES, Sizes
from benchmarks.contest import Contest, beside_plain, cpu_implementations, table
from benchmarks.counts import H200, Ceilings, Count, floor_seconds

MODULES = (
    bench_frozen_attention,
    bench_token_scores,
    bench_select_tokens,
    bench_quantise_kv,
    bench_prompt_attention,
    bench_prompt_attention_indexed,
)
BF16, F16 = torch.bfloat16, torch.float16


class FakeBenchmark:
    """As much of pytest-benchmark's fixture as is used; every call of ours takes a second."""

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.extra_info: dict[str, Any] = {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(median=1.0))
        self.calls: list[str] = []

    def pedantic(self, run: Any, setup: Any, rounds: int) -> Any:
        self.stats.stats.data = [1.0] * rounds
        for _ in range(rounds):
            self.calls.append("plain")
            setup()
            self.calls.append("ours")
            result = run()
        return result


def contest_of(result: float) -> Contest:
    def check(value: Any) -> None:
        assert float(value) == 3.0

    return Contest(
        op="token_scores",
        group="sum",
        case="odd",
        dtype="float32",
        ours=lambda impl: torch.tensor(result),
        plain=lambda: torch.tensor(3.0),
        check=check,
        count=Count(flops=2, bytes=12),
    )


def test_a_row_holds_both_and_their_ratio() -> None:
    benchmark = FakeBenchmark(enabled=True)
    row = beside_plain(benchmark, contest_of(3.0), "cpu")  # type: ignore[arg-type]
    info = benchmark.extra_info
    assert benchmark.calls[:4] == ["plain", "ours", "plain", "ours"]
    assert row["ours"] == 1.0 and row["ratio"] == row["plain"] == info["plain_seconds"] > 0
    assert info["plain_over_ours"] == row["ratio"] and info["peak_added"] == 4
    assert (info["impl"], info["flops"], info["bytes"]) == ("cpu", 2, 12)
    line = table([row]).splitlines()[1].split()
    assert line[:6] == ["sum", "odd", "float32", "cpu", "1", "s"]


def test_switched_off_it_runs_once_and_times_nothing() -> None:
    benchmark = FakeBenchmark(enabled=False)
    row = beside_plain(benchmark, contest_of(3.0), "cpu")  # type: ignore[arg-type]
    assert benchmark.calls == ["plain", "ours"]
    assert row["ratio"] is None and "plain_seconds" not in benchmark.extra_info
    assert len(table([row]).splitlines()) == 1


def test_a_wrong_result_is_not_measured() -> None:
    with pytest.raises(AssertionError):
        beside_plain(FakeBenchmark(enabled=True), contest_of(4.0), "cpu")  # type: ignore[arg-type]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_checks_catch_a_wrong_result(module: Any) -> None:
    for planned in module.contests(Sizes()):
        contest = planned.make()
        contest.check(contest.plain())
        contest.check(contest.ours(cpu_implementations(contest.op)[0]))
        result = contest.plain()
        parts = result if isinstance(result, tuple) else (result,)
        wrong = tuple((part.float() * 2).to(part.dtype) for part in parts)
        with pytest.raises(AssertionError):
            contest.check(wrong if isinstance(result, tuple) else wrong[0])


def test_names_are_unique() -> None:
    plans = [planned for module in MODULES for planned in module.contests(Sizes())]
    assert [planned.name for planned in plans] == [planned.make().name for planned in plans]
    assert len({planned.name for planned in plans}) == len(plans)


@pytest.mark.parametrize("case", range(2))
def test_flex_attention_computes_the_scores(case: int) -> None:
    contest = bench_token_scores.contest(
        bench_token_scores.FORMS[case], Sizes().frozen[0], torch.float32, Sizes()
    )
    contest.check(contest.rivals["flex_attention"]())


def test_counts_of_design() -> None:
    """51 µs for 16 images' column means at N = 1025, 60.5 MB of features for a batch of FPT+."""
    layer = counts.token_scores(GPU_FROZEN_CASES[0], BF16, passes=1)
    assert layer.flops == 2 * 16 * 12 * 1025**2 * 64 and layer.exponentials == 16 * 12 * 1025**2
    assert floor_seconds(layer, H200, "bfloat16") == pytest.approx(51.2e-6, rel=1e-3)
    twice = counts.token_scores(GPU_FROZEN_CASES[0], BF16, passes=2)
    assert (twice.flops, twice.exponentials) == (2 * layer.flops, 2 * layer.exponentials)
    forward = counts.prompt_attention(FULL_PROMPT_CASES[0], BF16, F16, True, False)
    backward = counts.prompt_attention(FULL_PROMPT_CASES[0], BF16, F16, False, True)
    assert 60.4e6 < 16 * 6 * 2 * 12 * 205 * 64 * 2 < 60.5e6 < forward.bytes < 64e6
    assert forward.bytes < backward.bytes < 66e6
    eight = counts.prompt_attention(FULL_PROMPT_CASES[0], BF16, torch.int8, True, False)
    assert 30.2e6 < eight.bytes < 35e6
    copied = counts.select_tokens(GPU_FROZEN_CASES[0], BF16, F16)
    assert copied.bytes == 16 * 12 * (205 * 64 * 2 * 2 * 2 + 4 * 1025 + 4 * 205)


def test_the_floor_is_the_largest_time() -> None:
    count = Count(flops=100, bytes=10, exponentials=5)
    assert floor_seconds(count, Ceilings(1.0, {"float16": 2.0}, 1.0), "float16") == 50
    assert floor_seconds(count, Ceilings(0.1, {"float16": 2.0}, 1.0), "float16") == 100
    assert floor_seconds(count, Ceilings(1.0, {"float16": 2.0}, 0.01), "float16") == 500
    assert floor_seconds(count, Ceilings(1.0, {"float16": 2.0}), "float32") == 10
