"""Ranks meet, gather and add up; a lost one is named."""

import itertools
import os
import signal

import pytest
import torch
from children import FAILED
from distributed.ranks import run_ranks

from fpt_fast.distributed import World, open_world, refuse_several


def collect() -> None:
    """Everything that ranks say to each other, twice: worlds are opened one after another."""
    for _ in range(2):
        with open_world(patience=60) as world:
            me = world.rank
            world.meet("at the start")
            parts = world.gather(torch.full((me * 2, 3), float(me)))
            assert [tuple(part.shape) for part in parts] == [(0, 3), (2, 3)]
            assert parts[1].unique().tolist() == [1.0]
            assert world.sum(torch.tensor([1.0, 10.0 * me])).tolist() == [2.0, 10.0]
            mine = torch.tensor(list(world.share(5)))
            assert world.gather_shares(mine, 5).tolist() == [0, 1, 2, 3, 4]
            assert world.gather_shares(mine[:0], 0).tolist() == []
            assert world.gather_text("é" * me) == ["", "é"]
            assert [world.any(me == asked) for asked in (0, 1, 2)] == [True, True, False]
            assert world.bytes_of_first(b"" if world.is_first else None) == b""
            assert world.bytes_of_first(None) is None
            strided = torch.full((2, 3), me, dtype=torch.uint16).T
            world.copy_first([strided])
            assert strided.int().sum() == 0
            whole = torch.full((5, 2), -1, dtype=torch.int16)
            for row in world.share(5):
                whole[row] = row
            world.fill_shares(whole)
            assert whole[:, 1].tolist() == [0, 1, 2, 3, 4]
            world.require_same("one text", "settings")
            with pytest.raises(ValueError, match="the same settings, got another on rank 1"):
                world.require_same(f"of rank {me}", "settings")


def lose(how: str) -> None:
    """Rank 1 dies or fails after the start."""
    with open_world() as world:
        world.meet("at the start")
        if world.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("the data are not there")
        world.meet("after 7 images")


def test_gather_sum_and_shares() -> None:
    for rank in run_ranks(collect):
        assert rank.status == 0, rank.output


def test_a_lost_rank_is_named() -> None:
    first, second, third = run_ranks(lose, "killed", size=3)
    assert second.status == -signal.SIGKILL
    for rank in (first, third):
        assert rank.status == FAILED and rank.seconds < 20
        line = rank.output.splitlines()[-1]
        assert "LostRank: rank 1 was lost after 7 images, of 3" in line and "again" in line


def test_a_rank_that_fails_tells_the_others_why() -> None:
    first, second = run_ranks(lose, "failed")
    assert (first.status, second.status) == (FAILED, FAILED)
    assert "LostRank: rank 1 of 2 ended with: the data are not there; then" in first.output


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


def test_work_of_one_process_is_refused_to_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    refuse_several("a sweep")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"a sweep is the work of one process.* without torchrun"):
        refuse_several("a sweep")
