"""The write protocol where the disk fails, or where somebody looks in the middle of it."""

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cache.samples import FINGERPRINT, LAYOUT, all_bytes, build_cache, flip, keys, tokens

from fpt_fast.cache import (
    CacheCorrupt,
    CacheReader,
    CacheUnfinished,
    CacheWriter,
    inspect_cache,
    verify_cache,
)
from fpt_fast.cache.format import read_manifest
from fpt_fast.cache.shards import open_shard


def open_writer(path: Path, count: int = 6, **settings: Any) -> CacheWriter:
    return CacheWriter(path, LAYOUT, FINGERPRINT, keys(count), **settings)


def calls(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[tuple[str, str]]:
    """(call, file's name) of each call of ``os.<name>`` from now on."""
    seen: list[tuple[str, str]] = []
    for name in names:
        original = getattr(os, name)

        def call(*args: Any, name: str = name, original: Callable[..., Any] = original) -> Any:
            target = args[-1] if name == "replace" else args[0]
            if isinstance(target, int):
                target = Path(f"/proc/self/fd/{target}").readlink()
            seen.append((name, Path(target).name))
            return original(*args)

        monkeypatch.setattr(os, name, call)
    return seen


def test_the_copy_is_durable_before_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_writer(tmp_path / "cache") as writer:
        writer.write(range(6), tokens(range(6)))
        seen = calls(monkeypatch, "replace", "fsync")
        writer.finish()
    # Else a power loss could leave a finished cache without the copy that repairs it.
    copy = seen.index(("replace", "manifest-copy.fpt"))
    assert seen[copy : copy + 4] == [
        ("replace", "manifest-copy.fpt"),
        ("fsync", "cache"),
        ("replace", "manifest.fpt"),
        ("fsync", "cache"),
    ]


def test_headers_are_written_again_on_resuming(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_writer(tmp_path).close()
    seen = calls(monkeypatch, "pwrite", "fsync")
    open_writer(tmp_path).close()
    # If the sync of the first run failed, the bytes that a look would find are in memory alone.
    assert ("pwrite", "shard-00000.partial") in seen
    assert ("fsync", "shard-00000.partial") in seen


def test_what_a_failed_sync_may_have_lost_is_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_writer(tmp_path, sync_every=3) as writer:
        writer.write([0], tokens([0]))
        writer.write([1], tokens([1]))
        assert inspect_cache(tmp_path).done == 2
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError, match=r"shard-00000.partial"):
                writer.write([2], tokens([2]))
        assert writer.pending == list(range(6))
        assert inspect_cache(tmp_path).done == 0
        writer.write([0], tokens([0]))
    with open_writer(tmp_path) as writer:
        assert writer.pending == list(range(1, 6))


@pytest.mark.parametrize("name", ["pwrite", "fsync", "fdatasync", "posix_fallocate", "ftruncate"])
def test_errors_of_the_disk_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def fail(*args: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, name, fail)
    with (
        pytest.raises(OSError, match=f"Input/output error: '{tmp_path}"),
        open_writer(tmp_path) as writer,
    ):
        writer.write([0], tokens([0]))


def test_every_directory_on_the_way_is_made_durably(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = calls(monkeypatch, "fsync")
    open_writer(tmp_path / "a" / "b" / "c").close()
    assert [name for _, name in seen[:3]] == [tmp_path.name, "a", "b"]


def test_a_file_that_the_disk_fails_to_show_is_not_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = all_bytes(build_cache(tmp_path / "one go"))
    path, original = tmp_path / "cache", os.stat

    def fail(file: Any, **how: Any) -> Any:
        if not isinstance(file, int) and Path(file).name == "shard-00000.partial":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(file))
        return original(file, **how)

    with open_writer(path) as writer:
        writer.write(range(6), tokens(range(6)))
        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", fail)
            patch.setattr(os, "lstat", lambda file: fail(file, follow_symlinks=False))
            with pytest.raises(OSError, match=r"shard-00000.partial"):
                writer.finish()
        writer.finish()
    assert all_bytes(path) == expected


def test_a_lock_that_fails_half_way_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(left: Any, right: Any) -> bool:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patch:
        patch.setattr(os.path, "samestat", fail)
        with pytest.raises(OSError, match=f"{tmp_path}/lock"):
            open_writer(tmp_path)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    open_writer(tmp_path).close()


def test_killed_between_shards_and_manifest(tmp_path: Path) -> None:
    with open_writer(tmp_path, records_per_shard=4) as writer:
        writer.write(range(6), tokens(range(6)))
    (tmp_path / "shard-00000.partial").rename(tmp_path / "shard-00000.fpt")
    assert verify_cache(tmp_path).ok
    flip(tmp_path / "shard-00000.fpt", 4096 + 7)
    assert verify_cache(tmp_path).bad_keys == (keys(6)[0],)


def test_opening_a_cache_that_is_being_extended(tmp_path: Path) -> None:
    manifest = read_manifest(build_cache(tmp_path) / "manifest.fpt", "manifest")
    with open_writer(tmp_path, 8):
        # What a reader meets that read the manifest just before it was removed.
        with pytest.raises(CacheUnfinished, match="changed while it was being opened"):
            open_shard(tmp_path, manifest, 0)
        with pytest.raises(CacheUnfinished, match="6 of 8 records"):
            CacheReader(tmp_path)
    (tmp_path / "plan.fpt").unlink()
    with pytest.raises(CacheCorrupt, match="is missing"):
        open_shard(tmp_path, manifest, 0)


def test_opening_while_a_build_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_cache(tmp_path)
    looks, original = [], read_manifest

    def late(file: Path, kind: Any) -> Any:
        looks.append(file.name)
        if len(looks) == 1:  # the manifest is not there yet; at the next look the plan is gone
            raise FileNotFoundError(file)
        return original(file, kind)

    monkeypatch.setattr("fpt_fast.cache.reader.read_manifest", late)
    with CacheReader(tmp_path) as reader:
        assert len(reader) == 6
    assert looks[:2] == ["manifest.fpt", "plan.fpt"]
