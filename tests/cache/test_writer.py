"""Building: what is refused, what survives an error, what a second run does again."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cache.samples import FINGERPRINT, LAYOUT, all_bytes, build_cache, flip, keys, tokens

from fpt_fast.cache import (
    CacheBusy,
    CacheCorrupt,
    CacheFull,
    CacheMismatch,
    CacheReader,
    CacheUnfinished,
    CacheWriter,
    FeatureValueError,
    RecordLayout,
    inspect_cache,
    verify_cache,
)
from fpt_fast.records import SelectedTokens


def open_writer(path: Path, count: int = 6, **settings: Any) -> CacheWriter:
    return CacheWriter(path, LAYOUT, FINGERPRINT, keys(count), **settings)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_kv_is_stored_as_f16(tmp_path: Path, dtype: torch.dtype) -> None:
    kv, index = tokens(range(3)).kv.to(dtype), tokens(range(3)).index
    with open_writer(tmp_path, 3) as writer:
        writer.write([2, 0, 1], SelectedTokens(kv, index))
        writer.finish()
    with CacheReader(tmp_path) as reader:
        back = reader.read([2, 0, 1])
    assert back.kv.dtype == torch.float16
    assert torch.equal(back.kv, kv.half())
    assert torch.equal(back.index, index)


def test_tensors_need_not_be_contiguous(tmp_path: Path) -> None:
    want = tokens(range(2))
    kv = want.kv.transpose(3, 4).contiguous().transpose(3, 4)
    with open_writer(tmp_path, 2) as writer:
        writer.write(range(2), SelectedTokens(kv, want.index.flip(0).flip(0)))
        writer.finish()
    with CacheReader(tmp_path) as reader:
        assert torch.equal(reader.read([0, 1]).kv, want.kv)


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (float("nan"), torch.float16, "1 NaN or infinite values"),
        (float("-inf"), torch.bfloat16, "1 NaN or infinite values"),
        (65520.0, torch.float32, "reach 6.552e[+]04, and f16 ends at 65504"),
        (1e30, torch.bfloat16, "f16 ends at 65504"),
    ],
)
def test_values_that_f16_cannot_hold(
    tmp_path: Path, value: float, dtype: torch.dtype, message: str
) -> None:
    bad = SelectedTokens(tokens(range(3)).kv.to(dtype), tokens(range(3)).index)
    bad.kv[1, 1, 0, 2, 3, 1] = value
    with open_writer(tmp_path) as writer:
        # Layer 7: the fingerprint names the extracted layers.
        with pytest.raises(FeatureValueError, match=rf"'class_1/image 0.png', layer 7.*{message}"):
            writer.write(range(3), bad)
        assert writer.pending == [0, 1, 2, 3, 4, 5]
        writer.write([0], tokens([0]))
    assert inspect_cache(tmp_path).done == 1


def test_largest_f16_is_fine(tmp_path: Path) -> None:
    edge = SelectedTokens(tokens([0]).kv.float(), tokens([0]).index)
    edge.kv[0, 0, 0, 0, 0, 0] = -65504.0
    with open_writer(tmp_path, 1) as writer:
        writer.write([0], edge)
        assert writer.pending == []


def test_write_checks_its_arguments(tmp_path: Path) -> None:
    good = tokens(range(2))
    with open_writer(tmp_path) as writer:
        for positions, given, message in [
            ([0, 6], good, "positions must be 0 to 5"),
            ([-1, 0], good, "positions must be 0 to 5"),
            ([1, 1], good, "must not repeat"),
            ([0, 1, 2], good, r"kv must be .*\(3, 2, 2, 3, 5, 4\)"),
            ([0, 1], SelectedTokens(good.kv.int(), good.index), "got .* of torch.int32"),
            ([0, 1], SelectedTokens(good.kv, good.index.long()), "index must be .*int32"),
            ([0, 1], SelectedTokens(good.kv, good.index[:, :1]), "index must be"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write(positions, given)
        assert writer.pending == list(range(6))
    with pytest.raises(ValueError, match="is closed"):
        writer.write([0], tokens([0]))
    with pytest.raises(ValueError, match="is closed"):
        writer.finish()
    for setting in ("records_per_shard", "sync_every"):
        with pytest.raises(ValueError, match=f"{setting} must be at least 1"):
            open_writer(tmp_path / "x", **{setting: 0})


def test_leaving_the_block_keeps_what_was_written(tmp_path: Path) -> None:
    expected = all_bytes(build_cache(tmp_path / "one go", records_per_shard=4))
    path = tmp_path / "c"
    with pytest.raises(RuntimeError, match="stop"), open_writer(path, records_per_shard=4) as w:
        w.write([0, 1], tokens([0, 1]))
        raise RuntimeError("stop")
    with pytest.raises(CacheUnfinished, match="2 of 6 records; run preload again to resume"):
        CacheReader(path)
    with open_writer(path) as writer:
        assert writer.pending == [2, 3, 4, 5]
        assert writer.is_done(1)
        assert not writer.is_done(2)
        with pytest.raises(CacheUnfinished, match="4 of 6 records are missing"):
            writer.finish()
        # The caller keeps its grid of batches: done records in a batch are left alone.
        writer.write([1, 2], tokens([1, 2]))
        writer.write([3, 4, 5], tokens([3, 4, 5]))
        writer.write([3], tokens([99]))
        writer.finish()
    assert all_bytes(path) == expected


def test_opening_a_finished_cache_changes_nothing(tmp_path: Path) -> None:
    before = all_bytes(build_cache(tmp_path))
    with open_writer(tmp_path, 4) as writer:  # fewer keys than it has
        assert writer.pending == []
        writer.write([0], tokens([0]))
        writer.finish()
    assert all_bytes(tmp_path) == before


def test_extension_equals_one_go(tmp_path: Path) -> None:
    expected = all_bytes(build_cache(tmp_path / "one go", 9, records_per_shard=4))
    path = build_cache(tmp_path / "c", 6, records_per_shard=4)
    # New images may come anywhere in the list: rows go by the order in which they came to be.
    order = [7, 0, 8, 5, 6, 1, 2, 3, 4]
    wanted = [keys(9)[i] for i in [6, 0, 7, 5, 8, 1, 2, 3, 4]]
    with CacheWriter(path, LAYOUT, FINGERPRINT, wanted) as writer:
        assert writer.pending == [0, 2, 4]
        with pytest.raises(CacheUnfinished):
            CacheReader(path)
        writer.write([0, 1, 2, 3, 4], tokens([6, 0, 7, 5, 8]))
        writer.finish()
    assert all_bytes(path) == expected
    with CacheReader(path) as reader:
        rows = [reader.row(key) for key in wanted]
        assert rows == [6, 0, 7, 5, 8, 1, 2, 3, 4]
        assert torch.equal(reader.read(order).kv, tokens(order).kv)


def test_unfinished_build_is_extended_but_never_orphaned(tmp_path: Path) -> None:
    with open_writer(tmp_path, 4) as writer:
        writer.write([0, 3], tokens([0, 3]))
    with pytest.raises(CacheMismatch, match=r"1 images of the unfinished build.*'class_1/image 0"):
        CacheWriter(tmp_path, LAYOUT, FINGERPRINT, [keys(4)[i] for i in (0, 2, 3)])
    with open_writer(tmp_path, 6) as writer:
        assert writer.pending == [1, 2, 4, 5]
        writer.write([1, 2, 4, 5], tokens([1, 2, 4, 5]))
        writer.finish()
    assert all_bytes(tmp_path) == all_bytes(build_cache(tmp_path.with_name("one go"), 6))


@pytest.mark.parametrize("finished", [True, False])
def test_mismatch_lists_every_field(tmp_path: Path, finished: bool) -> None:
    if finished:
        build_cache(tmp_path, records_per_shard=4)
    else:
        open_writer(tmp_path, records_per_shard=4).close()
    before = all_bytes(tmp_path)
    other = {**FINGERPRINT, "token_ratio": 0.3, "size": {"height": 64}, "mean": [0.5]}
    with pytest.raises(CacheMismatch) as caught:
        CacheWriter(tmp_path, replace(LAYOUT, kept=6), other, keys(6), records_per_shard=5)
    for line in (
        "token_ratio: the cache has 0.2, asked for 0.3",
        "size.height: the cache has 32, asked for 64",
        "mean: the cache has (absent), asked for [0.5]",
        "layout.kept: the cache has 5, asked for 6",
        "records_per_shard: the cache has 4, asked for 5",
        "use another --cache directory",
    ):
        assert line in str(caught.value)
    assert "backbone" not in str(caught.value)
    assert {k: v for k, v in all_bytes(tmp_path).items() if k != "lock"} == before


def test_two_builders(tmp_path: Path) -> None:
    with open_writer(tmp_path):
        with pytest.raises(CacheBusy, match=f"being built by process {os.getpid()} on "):
            open_writer(tmp_path)
        assert inspect_cache(tmp_path).state == "unfinished"
    with open_writer(tmp_path) as again:
        assert again.pending == list(range(6))


def test_lock_file_of_a_dead_builder_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "lock").write_text("123 gone\n")
    build_cache(tmp_path)
    assert not (tmp_path / "lock").exists()
    (tmp_path / "lock").write_text("123 gone\n")
    open_writer(tmp_path).close()
    assert not (tmp_path / "lock").exists()


def test_records_lost_from_the_disk_are_done_again(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(range(4), tokens(range(4)))
    flip(tmp_path / "shard-00000.partial", 4096 + 2 * LAYOUT.record_bytes + 9)
    with (tmp_path / "journal.fpt").open("ab") as journal:
        journal.write(b"torn")
    with open_writer(tmp_path) as writer:
        assert writer.pending == [2, 4, 5]
        writer.write([2, 4, 5], tokens([2, 4, 5]))
        writer.finish()
    assert verify_cache(tmp_path).ok


def test_journal_lost(tmp_path: Path) -> None:
    with open_writer(tmp_path) as writer:
        writer.write(range(4), tokens(range(4)))
    (tmp_path / "journal.fpt").unlink()
    with open_writer(tmp_path) as writer:
        assert writer.pending == list(range(6))


def test_shards_without_a_manifest_are_not_overwritten(tmp_path: Path) -> None:
    build_cache(tmp_path)
    (tmp_path / "manifest.fpt").unlink()
    before = all_bytes(tmp_path)
    with pytest.raises(CacheCorrupt, match=r"manifest.fpt: is missing, but .* is there.*repair"):
        open_writer(tmp_path)
    assert all_bytes(tmp_path) == before


def test_damaged_shard_of_a_finished_cache_is_not_reused(tmp_path: Path) -> None:
    build_cache(tmp_path)
    os.truncate(tmp_path / "shard-00000.fpt", 5000)
    with pytest.raises(CacheCorrupt, match="has 5000 bytes, the manifest says.*cache repair"):
        open_writer(tmp_path)


def failing(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException, after: int) -> None:
    """``os.<name>`` works ``after`` times, and then raises."""
    original, calls = getattr(os, name), 0

    def call(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > after:
            raise error
        return original(*args)

    monkeypatch.setattr(os, name, call)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("name", ["pwrite", "fdatasync", "fsync"])
def test_full_disk_at_any_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    expected = all_bytes(build_cache(tmp_path / "one go"))
    path, full = tmp_path / "c", 0
    for after in range(100):
        with monkeypatch.context() as patch:
            failing(patch, name, OSError(code, os.strerror(code)), after)
            try:
                with open_writer(path) as writer:
                    for first in (0, 2, 4):
                        cell = range(first, first + 2)
                        writer.write(cell, tokens(cell))
                    writer.finish()
                break
            except CacheFull as error:
                full += 1
                assert error.errno == code
                assert "needs" in str(error)
                assert "are free" in str(error)
                assert "resume" in str(error)
    assert full >= 3
    assert all_bytes(path) == expected


def test_finish_can_be_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = all_bytes(build_cache(tmp_path / "one go", records_per_shard=4))
    path, full, done = tmp_path / "c", 0, False
    with open_writer(path, records_per_shard=4, sync_every=100) as writer:
        writer.write(range(6), tokens(range(6)))
        while not done:
            with monkeypatch.context() as patch:
                failing(patch, "fsync", OSError(errno.ENOSPC, "full"), full)
                try:
                    writer.finish()
                    done = True
                except CacheFull:
                    full += 1
    assert full >= 4
    assert all_bytes(path) == expected


def test_no_room_is_said_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", no_room)
        with pytest.raises(CacheFull, match=r"the disk is full: needs 28.7 kB, .* 0 of 6 records"):
            open_writer(tmp_path)
    with open_writer(tmp_path) as writer:
        writer.write(range(6), tokens(range(6)))
        writer.finish()


def test_file_systems_without_preallocation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    expected = all_bytes(build_cache(tmp_path / "one go"))
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    assert all_bytes(build_cache(tmp_path / "c")) == expected


@contextmanager
def file_size_limit(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (count, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_file_size_limit_of_the_kernel(tmp_path: Path) -> None:
    small = file_size_limit(4096 + 3 * LAYOUT.record_bytes)
    with small, pytest.raises(CacheFull, match="file size limit"):
        open_writer(tmp_path)
    with open_writer(tmp_path) as writer:
        assert writer.pending == list(range(6))
        with file_size_limit(4096 + 2 * LAYOUT.record_bytes):
            writer.write([0, 1], tokens([0, 1]))
            with pytest.raises(CacheFull, match="2 of 6 records are safe"):
                writer.write([1, 2], tokens([1, 2]))
        assert writer.pending == [2, 3, 4, 5]
        writer.write([2, 3, 4, 5], tokens([2, 3, 4, 5]))
        writer.finish()
    assert verify_cache(tmp_path).ok


@pytest.mark.parametrize("name", ["pwrite", "fdatasync"])
def test_interrupt_anywhere_in_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    expected = all_bytes(build_cache(tmp_path / "one go"))
    for after in range(4):
        path = tmp_path / f"c{after}"
        with open_writer(path) as writer:
            writer.write([0, 1], tokens([0, 1]))
            with monkeypatch.context() as patch:
                failing(patch, name, KeyboardInterrupt(), after)
                try:
                    writer.write([2, 3, 4], tokens([2, 3, 4]))
                except KeyboardInterrupt:
                    assert writer.pending == [2, 3, 4, 5]
            # Going on in the same process works as well as coming back.
            if after % 2:
                writer.write([2], tokens([2]))
        with open_writer(path) as writer:
            assert not {0, 1}.intersection(writer.pending)
            writer.write(range(6), tokens(range(6)))
            writer.finish()
        assert all_bytes(path) == expected


def test_sync_every(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    original = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda fd: (calls.append(fd), original(fd))[1])
    counts = []
    with open_writer(tmp_path, 6, sync_every=2) as writer:
        for position in range(5):
            calls.clear()
            writer.write([position], tokens([position]))
            counts.append(len(calls))
            # In the journal at once, so that the death of the process costs nothing.
            assert inspect_cache(tmp_path).done == position + 1
        calls.clear()
    counts.append(len(calls))
    assert counts == [0, 2, 0, 2, 0, 2]
    with open_writer(tmp_path, 6) as writer:
        assert writer.pending == [5]


def test_default_is_one_shard_for_a_small_data_set(tmp_path: Path) -> None:
    build_cache(tmp_path, 20)
    assert inspect_cache(tmp_path).shards == 1


def test_records_without_padding(tmp_path: Path) -> None:
    layout = RecordLayout(layers=4, heads=4, kept=8, head_width=15)
    assert layout.record_bytes == layout.payload_bytes == 2 * 4096
    build_cache(tmp_path, 3, layout=layout)
    with CacheReader(tmp_path, mode="pread") as reader:
        assert torch.equal(reader.read([1]).kv, tokens([1], layout).kv)
    assert verify_cache(tmp_path).ok


def test_notes_are_kept_and_never_compared(tmp_path: Path) -> None:
    names = keys(2)
    with CacheWriter(tmp_path, LAYOUT, FINGERPRINT, names, notes={"source": "here"}) as writer:
        writer.write([0, 1], tokens([0, 1]))
        writer.finish()
    with CacheWriter(tmp_path, LAYOUT, FINGERPRINT, names, notes={"source": "there"}) as writer:
        assert writer.pending == []
        writer.finish()
    with CacheReader(tmp_path) as reader:
        assert reader.notes == {"source": "here"}
    assert inspect_cache(tmp_path).notes == {"source": "here"}
    assert "source: here" in str(inspect_cache(tmp_path))
    with pytest.raises(ValueError, match="notes"):
        CacheWriter(tmp_path / "other", LAYOUT, FINGERPRINT, names, notes={"x": {1, 2}})
