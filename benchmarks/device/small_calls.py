"""Every kernel once on small shapes: what compute-sanitizer watches."""

import sys

import torch

from benchmarks.cases import Sizes
from benchmarks.contest import device_implementation
from benchmarks.device.contests import all_contests


def call_all(device: torch.device) -> int:
    """Number of calls made, each checked."""
    calls = 0
    for planned in all_contests(Sizes("dry" if device.type == "cpu" else "tiny", device)):
        contest = planned.make()
        contest.check(contest.ours(device_implementation(contest.op)))
        calls += 1
    return calls


if __name__ == "__main__":
    print(call_all(torch.device("cuda")), "calls")
    sys.exit(0)
