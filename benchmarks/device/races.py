"""Races: every op, dtype and direction, 250 times on the same inputs, bit for bit the same."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import Planned, Result, device_implementation
from benchmarks.device.contests import all_contests
from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import forget

REPEATS = 250


def items(options: Options) -> list[Item]:
    """One for each contest at the sizes of 512 px."""
    wanted = [planned for planned in all_contests(options.sizes) if "1024px" not in planned.name]
    return [Item(planned.name, lambda s, p=planned: repeats(options, p, s)) for planned in wanted]  # type: ignore[misc]


def repeats(options: Options, planned: Planned, seconds: float) -> dict[str, Any]:
    """How many of the repeats differ from the first."""
    contest = planned.make()
    impl = device_implementation(contest.op)
    first = parts(contest.ours(impl))
    count = 3 if options.is_dry else REPEATS
    differing = torch.zeros((), dtype=torch.int64, device=options.device)
    for _ in range(count):
        again = parts(contest.ours(impl))
        # On the device: a look at each would drain the queue that a race needs.
        differing += torch.stack([_differ(a, b) for a, b in zip(first, again, strict=True)]).any()
    result = {"impl": impl, "repeats": count, "differing": int(differing)}
    forget()
    return result


def parts(result: Result) -> Sequence[Tensor]:
    """The tensors of a result."""
    return result if isinstance(result, tuple) else (result,)


def _differ(a: Tensor, b: Tensor) -> Tensor:
    """Whether any bit differs."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return (a.contiguous().view(whole) != b.contiguous().view(whole)).any()
