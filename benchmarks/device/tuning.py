"""Launch sizes by measurement: candidates of every kernel timed, the best as rows to paste."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from math import log2
from time import monotonic
from typing import Any

import torch

from benchmarks.contest import Contest, Planned, device_implementation
from benchmarks.device.contests import all_contests
from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import forget, timed
from fptkernels import launch_table
from fptkernels.launch_table import Tile

# block_m, block_n, warps, stages by the beginning of a kernel's name; the longest one counts.
CHOICES = {
    "": ((16, 32, 64, 128), (32, 64, 128), (2, 4, 8), (1, 2, 3, 4)),
    "token_scores": ((32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)),
    "token_scores_rows_one": ((16,), (32, 64, 128, 256), (2, 4, 8), (1, 2, 3)),
    "token_scores_columns_one": ((16,), (32, 64, 128, 256), (2, 4, 8), (1, 2)),
    "select_tokens": ((16, 32, 64, 128), (1024, 2048, 4096), (4, 8), (1,)),
    "prompt_attention": ((16, 32, 64), (32, 64, 128), (2, 4, 8), (1, 2, 3, 4)),
}


def items(options: Options) -> list[Item]:
    """One for each contest whose kernel has rows in the launch table."""
    wanted = [p for p in all_contests(options.sizes) if "1024px" not in p.name]
    wanted = wanted[:3] if options.is_dry else wanted
    return [
        Item(p.name, lambda s, p=p, n=n: sweep(options, p, share(s, n)), least=4.0)  # type: ignore[misc]
        for n, p in zip(range(len(wanted), 0, -1), wanted, strict=True)
    ]


def share(seconds: float, items_left: int) -> float:
    """Of the time left: the first items are worth most, and get twice their equal part."""
    return seconds * min(1.0, 2 / items_left)


def candidates(kernel: str, present: Tile) -> list[Tile]:
    """All choices but the present one, nearest to it first."""
    key = max((name for name in CHOICES if kernel.startswith(name)), key=len)
    tiles = [Tile(*sizes) for sizes in product(*CHOICES[key])]
    return sorted((tile for tile in tiles if tile != present), key=lambda t: _steps(t, present))


def _steps(a: Tile, b: Tile) -> float:
    """Doublings between two rows."""
    pairs = zip(_sizes(a), _sizes(b), strict=True)
    return sum(abs(log2(x / y)) for x, y in pairs)


def _sizes(tile: Tile) -> tuple[int, int, int, int]:
    return tile.block_m, tile.block_n, tile.num_warps, tile.num_stages


def sweep(options: Options, planned: Planned, seconds: float) -> dict[str, Any]:
    """Present and best row with their times, what was tried, and how many there was no time for."""
    start = monotonic()
    contest = planned.make()
    impl = device_implementation(contest.op)
    if contest.tunes is None or impl != "triton":
        return {"kernel": None, "why": "no kernel of the launch table by itself"}
    kernel, dtype, padded = contest.tunes
    present = launch_table.tile(kernel, dtype, padded, options.device)
    rows = candidates(kernel, present)[: 2 if options.is_dry else None]
    # Half of the time for compiling ahead where several cores do it, a second each by guess.
    rows = rows[: max(4, int(seconds * (os.cpu_count() or 1) / 4))]
    ahead = compile_ahead(lambda: contest.ours(impl), contest, rows)
    times = {present: timed(lambda: contest.ours(impl), options.device, 0.1)["seconds"]}
    failed: dict[Tile, str] = {}
    for row in rows:
        if monotonic() - start > seconds:
            break
        try:
            with launch_table.overridden(kernel, dtype, padded, row):
                times[row] = timed(lambda: contest.ours(impl), options.device, 0.05)["seconds"]
        except Exception as error:
            failed[row] = f"{type(error).__name__}: {error}"[:200]
    best = verified(contest, impl, times)
    forget()
    return {
        "kernel": kernel,
        "dtype": str(dtype).removeprefix("torch."),
        "padded": padded,
        "architecture": launch_table.architecture(options.device),
        "present": [*_sizes(present), times[present]],
        "best": [*_sizes(best), times[best]],
        "gain": times[present] / times[best],
        "row": f"Tile({', '.join(map(str, _sizes(best)))})",
        "tried": [[*_sizes(row), took] for row, took in times.items()],
        "failed": [[*_sizes(row), why] for row, why in failed.items()],
        "not_tried": len(candidates(kernel, present)) + 1 - len(times) - len(failed),
        "compiled_ahead": ahead,
    }


def verified(contest: Contest, impl: str, times: dict[Tile, float]) -> Tile:
    """The fastest row whose result is right; wrong ones lose their time."""
    assert contest.tunes is not None
    for row in sorted(times, key=lambda tile: times[tile]):
        try:
            with launch_table.overridden(*contest.tunes, row):
                contest.check(contest.ours(impl))
        except AssertionError:
            continue
        return row
    raise RuntimeError(f"no launch size of {contest.tunes} gives a right result")


def compile_ahead(run: Callable[[], object], contest: Contest, rows: Sequence[Tile]) -> str:
    """Compile ``run`` for all rows by several threads; says how that went.

    Only saves time: what is not compiled here is compiled when it is launched.
    """
    assert contest.tunes is not None
    if launch_table.is_interpreted():
        return "interpreted"
    import triton
    from triton.runtime.jit import JITFunction

    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, warmup: bool = False, **words: Any) -> Any:
        return launch(self, *args, warmup=True, **words)

    JITFunction.run = compile_only
    try:
        with (
            ThreadPoolExecutor(os.cpu_count()) as pool,
            triton.AsyncCompileMode(pool, ignore_errors=True),
        ):
            for row in rows:
                with launch_table.overridden(*contest.tunes, row):
                    run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        JITFunction.run = launch
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return f"{len(rows)} rows"
