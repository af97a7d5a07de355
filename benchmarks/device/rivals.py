"""Who else computes it: torch.compile of the plain expression, FlexAttention, 32 x 32 tiles."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch

from benchmarks.contest import Contest, Planned, device_implementation
from benchmarks.device.contests import all_contests
from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import forget, timed
from fptkernels import launch_table
from fptkernels.launch_table import Tile

# The scheme of FlagAttention's total-attention kernel: key-major, in tiles of 32 by 32.
_KEY_MAJOR = Tile(32, 32, 4, 1)


def items(options: Options) -> list[Item]:
    """One for each contest of the three ops that an issue names, 16-bit floats first."""
    planned = list(all_contests(options.sizes))
    planned.sort(key=lambda p: "float32" in p.name)
    return [
        Item(p.name, lambda seconds, p=p: compare(options, p, seconds), least=5.0)  # type: ignore[misc]
        for p in planned[: 3 if options.is_dry else None]
    ]


def compare(options: Options, planned: Planned, seconds: float) -> dict[str, Any]:
    """Seconds of ours and of every rival in the same process, or why a rival has none."""
    # Else the compiler gives up on a function after eight shapes, and measures it uncompiled.
    torch.compiler.reset()
    contest, device = planned.make(), options.device
    impl = device_implementation(contest.op)
    ours = timed(lambda: contest.ours(impl), device)["seconds"]
    result: dict[str, Any] = {"impl": impl, "ours": ours, "rivals": {}}
    for name, run, context in rivals(contest, impl, options.is_dry):
        try:
            with context:
                contest.check(run())
                took = timed(run, device)["seconds"]
            result["rivals"][name] = {"seconds": took, "over_ours": took / ours}
        except Exception as error:
            result["rivals"][name] = {
                "seconds": None,
                "why": f"{type(error).__name__}: {error}"[:600],
            }
        forget()
    return result


def rivals(
    contest: Contest, impl: str, is_dry: bool
) -> Iterator[tuple[str, Callable[[], Any], Any]]:
    """Name, function, and the context that it runs in."""
    backend = "eager" if is_dry else "inductor"
    yield (
        "torch.compile",
        torch.compile(contest.plain, backend=backend, dynamic=False),
        nullcontext(),
    )
    for name, run in contest.rivals.items():
        yield name, run, nullcontext()
    if contest.tunes and contest.tunes[0] == "token_scores_columns":
        narrow = launch_table.overridden(*contest.tunes, _KEY_MAJOR)
        yield "key_major_32x32", lambda: contest.ours(impl), narrow
