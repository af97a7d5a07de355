"""Every op beside the plain expression: times, rates, share of the counted floor, peak memory."""

from typing import Any

from benchmarks.contest import Contest, Planned, device_implementation
from benchmarks.counts import Ceilings, floor_seconds
from benchmarks.device.contests import all_contests
from benchmarks.device.phases import Options
from benchmarks.device.schedule import Item
from benchmarks.device.timing import forget, peak_added, timed


def items(options: Options) -> list[Item]:
    """One for each contest."""
    return [
        Item(planned.name, lambda _, p=planned: measure(options, p))  # type: ignore[misc]
        for planned in all_contests(options.sizes)
    ]


def measure(options: Options, planned: Planned) -> dict[str, Any]:
    """Ours, plain, ours again; a wrong result of ours is an error, not a time."""
    contest, device = planned.make(), options.device
    impl = device_implementation(contest.op)
    contest.check(contest.ours(impl))
    ours = timed(lambda: contest.ours(impl), device)
    row = {"impl": impl, **ours, "peak_added": peak_added(lambda: contest.ours(impl), device)}
    row |= rates(contest, ours["seconds"], options.ceilings)
    try:
        plain = timed(contest.plain, device)
        row["plain_peak_added"] = peak_added(contest.plain, device)
        row |= {"plain_seconds": plain["seconds"], "plain_eager_seconds": plain["eager_seconds"]}
        row["plain_over_ours"] = plain["seconds"] / ours["seconds"]
    except RuntimeError as error:  # out of memory: the plain expression stores maps
        row |= {"plain_seconds": None, "plain_why": str(error)[:300]}
    row["seconds_again"] = timed(lambda: contest.ours(impl), device)["seconds"]
    forget()
    return row


def rates(contest: Contest, seconds: float, ceilings: Ceilings) -> dict[str, Any]:
    """Of counted work, which is the same however it is done."""
    count = contest.count
    floor = floor_seconds(count, ceilings, contest.dtype.split()[0])
    return {
        "group": contest.group,
        "case": contest.case,
        "dtype": contest.dtype,
        "bytes": count.bytes,
        "out_bytes": count.out_bytes,
        "flops": count.flops,
        "exponentials": count.exponentials,
        "gb_per_s": count.bytes / seconds / 1e9,
        "tflop_per_s": count.flops / seconds / 1e12,
        "floor_seconds": floor,
        "share_of_floor": floor / seconds,
    }
