"""Copies of records: in C++ and in Python, from files, past the page cache and from a map."""

import errno
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from cache.samples import DTYPES, LAYOUT, LAYOUTS, assert_tokens_equal, build_cache, flip, tokens
from torch import Tensor

from fpt_fast.cache import CacheCorrupt, CacheReader, RecordLayout
from fpt_fast.cache import fetch as fetching
from fpt_fast.cache.memory import BufferPool, allocate_tokens, memory_limit, token_bytes
from fpt_fast.cache.reader import open_manifest
from fpt_fast.cache.sources import Sources
from fpt_fast.ops.native_reasons import native_levels
from fpt_fast.ops.native_records import can_read_records, read_records

# tests/test_native.py sees to it that the extension is there where a compiler is.
NATIVE = can_read_records()
WAYS = ("python", "native") if NATIVE else ("python",)
LEVELS = native_levels().split(", ") if NATIVE else []
RECORD = 3 * 2**20 + 4096  # several chunks, and a rest


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every reader of the test reads in this way."""
    chosen: str = request.param
    monkeypatch.setattr(fetching, "can_read_records", lambda: chosen == "native")
    return chosen


@contextmanager
def opened(path: Path, flags: int = 0) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | flags)
    try:
        yield fd
    finally:
        os.close(fd)


def empty_parts(images: int, *sizes: int) -> list[Tensor]:
    return [torch.zeros(images, size, dtype=torch.uint8) for size in sizes]


def read(places: list[tuple[int, int, int]], parts: list[Tensor], record: int, **how: Any) -> Any:
    settings = {"mapped": torch.empty(0, dtype=torch.uint8), "digests": True, "threads": 2, **how}
    mapped = settings.pop("mapped")
    return read_records(torch.tensor(places), mapped, *parts, record_bytes=record, **settings)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("record", [4096, 8192, 5 * 4096, RECORD])
@pytest.mark.parametrize("kind", ["file", "direct", "map"])
def test_parts_and_digests_of_the_extension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: str, record: int, kind: str
) -> None:
    monkeypatch.setenv("FPT_NATIVE_LEVEL", level)
    data = np.random.default_rng(0).integers(0, 256, (3, record), np.uint8)
    (tmp_path / "f").write_bytes(data.tobytes())
    # kv is no multiple of 4, so that there is a gap behind it.
    sizes = (record - 2001, 300, 0, 404)
    offsets = (0, record - 2000, record - 1700, record - 1700)
    parts = empty_parts(4, *sizes)
    rows = [2, 0, 1, 2]
    with opened(tmp_path / "f", os.O_DIRECT if kind == "direct" else 0) as fd:
        number = ("file", "direct", "map").index(kind)
        places = [(-1 if kind == "map" else fd, row * record, number) for row in rows]
        mapped = torch.from_numpy(data).view(-1)
        counts, digests = read(places, parts, record, mapped=mapped)
    assert counts.tolist() == [record] * 4
    for image, row in enumerate(rows):
        assert digests[image].numpy().tobytes() == xxhash.xxh3_128_digest(data[row].tobytes())
        for part, offset in zip(parts, offsets, strict=True):
            expected = data[row, offset : offset + part.shape[1]]
            assert np.array_equal(part[image].numpy(), expected)


@pytest.mark.parametrize("short", [0, 1, 4096, 2**20, RECORD - 1])
def test_a_file_that_ends(tmp_path: Path, way: str, short: int) -> None:
    """The count says where; nothing is said to have a digest."""
    (tmp_path / "f").write_bytes(bytes(RECORD + short))
    layout = RecordLayout(layers=1, heads=1, kept=1, head_width=RECORD // 4 - 1)
    assert layout.record_bytes == RECORD
    fetch = fetching.make_fetch(layout, 1)
    assert fetch.native == (way == "native")
    with opened(tmp_path / "f") as fd:
        places = [fetching.Place(fd, 0), fetching.Place(fd, RECORD)]
        whole, cut = fetch(places, allocate_tokens(layout, 2), digests=True)
    assert (whole.count, len(whole.digest)) == (RECORD, 16)
    assert (cut.count, cut.digest) == (short, b"")
    fetch.close()


def test_a_disk_error_names_the_file(tmp_path: Path, way: str) -> None:
    """A directory opens like a file, and cannot be read."""
    fetch = fetching.make_fetch(LAYOUT, 1)
    with opened(tmp_path) as fd, pytest.raises(OSError, match=tmp_path.name) as error:
        fetch([fetching.Place(fd, 0)], allocate_tokens(LAYOUT, 1), digests=True)
    assert error.value.errno == errno.EISDIR


@pytest.mark.parametrize("level", LEVELS[:1])
def test_what_the_extension_refuses(level: str) -> None:
    places, parts = [(0, 0, 0)], empty_parts(1, 100, 0, 0, 8)
    for message, change in [
        (r"kv must be \(1, -1\)", {"parts": empty_parts(2, 100, 0, 0, 8)}),
        ("kv must be uint8", {"parts": [parts[0].short(), *parts[1:]]}),
        ("record_bytes must be a multiple of 4096, got 100", {"record": 100}),
        ("parts of a record have 5008 bytes", {"parts": empty_parts(1, 5000, 0, 0, 8)}),
        ("threads must be in 1..1024, got 0", {"threads": 0}),
        ("places must lie in mapped, of 0 bytes, got a record at 4096", {"places": [(0, 4096, 2)]}),
        ("places must lie in mapped", {"places": [(0, -1, 2)]}),
    ]:
        given = {"places": places, "parts": parts, "record": 4096, **change}
        with pytest.raises(RuntimeError, match=message):
            read(given.pop("places"), given.pop("parts"), given.pop("record"), **given)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("resident", [0, 2, 6])
def test_both_ways_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, dtype: str, mode: Any, resident: int
) -> None:
    layout = LAYOUTS[dtype]
    path = build_cache(tmp_path / "c", records_per_shard=4, layout=layout)
    limit = 2 * resident * layout.record_bytes
    monkeypatch.setattr("fpt_fast.cache.reader.memory_limit", lambda: limit)
    with CacheReader(path, mode=mode, threads=2) as reader:
        for rows in ([5, 0, 3, 3], [0, 1, 2, 3, 4, 5], [5, 4, 3]):  # again, now from memory
            reader.announce(rows)
            assert_tokens_equal(reader.read(rows), tokens(rows, layout))


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("resident", [0, 6])
def test_damage_is_found_at_every_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, mode: Any, resident: int
) -> None:
    path = build_cache(tmp_path / "c", records_per_shard=4)
    limit = 2 * resident * LAYOUT.record_bytes
    monkeypatch.setattr("fpt_fast.cache.reader.memory_limit", lambda: limit)
    with CacheReader(path, mode=mode) as reader:
        for _ in range(3):
            reader.read([4, 5])
        flip(path / "shard-00001.fpt", 4096 + LAYOUT.record_bytes + 9)
        with pytest.raises(CacheCorrupt, match=r"shard-00001.fpt.*row 5"):
            reader.read([4, 5])


@pytest.mark.parametrize("direct", [False, True])
def test_what_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, direct: bool
) -> None:
    path = build_cache(tmp_path / "c", records_per_shard=4)
    manifest, _ = open_manifest(path)
    told: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, n, advice: told.append((at, advice)))
    sources = Sources(path, manifest, resident=2, direct=direct)
    kinds = [sources.place(row).kind for row in range(6)]
    # tmp_path may be on a file system that has no direct reading.
    has_direct = direct and "direct" in kinds
    assert kinds == ["file"] * 2 + ["direct" if has_direct else "file"] * 4
    sources.announce([0, 5])
    sources.announce([5, 0])
    sources.done([0, 5])
    first, last = manifest.locate(0)[1], manifest.locate(5)[1]
    willneed, dontneed = os.POSIX_FADV_WILLNEED, os.POSIX_FADV_DONTNEED
    expected = [(first, willneed), (last, willneed), (last, dontneed)]
    assert told == ([(first, willneed)] if has_direct else expected)
    sources.announce([0])  # read since, and perhaps gone from memory since
    assert told[-1] == (first, willneed)
    sources.close()


def test_a_cache_that_fits_is_announced_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = build_cache(tmp_path / "c")
    told: list[int] = []
    with CacheReader(path, mode="pread") as reader:
        monkeypatch.setattr(os, "posix_fadvise", lambda fd, at, n, advice: told.append(at))
        for _ in range(3):
            reader.read([1, 2])
    assert len(told) == 2


def test_buffers_are_used_again_but_never_shared(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c")
    with CacheReader(path) as reader:
        first = reader.read([0, 1])
        kept = reader.read([2, 3]).kv[1]  # a part of a batch keeps all of its memory
        address = first.kv.data_ptr()
        del first
        gc.collect()
        again = reader.read([4, 5])
        assert again.kv.data_ptr() == address
        assert torch.equal(kept, tokens([3]).kv[0])
        assert torch.equal(again.kv, tokens([4, 5]).kv)


def test_buffer_pool() -> None:
    pool = BufferPool(keep=1)
    one, two = pool.take(100), pool.take(100)
    one[:], two[:] = 1, 2
    assert one.max() == 1 and two.min() == 2
    for size in (30, 1000):  # neither too small nor far too large a buffer is used
        base = pool.take(100).base
        assert pool.take(size).base is not base


def test_out_is_checked(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c", layout=LAYOUTS["int8"])
    layout = LAYOUTS["int8"]
    with CacheReader(path) as reader:
        for out, message in [
            (allocate_tokens(layout, 3), r"out.kv must be \(2, .*got \(3,"),
            (allocate_tokens(LAYOUTS["float16"], 2), "out.kv must be .* of torch.int8"),
        ]:
            with pytest.raises(ValueError, match=message):
                reader.read([0, 1], out=out)
    assert token_bytes(layout, 0) > 0


def test_memory_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    own = tmp_path / "own"
    assert memory_limit(tmp_path, own) <= physical
    group = tmp_path / "a" / "b"
    group.mkdir(parents=True)
    own.write_text("0::/a/b\n1:memory,cpu:/x\n2:cpu:/y\n")
    (group / "memory.max").write_text("max\n")
    (group.parent / "memory.max").write_text("123456789\n")
    assert memory_limit(tmp_path, own) == 123456789
    (tmp_path / "memory" / "x").mkdir(parents=True)
    (tmp_path / "memory" / "x" / "memory.limit_in_bytes").write_text("1000000\n")
    assert memory_limit(tmp_path, own) == 1000000
    monkeypatch.setattr("resource.getrlimit", lambda name: (4096, -1))
    assert memory_limit(tmp_path, own) == 4096
