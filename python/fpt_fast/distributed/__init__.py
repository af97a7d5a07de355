"""Several processes at one task, as ``torchrun`` starts them; one process alone is a world of one.

Only tensors travel, never pickled objects.  Collectives of control data run over gloo on the CPU,
so that they work and can name a lost rank whatever the device; gradients go over the device's own
backend.
"""

from fpt_fast.distributed.opening import (
    is_first_process,
    open_world,
    processes_here,
    refuse_several,
)
from fpt_fast.distributed.signs_of_life import LostRank
from fpt_fast.distributed.world import ALONE, World

__all__ = [
    "ALONE",
    "LostRank",
    "World",
    "is_first_process",
    "open_world",
    "processes_here",
    "refuse_several",
]
