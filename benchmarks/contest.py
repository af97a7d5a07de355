"""One operation as it is measured everywhere: ours, the plain expression, and who else can do it.

``benchmarks/bench_<op>.py`` yields contests; pytest-benchmark measures them on a CPU, where they
are small, and ``benchmarks/device`` on a GPU, where the same contests are also the cases of the
race check, the memory checker and the tuning sweep.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.beside import alternate, clock
from benchmarks.counts import Count
from fpt_fast.ops.implementation import implementations
from fpt_fast.ops.native_reasons import native_missing

Result = Tensor | tuple[Tensor, ...]
# A plain expression and ours alternate until both have run for about as long, or as often.
_SECONDS, _FEWEST, _MOST = 0.5, 3, 50


@dataclass(frozen=True)
class Contest:
    """``ours(impl)`` and ``plain()`` compute the same of inputs that exist already.

    ``check`` raises AssertionError where a result of either is wrong.  ``tunes`` is the kernel of
    the launch table that ``ours("triton")`` runs, with its dtype and head width; ``rivals`` are
    other ways to the same result.
    """

    op: str
    group: str
    case: str
    dtype: str
    ours: Callable[[str], Result]
    plain: Callable[[], Result]
    check: Callable[[Result], None]
    count: Count
    tunes: tuple[str, torch.dtype, int] | None = None
    rivals: Mapping[str, Callable[[], Result]] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Unique among all contests of one run, and that of its plan."""
        return f"{self.group} {self.case} {self.dtype}"


@dataclass(frozen=True)
class Planned:
    """A contest by name, whose tensors are made when its turn comes."""

    name: str
    make: Callable[[], Contest]


def planned(make: Callable[..., Contest], group: str, *args: Any) -> Planned:
    """``make(group, *args)`` later; ``args`` are a case, dtypes, and the sizes."""
    words = [str(getattr(arg, "name", arg)).removeprefix("torch.") for arg in args[:-1]]
    return Planned(" ".join([group, *words]), lambda: make(group, *args))


def cpu_implementations(op: str) -> list[str]:
    """Implementations that run on this CPU; interpreted, a Triton kernel's time says nothing."""
    absent = {"triton", "native"} if native_missing() else {"triton"}
    return [impl for impl in implementations(op) if impl not in absent]


def device_implementation(op: str) -> str:
    """The implementation that a GPU runs: the kernel where it is registered."""
    known = implementations(op)
    return "triton" if "triton" in known else "reference"


def beside_plain(benchmark: BenchmarkFixture, contest: Contest, impl: str) -> dict[str, Any]:
    """Measure ``impl`` with the plain expression in alternation, check both, note the work.

    Returns the row that the summary prints: times are medians in seconds, None where
    pytest-benchmark does not measure.
    """
    contest.check(contest.plain())
    seconds = clock(lambda: contest.check(contest.ours(impl))) + clock(contest.plain)
    result = alternate(
        benchmark,
        lambda: contest.ours(impl),
        contest.plain,
        dtype=contest.dtype,
        count=contest.count,
        rounds=min(max(int(_SECONDS / seconds), _FEWEST), _MOST),
    )
    contest.check(result)
    info = benchmark.extra_info
    info |= {"case": contest.case, "impl": impl, "exponentials": contest.count.exponentials}
    row = {"group": contest.group, **info, "ours": None, "plain": None, "ratio": None}
    if benchmark.enabled:
        row |= {"ours": benchmark.stats.stats.median, "plain": info["plain_seconds"]}
        row["ratio"] = info["plain_over_ours"]
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Lines of the summary: every measured row with the plain expression beside it."""
    head = (
        f"{'group':38} {'case':22} {'dtype':18} {'impl':10} {'ours':>9} {'plain':>9} {'ratio':>7}"
    )
    lines = [
        f"{row['group']:38} {row['case']:22} {row['dtype']:18} {row['impl']:10} "
        f"{_time(row['ours']):>9} {_time(row['plain']):>9} {row['ratio']:7.2f}"
        for row in rows
        if row["ratio"] is not None
    ]
    return "\n".join([head, *lines])


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"
