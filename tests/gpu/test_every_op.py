"""Every op, by the contests of its benchmark: compiled without a graph break it is the same."""

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Sizes
from benchmarks.contest import Planned, device_implementation
from benchmarks.device.contests import all_contests
from helpers import assert_tensors_equal
from on_device import DEVICE, ON_GPU

pytestmark = pytest.mark.gpu

CONTESTS = list(all_contests(Sizes("tiny" if ON_GPU else "dry", DEVICE)))


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("planned", CONTESTS, ids=lambda planned: planned.name)
def test_compiled_it_computes_the_same(planned: Planned) -> None:
    contest = planned.make()
    impl = device_implementation(contest.op)
    torch.compiler.reset()
    backend = "inductor" if ON_GPU else "eager"
    compiled = torch.compile(contest.ours, fullgraph=True, backend=backend)
    result, expected = compiled(impl), contest.ours(impl)
    contest.check(result)
    if isinstance(result, Tensor):
        result, expected = (result,), (expected,)
    assert_tensors_equal(result, expected)
