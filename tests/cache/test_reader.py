"""Reading: equal bytes by every way in, and damage that ends in an error, never in features."""

import multiprocessing
import os
import pickle
import threading
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from cache.samples import FINGERPRINT, LAYOUT, all_bytes, build_cache, flip, keys, tokens

from fpt_fast.cache import (
    CacheCorrupt,
    CacheKeyError,
    CacheMismatch,
    CacheNotFound,
    CacheReader,
    reader,
    verify_cache,
)
from fpt_fast.cache.storage import file_system_type, is_network_file_system

MODES = ("mmap", "pread")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return build_cache(tmp_path / "cache")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return build_cache(tmp_path / "sharded", records_per_shard=4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("threads", [1, 3])
def test_read(sharded: Path, mode: Any, verify: bool, threads: int) -> None:
    rows = [5, 0, 3, 3, 4]
    with CacheReader(sharded, mode=mode, verify=verify, threads=threads) as reader:
        back = reader.read(rows)
        assert back.kv.is_contiguous()
        assert back.index.is_contiguous()
        assert torch.equal(back.kv, tokens(rows).kv)
        assert torch.equal(back.index, tokens(rows).index)
        assert torch.equal(reader.read(torch.tensor([2])).kv, tokens([2]).kv)
        empty = reader.read([])
        assert empty.kv.shape == (0, *LAYOUT.kv_shape)
        assert empty.index.shape == (0, *LAYOUT.index_shape)


def test_what_is_read_is_a_copy(cache: Path) -> None:
    before = all_bytes(cache)
    with CacheReader(cache) as reader:
        reader.read([1]).kv.zero_()
        assert torch.equal(reader.read([1]).kv, tokens([1]).kv)
    assert all_bytes(cache) == before


def test_description(sharded: Path) -> None:
    with CacheReader(sharded, expect=FINGERPRINT) as reader:
        assert reader.keys == tuple(keys(6))
        assert len(reader) == 6
        assert reader.layout == LAYOUT
        assert reader.fingerprint == {**FINGERPRINT, "layers": [6, 7]}
        assert [reader.row(key) for key in keys(6)] == list(range(6))
        with pytest.raises(CacheKeyError, match=r"no features of 'image 0.png' among its 6") as e:
            reader.row("image 0.png")
        assert isinstance(e.value, KeyError)
        for row in (-1, 6):
            with pytest.raises(IndexError, match=f"rows must be 0 to 5, got {row}"):
                reader.read([row])
    with pytest.raises(ValueError, match="is closed"):
        reader.read([0])
    reader.close()


def test_expected_fingerprint(cache: Path) -> None:
    with pytest.raises(CacheMismatch, match=r"layers: the cache has \[6, 7\], asked for \[5, 6\]"):
        CacheReader(cache, expect={**FINGERPRINT, "layers": [5, 6]})
    with pytest.raises(CacheMismatch, match=r"backbone: the cache has 'tiny', asked for \(absent"):
        CacheReader(cache, expect={k: v for k, v in FINGERPRINT.items() if k != "backbone"})


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "offset", [0, LAYOUT.kv_bytes, LAYOUT.payload_bytes, LAYOUT.record_bytes - 1]
)
def test_flipped_byte_of_a_record(sharded: Path, mode: Any, threads: int, offset: int) -> None:
    flip(sharded / "shard-00001.fpt", 4096 + LAYOUT.record_bytes + offset)
    with CacheReader(sharded, mode=mode, threads=threads) as reader:
        reader.read([0, 1, 2, 3, 4])
        with pytest.raises(
            CacheCorrupt, match=r"shard-00001.fpt.*'class_1/image 2.png'.*row 5.*cache repair"
        ):
            reader.read([4, 5])
    with CacheReader(sharded, mode=mode, verify=False) as reader:
        reader.read([5])


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4096 + LAYOUT.record_bytes - 1])
def test_truncated_shard(cache: Path, size: int) -> None:
    os.truncate(cache / "shard-00000.fpt", size)
    with pytest.raises(CacheCorrupt, match=f"shard-00000.fpt: has {size} bytes.*cache repair"):
        CacheReader(cache)


@pytest.mark.parametrize("mode", MODES)
def test_shard_truncated_while_open(cache: Path, mode: Any) -> None:
    with CacheReader(cache, mode=mode) as reader:
        os.truncate(cache / "shard-00000.fpt", 4096 + LAYOUT.record_bytes)
        with pytest.raises(CacheCorrupt, match="was opened with"):
            reader.read([4])
        with pytest.raises(CacheCorrupt, match="was opened with"):
            reader.read([0])


def test_other_shards(cache: Path, sharded: Path, tmp_path: Path) -> None:
    shard = sharded / "shard-00001.fpt"
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"\0")
    with pytest.raises(CacheCorrupt, match="the manifest says"):
        CacheReader(sharded)
    flip(sharded / "shard-00000.fpt", 20)
    shard.write_bytes(whole)
    with pytest.raises(CacheCorrupt, match=r"shard-00000.fpt: has a header that is not the one"):
        CacheReader(sharded)
    shard.unlink()
    flip(sharded / "shard-00000.fpt", 20)
    with pytest.raises(CacheCorrupt, match=r"shard-00001.fpt: is missing"):
        CacheReader(sharded)
    # A shard of another cache of this very layout.
    other = build_cache(tmp_path / "other", 8, records_per_shard=4)
    (cache / "shard-00000.fpt").write_bytes((other / "shard-00000.fpt").read_bytes())
    with pytest.raises(CacheCorrupt):
        CacheReader(cache)


@pytest.mark.parametrize("name", ["shard-00000.fpt", "manifest.fpt"])
def test_links_pipes_and_directories(cache: Path, tmp_path: Path, name: str) -> None:
    target = (cache / name).rename(tmp_path / "elsewhere")
    (cache / name).symlink_to(target)
    with pytest.raises(CacheCorrupt, match=f"{name}: is a symbolic link"):
        CacheReader(cache)
    (cache / name).unlink()
    os.mkfifo(cache / name)
    with pytest.raises(CacheCorrupt, match=f"{name}: is not a regular file"):
        CacheReader(cache)
    (cache / name).unlink()
    (cache / name).mkdir()
    with pytest.raises(CacheCorrupt, match=f"{name}: is "):
        CacheReader(cache)


def test_a_cache_may_be_reached_by_a_link(cache: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(cache)
    with CacheReader(tmp_path / "link") as reader:
        assert torch.equal(reader.read([2]).kv, tokens([2]).kv)


def test_no_cache(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFound, match="fpt-fast preload"):
        CacheReader(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        CacheReader(tmp_path)


def test_settings_are_checked(cache: Path) -> None:
    with pytest.raises(ValueError, match="mode must be one of auto, mmap, pread"):
        CacheReader(cache, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads must be at least 1"):
        CacheReader(cache, threads=0)


@pytest.mark.parametrize("mode", MODES)
def test_pickle(sharded: Path, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(sharded.parent)
    with CacheReader(sharded.name, mode=mode, threads=2, expect=FINGERPRINT) as reader:
        data = pickle.dumps(reader)
        monkeypatch.chdir("/")
        with pickle.loads(data) as copy:
            assert copy.mode == mode
            assert torch.equal(copy.read([1, 5]).kv, reader.read([1, 5]).kv)


def _read_in_child(reader: CacheReader, results: Any) -> None:
    results.put([reader.read([row]).kv.numpy() for row in range(6)])


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("mode", MODES)
def test_fork(sharded: Path, mode: Any) -> None:
    context = multiprocessing.get_context("fork")
    with CacheReader(sharded, mode=mode, threads=2) as reader:
        reader.read([0, 5])  # so that its threads, which a fork does not copy, are there
        results = context.SimpleQueue()
        child = context.Process(target=_read_in_child, args=(reader, results))
        child.start()
        for row in (5, 4, 3):
            assert torch.equal(reader.read([row]).kv, tokens([row]).kv)
        assert np.array_equal(np.concatenate(results.get()), tokens(range(6)).kv.numpy())
        child.join()
        assert child.exitcode == 0
        assert torch.equal(reader.read([1]).kv, tokens([1]).kv)


@pytest.mark.parametrize("mode", MODES)
def test_many_threads(sharded: Path, mode: Any) -> None:
    wrong: list[int] = []
    expected = tokens(range(6)).kv

    def work(seed: int) -> None:
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed)).tolist()
        for _ in range(20):
            if not torch.equal(reader.read(order).kv, expected[order]):
                wrong.append(seed)

    with CacheReader(sharded, mode=mode, threads=2) as reader:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


MOUNTS = r"""
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 22 0:25 / /data rw - nfs4 server:/export rw
31 22 0:26 / /data/fast rw - tmpfs tmpfs rw
32 22 0:27 / /my\040disk rw master:3 - fuse.sshfs host:/ rw
33 22 0:28 / /twice rw - ext4 /dev/vdb rw
34 33 0:29 / /twice rw - lustre mgs:/fs rw
a line that is none
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me", "ext4"),
        ("/data", "nfs4"),
        ("/data/a/b", "nfs4"),
        ("/data/fast/a", "tmpfs"),
        ("/database", "ext4"),
        ("/my disk/x", "fuse.sshfs"),
        ("/twice/x", "lustre"),
    ],
)
def test_file_system_type(tmp_path: Path, path: str, kind: str) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS)
    assert file_system_type(Path(path), mounts) == kind
    assert file_system_type(Path(path), tmp_path / "none") == ""


@pytest.mark.parametrize(
    ("kind", "mode"),
    [("ext4", "mmap"), ("xfs", "mmap"), ("nfs4", "pread"), ("fuse.sshfs", "pread"), ("", "mmap")],
)
def test_auto_mode(cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str, mode: str) -> None:
    monkeypatch.setattr("fpt_fast.cache.storage.file_system_type", lambda path: kind)
    assert is_network_file_system(cache) == (mode == "pread")
    with CacheReader(cache) as reader:
        assert reader.mode == mode


def test_verified_by_default_even_after_repairable_damage(cache: Path) -> None:
    flip(cache / "manifest-copy.fpt", 40)
    with CacheReader(cache) as reader:  # the copy is for repairs only
        reader.read(range(6))
    assert not verify_cache(cache).ok


def test_a_build_that_begins_meanwhile_is_no_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The builder's first shard appears between a reader's look for a plan and its next one."""
    path = tmp_path / "cache"
    path.mkdir()

    def look(file: Path, kind: str) -> NoReturn:
        if kind == "plan":
            (path / "shard-00000.partial").write_bytes(b"")
        raise FileNotFoundError(file)

    monkeypatch.setattr(reader, "read_manifest", look)
    monkeypatch.setattr(reader, "_LOOKS", 1)
    with pytest.raises(CacheNotFound):
        CacheReader(path)
    with pytest.raises(CacheCorrupt, match="is missing"):
        CacheReader(path)
