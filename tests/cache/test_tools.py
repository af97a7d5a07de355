"""Inspect, verify, repair, forecast: whatever is wrong is found, and mended where it can be."""

import os
import shutil
import tracemalloc
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from cache.samples import FINGERPRINT, LAYOUT, all_bytes, build_cache, flip, keys, tokens

from fpt_fast.cache import (
    CacheBusy,
    CacheCorrupt,
    CacheError,
    CacheNotFound,
    CacheReader,
    CacheUnfinished,
    CacheWriter,
    RecordLayout,
    drop_bad_records,
    forecast,
    inspect_cache,
    verify_cache,
)
from fpt_fast.cache.format import encode_manifest, read_manifest

SHARD = "shard-00000.fpt"


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return build_cache(tmp_path / "cache", records_per_shard=4)


def rebuild(path: Path, expected_pending: list[int]) -> None:
    with CacheWriter(path, LAYOUT, FINGERPRINT, keys(6)) as writer:
        assert writer.pending == expected_pending
        writer.write(expected_pending, tokens(expected_pending)) if expected_pending else None
        writer.finish()


def test_inspect(cache: Path) -> None:
    report = inspect_cache(cache)
    assert report.state == "finished"
    assert (report.records, report.done, report.shards, report.records_per_shard) == (6, 6, 2, 4)
    assert report.layout == LAYOUT
    assert report.fingerprint["layers"] == [6, 7]
    assert report.bytes_on_disk >= sum(len(data) for data in all_bytes(cache).values())
    assert not report.verified
    text = str(report)
    for part in ("finished feature cache", "6 of 6", "token_ratio: 0.2", "3 heads, 5 kept tokens"):
        assert part in text
    assert "problem" not in text


def test_inspect_and_verify_an_unfinished_build(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "part"
    with CacheWriter(path, LAYOUT, FINGERPRINT, keys(6)) as writer:
        writer.write([0, 2, 4], tokens([0, 2, 4]))
    assert (inspect_cache(path).state, inspect_cache(path).done) == ("unfinished", 3)
    assert verify_cache(path).ok
    assert "every byte of what is there is as it was written" in str(verify_cache(path))
    flip(path / "shard-00000.partial", 4096 + 2 * LAYOUT.record_bytes)
    assert verify_cache(path).bad_keys == (keys(6)[2],)
    assert drop_bad_records(path) == [keys(6)[2]]
    assert inspect_cache(path).done == 2
    assert verify_cache(path).ok
    rebuild(path, [1, 2, 3, 5])
    assert verify_cache(path).ok


def test_verify_says_so_when_all_is_well(cache: Path) -> None:
    report = verify_cache(cache)
    assert report.ok
    assert report.verified
    assert "every byte is as it was written" in str(report)


def test_every_flipped_byte_is_found(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "cache", 1)
    assert (path / SHARD).stat().st_size == 2 * 4096
    for file in sorted(path.iterdir()):
        for offset in range(file.stat().st_size):
            flip(file, offset, 1 << offset % 8)
            try:
                found = not verify_cache(path, workers=1).ok
            except CacheError:
                found = True
            flip(file, offset, 1 << offset % 8)
            assert found, f"a flip at byte {offset} of {file.name} goes unseen"
    assert verify_cache(path).ok


def test_bad_records_are_named_and_rebuilt(cache: Path) -> None:
    before = all_bytes(cache)
    flip(cache / SHARD, 4096 + LAYOUT.record_bytes + 3)
    flip(cache / "shard-00001.fpt", -1)
    report = verify_cache(cache)
    assert report.bad_keys == (keys(6)[1], keys(6)[5])
    assert report.problems == ()
    assert "'class_1/image 0.png'" in str(report)
    assert f"cache repair --cache {cache} --backbone BACKBONE --data DATA`" in str(report)
    named = replace(report, notes={**report.notes, "source": "a folder/vit"})
    assert f"cache repair --cache {cache} --backbone 'a folder/vit' --data" in str(named)
    assert drop_bad_records(cache) == [keys(6)[1], keys(6)[5]]
    with pytest.raises(CacheUnfinished, match="4 of 6 records"):
        CacheReader(cache)
    rebuild(cache, [1, 5])
    assert all_bytes(cache) == before


@pytest.mark.parametrize(
    ("size", "bad"),
    [(0, [0, 1, 2, 3]), (4096 + 2 * LAYOUT.record_bytes, [2, 3]), (4096 * 4 + 7, [3]), (-1, [3])],
)
def test_truncated_shard_is_repaired(cache: Path, size: int, bad: list[int]) -> None:
    before = all_bytes(cache)
    os.truncate(cache / SHARD, size if size >= 0 else len(before[SHARD]) + size)
    report = verify_cache(cache)
    assert report.bad_keys == tuple(keys(6)[row] for row in bad)
    assert "the manifest says" in report.problems[0]
    assert drop_bad_records(cache) == list(report.bad_keys)
    rebuild(cache, bad)
    assert all_bytes(cache) == before


@pytest.mark.parametrize("way", ["missing", "link", "pipe"])
def test_missing_shard_is_repaired(cache: Path, tmp_path: Path, way: str) -> None:
    before = all_bytes(cache)
    target = (cache / SHARD).rename(tmp_path / "elsewhere")
    if way == "link":
        (cache / SHARD).symlink_to(target)
    elif way == "pipe":
        os.mkfifo(cache / SHARD)
    assert verify_cache(cache).bad_keys == tuple(keys(6)[:4])
    assert drop_bad_records(cache) == keys(6)[:4]
    rebuild(cache, [0, 1, 2, 3])
    assert all_bytes(cache) == before
    assert target.read_bytes() == before[SHARD]


def test_directory_in_the_place_of_a_shard(cache: Path) -> None:
    (cache / SHARD).unlink()
    (cache / SHARD).mkdir()
    with pytest.raises(CacheCorrupt, match="is a directory; remove it"):
        drop_bad_records(cache)
    (cache / SHARD).rmdir()
    rebuild(cache, [0, 1, 2, 3])


def damage_header(cache: Path) -> None:
    flip(cache / SHARD, 100)


def add_byte(cache: Path) -> None:
    with (cache / SHARD).open("ab") as shard:
        shard.write(b"\0")


def damage_manifest(cache: Path) -> None:
    flip(cache / "manifest.fpt", -40)


def change_version(cache: Path) -> None:
    flip(cache / "manifest.fpt", 8)


def remove_manifest(cache: Path) -> None:
    (cache / "manifest.fpt").unlink()


def link_manifest(cache: Path) -> None:
    shutil.copy(cache / "manifest.fpt", cache.parent / "elsewhere")
    (cache / "manifest.fpt").unlink()
    (cache / "manifest.fpt").symlink_to(cache.parent / "elsewhere")


def damage_copy(cache: Path) -> None:
    flip(cache / "manifest-copy.fpt", 20)


def remove_copy(cache: Path) -> None:
    (cache / "manifest-copy.fpt").unlink()


def leave_plan(cache: Path) -> None:
    (cache / "plan.fpt").write_bytes(b"left over")


@pytest.mark.parametrize(
    "damage",
    [
        damage_header,
        add_byte,
        damage_manifest,
        change_version,
        remove_manifest,
        link_manifest,
        damage_copy,
        remove_copy,
        leave_plan,
    ],
)
def test_damage_that_costs_no_record_is_mended_at_once(cache: Path, damage: object) -> None:
    before = all_bytes(cache)
    damage(cache)  # type: ignore[operator]
    try:
        assert not verify_cache(cache).ok
    except CacheError as error:
        assert "cache repair" in str(error)
    assert drop_bad_records(cache) == []
    assert all_bytes(cache) == before
    assert verify_cache(cache).ok
    assert drop_bad_records(cache) == []
    assert all_bytes(cache) == before


def test_both_manifests_lost(cache: Path) -> None:
    flip(cache / "manifest.fpt", 20)
    flip(cache / "manifest-copy.fpt", 20)
    with pytest.raises(CacheCorrupt, match="both unreadable.*delete .* and preload again"):
        drop_bad_records(cache)
    (cache / "manifest.fpt").unlink()
    (cache / "manifest-copy.fpt").unlink()
    with pytest.raises(CacheCorrupt, match="manifest.fpt: is missing"):
        drop_bad_records(cache)


def test_verify_takes_no_memory_for_records_that_the_files_have_no_room_for(cache: Path) -> None:
    manifest = read_manifest(cache / "manifest.fpt", "manifest")
    absurd = replace(manifest, layout=replace(LAYOUT, heads=2**20))
    (cache / "manifest.fpt").write_bytes(encode_manifest(absurd))
    tracemalloc.start()
    try:
        report = verify_cache(cache)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert set(report.bad_keys) == set(manifest.keys)
    assert peak < 2**20 < absurd.layout.record_bytes


def test_surplus_shard_is_reported(cache: Path) -> None:
    shutil.copy(cache / SHARD, cache / "shard-00002.fpt")
    assert "shard-00002.fpt: is no shard of this cache" in verify_cache(cache).problems[0]


def test_repair_waits_for_nobody(cache: Path, tmp_path: Path) -> None:
    with (
        CacheWriter(tmp_path / "part", LAYOUT, FINGERPRINT, keys(6)),
        pytest.raises(CacheBusy, match="is being built by process"),
    ):
        drop_bad_records(tmp_path / "part")


@pytest.mark.parametrize("tool", [inspect_cache, verify_cache, drop_bad_records])
def test_no_cache(tmp_path: Path, tool: object) -> None:
    for path in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(CacheNotFound, match="has no feature cache"):
            tool(path)  # type: ignore[operator]
    assert list(tmp_path.iterdir()) == []


def test_forecast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RecordLayout(layers=6, heads=12, kept=205, head_width=64)
    monkeypatch.setattr(
        "shutil.disk_usage", lambda path: SimpleNamespace(free=10**9, total=0, used=0)
    )
    small = forecast(layout, 100, tmp_path / "not yet" / "there")
    assert small.bytes_total == 100 * layout.record_bytes + 4096
    assert small.fits
    assert "the cache of 100 images takes 383.8 MB; 1.0 GB are free" in str(small)
    large = forecast(layout, 2000, tmp_path)
    assert large.bytes_needed == 2000 * layout.record_bytes + 2 * 4096
    assert not large.fits
    assert "make room, or use another --cache directory" in str(large)
    with pytest.raises(ValueError, match="count must be at least 1"):
        forecast(layout, 0, tmp_path)


def test_forecast_counts_what_is_there(tmp_path: Path) -> None:
    wide = replace(LAYOUT, kept=500)
    CacheWriter(tmp_path, wide, FINGERPRINT, keys(6)).close()
    resumed = forecast(wide, 6, tmp_path)
    assert resumed.bytes_present >= resumed.bytes_total
    assert resumed.bytes_needed == 0
    assert "there already" in str(resumed)
