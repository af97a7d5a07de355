"""Ranks that preload together make the cache of one process, to the byte, whatever befalls."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from cache.samples import FINGERPRINT, LAYOUT, keys, tokens
from children import FAILED, STOPPED
from distributed.rank_work import preload_differently, preload_struck
from distributed.ranks import run_ranks
from small_run import files_of

from fpt_fast.cache import CacheBusy, CacheUnfinished, CacheWriter, inspect_cache
from fpt_fast.cache.encode import RecordMaker
from fpt_fast.cache.helper import HelpingWriter, plan_digest
from fpt_fast.pipeline import PreloadSettings, preload

MakePreload = Callable[..., PreloadSettings]
NEVER = (0, 0, 0)


def test_byte_equal_to_one_process(preload_settings: MakePreload, tmp_path: Path) -> None:
    """Statistics, digests and features are shared out; 8 bits are made by each rank."""
    changes = {"normalization": "auto", "features": "int8"}
    preload(preload_settings(cache=tmp_path / "alone", **changes))
    together = preload_settings(cache=tmp_path / "together", **changes)
    for rank in run_ranks(preload_struck, together, *NEVER):
        assert rank.status == 0, rank.output
    assert files_of(together.cache) == files_of(tmp_path / "alone")
    # Nothing to do: the same call again changes nothing; nor do ranks without a batch of theirs.
    for rank in run_ranks(preload_struck, together, *NEVER):
        assert rank.status == 0, rank.output
    assert files_of(together.cache) == files_of(tmp_path / "alone")


def test_a_lost_rank_is_named_and_the_rest_resumed(
    preload_settings: MakePreload, tmp_path: Path
) -> None:
    preload(preload_settings(cache=tmp_path / "alone"))
    settings = preload_settings()
    # Five batches: two and three.  Each rank is killed in its second.
    first, second = run_ranks(preload_struck, settings, 1, 2, signal.SIGKILL)
    assert (first.status, second.status) == (FAILED, -signal.SIGKILL)
    assert "LostRank: rank 1 was lost writing the cache, of 2" in first.output
    assert first.seconds < 20
    report = inspect_cache(settings.cache)
    assert (report.state, report.done) == ("unfinished", 10)
    # Of three batches that are left, rank 0 is killed in its first: nothing of it is lost.
    first, second = run_ranks(preload_struck, settings, 0, 1, signal.SIGKILL)
    assert (first.status, second.status) == (-signal.SIGKILL, FAILED)
    assert "LostRank: rank 0 of 2 was lost writing the cache" in second.output
    # The third time it is stopped, by a signal to one rank, after a batch of each.
    first, second, third = run_ranks(preload_struck, settings, 2, 1, signal.SIGTERM, size=3)
    assert [rank.status for rank in (first, second, third)] == [STOPPED] * 3
    assert "stopped by SIGTERM" in third.output
    assert "stopped by a signal to another rank; the finished records are kept" in first.output
    preload(settings)
    assert files_of(settings.cache) == files_of(tmp_path / "alone")


def test_ranks_that_were_started_differently_are_refused(preload_settings: MakePreload) -> None:
    settings = preload_settings()
    for rank in run_ranks(preload_differently, settings):
        assert rank.status == FAILED
        assert "must have the same settings, got another on rank 1 than on rank 0" in rank.output
    assert not settings.cache.exists()


def test_an_unreadable_image_is_named_by_every_rank(
    preload_settings: MakePreload, data: Path
) -> None:
    broken = data / "val" / "severe" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    for rank in run_ranks(preload_struck, preload_settings(), *NEVER):
        assert rank.status == FAILED
        assert "1 image cannot be read:\n  val/severe/1.png" in rank.output


def helper_of(path: Path, writer: CacheWriter) -> HelpingWriter:
    maker = RecordMaker(LAYOUT, writer.keys, [6, 7], None)
    rows = {position: writer.rows[position] for position in writer.pending}
    assert writer.owner is not None
    return HelpingWriter(path, maker, rows, writer.owner, plan_digest(path))


def test_a_helper_that_outlives_its_builder_writes_no_more(tmp_path: Path) -> None:
    path = tmp_path / "cache"
    with CacheWriter(path, LAYOUT, FINGERPRINT, keys(4)) as writer:
        helper = helper_of(path, writer)
        writer.write_beside([0], tokens([0]), helper.write([1, 2], tokens([1, 2])))
        assert writer.pending == [3]
    with pytest.raises(CacheBusy, match="no longer built by the process that this one helps"):
        helper.write([3], tokens([3]))
    with CacheWriter(path, LAYOUT, FINGERPRINT, keys(4)) as writer:
        with pytest.raises(CacheBusy, match="no longer built"):
            helper.write([3], tokens([3]))
        assert writer.pending == [3]
        helper_of(path, writer).write([3], tokens([3]))
        # Written, but in no journal: it does not count.
        with pytest.raises(CacheUnfinished):
            writer.finish()
    with CacheWriter(path, LAYOUT, FINGERPRINT, keys(4)) as writer:
        assert writer.pending == [3]
        writer.write([3], tokens([3]))
        writer.finish()
    with CacheWriter(tmp_path / "alone", LAYOUT, FINGERPRINT, keys(4)) as writer:
        writer.write(range(4), tokens(range(4)))
        writer.finish()
    assert files_of(path) == files_of(tmp_path / "alone")


def test_what_a_helper_says_it_wrote_is_checked_at_the_next_opening(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, LAYOUT, FINGERPRINT, keys(2)) as writer:
        writer.write_beside([], None, [(1, b"\x00" * 16)])
        assert writer.pending == [0]
    with CacheWriter(tmp_path, LAYOUT, FINGERPRINT, keys(2)) as writer:
        assert writer.pending == [0, 1]
