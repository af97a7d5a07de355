"""The contests of every op that has a benchmark, in order of worth."""

from collections.abc import Iterator
from importlib import import_module

from benchmarks.cases import Sizes
from benchmarks.contest import Planned
from benchmarks.device.processes import ROOT
from fpt_fast.ops import implementation, library

_FIRST = ("token_scores", "select_tokens", "prompt_attention", "frozen_attention")


def all_contests(sizes: Sizes) -> Iterator[Planned]:
    """Of ``benchmarks/bench_<op>.py``, for every op that is registered: none needs a list here."""
    assert library.ops is not None  # importing it registers the ops
    names = sorted(implementation.ops(), key=lambda op: (op not in _FIRST, op))
    for op in [*_FIRST, *(name for name in names if name not in _FIRST)]:
        if (ROOT / "benchmarks" / f"bench_{op}.py").exists():
            module = import_module(f"benchmarks.bench_{op}")
            if hasattr(module, "contests"):
                yield from module.contests(sizes)
