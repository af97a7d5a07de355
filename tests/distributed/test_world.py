"""Ranks meet, gather and add up; a lost one is named."""

import itertools

import pytest
import torch
from distributed.ranks import run_ranks

from fpt_fast.distributed import World, open_world

COLLECT = """
import torch
from fpt_fast.distributed import open_world
with open_world(patience=60) as world:
    world.meet("at the start")
    parts = world.gather(torch.full((world.rank * 2, 3), float(world.rank)))
    total = world.sum(torch.tensor([1.0, 10.0 * world.rank]))
    print([tuple(p.shape) for p in parts], parts[-1].unique().tolist(), total.tolist(),
          list(world.share(5)), world.is_first)
"""

LOSE = """
import os, sys
from fpt_fast.distributed import LostRank, open_world
with open_world(patience=5) as world:
    world.meet("at the start")
    if world.rank == 1:
        os._exit(9)
    try:
        world.meet("after 7 images")
    except LostRank as error:
        print(error)
        sys.stdout.flush()
        os._exit(3)
"""


def test_gather_sum_and_shares() -> None:
    first, second = run_ranks(COLLECT)
    assert (first.status, second.status) == (0, 0), first.output + second.output
    shared = "[(0, 3), (2, 3)] [1.0] [2.0, 10.0]"
    assert first.output.splitlines()[-1] == f"{shared} [0, 1] True"
    assert second.output.splitlines()[-1] == f"{shared} [2, 3, 4] False"


def test_a_lost_rank_is_named() -> None:
    first, second = run_ranks(LOSE)
    assert (first.status, second.status) == (3, 9), first.output
    line = first.output.splitlines()[-1]
    assert "lost after 7 images" in line and "1" in line.partition("(")[2] and "again" in line


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with open_world() as world:
        assert world.size == 1 and world.is_first and list(world.share(3)) == [0, 1, 2]
        world.meet("nowhere")
        part = torch.ones(2)
        assert world.gather(part) == [part] and world.sum(part) is part


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"WORLD_SIZE": "2"}, "RANK must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be 0 to WORLD_SIZE - 1 = 1, got 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be a whole number"),
    ],
)
def test_variables_that_do_not_fit(
    values: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), open_world():
        pass


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_shares_cover_everything_once(size: int) -> None:
    for count in (0, 1, 5, 16):
        parts = [list(World(rank, size).share(count)) for rank in range(size)]
        assert list(itertools.chain(*parts)) == list(range(count))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
