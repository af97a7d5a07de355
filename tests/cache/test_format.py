"""The bytes: what a cache is made of, and what a reader refuses before it believes a count."""

import json
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash
from cache.samples import FINGERPRINT, LAYOUT, flip, keys

from fpt_fast.cache.errors import CacheCorrupt, CacheError, CacheMismatch, differences
from fpt_fast.cache.format import (
    JOURNAL_ENTRY_BYTES,
    MAX_HEADER_BYTES,
    Manifest,
    canonical_json,
    checksum_table,
    decode_journal,
    digest,
    encode_journal_entry,
    encode_manifest,
    normalised,
    read_manifest,
    shard_header,
)
from fpt_fast.cache.layout import RecordLayout, check_keys, default_records_per_shard


def manifest_of(names: list[str]) -> Manifest:
    table = checksum_table([digest(name.encode("utf-8", "replace")) for name in names])
    return Manifest(LAYOUT, normalised(FINGERPRINT), tuple(names), 4, table)


def with_header(manifest: Manifest, **changes: object) -> bytes:
    """A manifest whose header lies, and whose checksum is right."""
    data = encode_manifest(manifest)
    magic, version, length = struct.unpack("<8sII", data[:16])
    values = {**json.loads(data[16 : 16 + length]), **changes}
    header = canonical_json(values, "header")
    body = struct.pack("<8sII", magic, version, len(header)) + header + data[16 + length : -16]
    return body + digest(body)


def test_record_of_the_published_setting() -> None:
    layout = RecordLayout(layers=6, heads=12, kept=205, head_width=64)
    assert layout.kv_bytes == 6 * 2 * 12 * 205 * 64 * 2
    assert layout.payload_bytes - layout.kv_bytes == 6 * 12 * 205 * 4
    assert layout.record_bytes == 3_837_952
    assert layout.record_bytes % 4096 == 0
    assert layout.record_bytes - layout.payload_bytes < 4096
    assert 1e9 < default_records_per_shard(layout) * layout.record_bytes <= 4 * 2**30


@pytest.mark.parametrize("bad", [0, -1, 2**20 + 1, 1.0, True, "3"])
def test_layout_refuses(bad: object) -> None:
    with pytest.raises(ValueError, match="kept must be an integer"):
        replace(LAYOUT, kept=bad)


def test_layout_refuses_a_dtype_it_does_not_know() -> None:
    with pytest.raises(ValueError, match="dtype must be one of float16"):
        replace(LAYOUT, dtype="float64")


@pytest.mark.parametrize(
    "bad", ["", "/etc/passwd", "../x.png", "a/../../x", "a//b", "./a", "a/", "a\0b"]
)
def test_keys_are_relative_paths(bad: str) -> None:
    with pytest.raises(ValueError, match="relative POSIX paths"):
        check_keys(["fine.png", bad])


def test_keys_are_unique() -> None:
    with pytest.raises(ValueError, match=r"'a/x.png' at positions 1 and 3"):
        check_keys(["b/x.png", "a/x.png", "c", "a/x.png"])
    with pytest.raises(ValueError, match="at least one"):
        check_keys([])
    with pytest.raises(ValueError, match="at most 4096 bytes"):
        check_keys(["x" * 5000])


def test_manifest_round_trip(tmp_path: Path) -> None:
    # The last is a file name that is not UTF-8, as Python shows it.
    manifest = manifest_of([*keys(5), "ä/图.png", "line\nbreak.png", "latin\udce9.png"])
    file = tmp_path / "manifest.fpt"
    file.write_bytes(encode_manifest(manifest))
    back = read_manifest(file, "manifest")
    assert back.keys == manifest.keys
    assert back.layout == LAYOUT
    assert back.fingerprint == json.loads(json.dumps(FINGERPRINT))
    assert back.records_per_shard == 4
    assert back.checksums is not None
    assert np.array_equal(back.checksums, manifest.checksums)
    assert (back.shard_count, list(back.shard_rows(1))) == (2, [4, 5, 6, 7])
    assert back.locate(5) == (1, 4096 + LAYOUT.record_bytes)


def test_bytes_do_not_depend_on_the_order_of_the_fingerprint() -> None:
    manifest = manifest_of(keys(3))
    other = replace(manifest, fingerprint=dict(reversed(manifest.fingerprint.items())))
    assert encode_manifest(manifest) == encode_manifest(other)
    assert shard_header(manifest, 0) == shard_header(other, 0)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    data, file = encode_manifest(manifest_of(keys(2))), tmp_path / "manifest.fpt"
    for length in range(len(data)):
        file.write_bytes(data[:length])
        with pytest.raises(CacheCorrupt, match="cache repair"):
            read_manifest(file, "manifest")
    file.write_bytes(data + b"\0")
    with pytest.raises(CacheCorrupt, match="its header describes"):
        read_manifest(file, "manifest")


def test_every_flip_is_refused(tmp_path: Path) -> None:
    data, file = encode_manifest(manifest_of(keys(2))), tmp_path / "manifest.fpt"
    file.write_bytes(data)
    for offset in range(len(data)):
        for mask in (0x01, 0x80):
            flip(file, offset, mask)
            with pytest.raises(CacheError, match=r"manifest\.fpt"):
                read_manifest(file, "manifest")
            flip(file, offset, mask)
    read_manifest(file, "manifest")


def test_other_magic_version_kind_and_dtype(tmp_path: Path) -> None:
    manifest, file = manifest_of(keys(2)), tmp_path / "manifest.fpt"
    data = encode_manifest(manifest)
    file.write_bytes(b"PK\3\4" + data[4:])
    with pytest.raises(CacheCorrupt, match="no file of a feature cache"):
        read_manifest(file, "manifest")
    newer = data[:8] + struct.pack("<I", 2) + data[12:-16]
    file.write_bytes(newer + digest(newer))
    with pytest.raises(CacheMismatch, match="format version 2, this fpt-fast reads 1"):
        read_manifest(file, "manifest")
    file.write_bytes(encode_manifest(replace(manifest, checksums=None)))
    with pytest.raises(CacheCorrupt):
        read_manifest(file, "manifest")
    file.write_bytes(with_header(manifest, layout={**LAYOUT.to_json(), "dtype": "int4"}))
    with pytest.raises(CacheMismatch, match="dtype 'int4'.*reads float16, int8, float8_e4m3fn"):
        read_manifest(file, "manifest")


@pytest.mark.parametrize(
    "lie",
    [
        {"records": 10**15},
        {"records": 0},
        {"records": -1},
        {"records": True},
        {"records": 2.0},
        {"records": 3},
        {"keys_bytes": 2**62},
        {"records_per_shard": 0},
        {"layout": {**LAYOUT.to_json(), "kept": 2**40}},
        {"layout": {"layers": 1}},
        {"layout": {**LAYOUT.to_json(), "more": 1}},
        {"kind": "plan"},
        {"surplus": 1},
        {"fingerprint": []},
    ],
)
def test_lying_headers(tmp_path: Path, lie: dict[str, object]) -> None:
    file = tmp_path / "manifest.fpt"
    file.write_bytes(with_header(manifest_of(keys(2)), **lie))
    with pytest.raises(CacheCorrupt):
        read_manifest(file, "manifest")


@pytest.mark.parametrize("claim", [MAX_HEADER_BYTES, 2**32 - 1, 1_000])
def test_header_bomb(tmp_path: Path, claim: int) -> None:
    file = tmp_path / "manifest.fpt"
    file.write_bytes(struct.pack("<8sII", b"FPTCACHE", 1, claim) + b"{}" + bytes(16))
    with pytest.raises(CacheCorrupt, match=f"claims a header of {claim} bytes"):
        read_manifest(file, "manifest")


@pytest.mark.parametrize(
    "header", [b"[" * 100_000, b"\xff\xfe", b"[]", b"null", b'{"records": 1e999}', b"9" * 5_000]
)
def test_headers_that_are_no_header(tmp_path: Path, header: bytes) -> None:
    body = struct.pack("<8sII", b"FPTCACHE", 1, len(header)) + header
    file = tmp_path / "manifest.fpt"
    file.write_bytes(body + digest(body))
    with pytest.raises(CacheCorrupt, match="header"):
        read_manifest(file, "manifest")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"notes":{}', b'"notes":{"a":NaN}'),
        (b'"notes":{}', b'"notes":{"a":1,"a":2}'),
        (b'"notes":{}', b'"notes": {}'),
        (b'"kind":"manifest"', b'"kind":"plan","kind":"manifest"'),
        (b'"records":2', b'"records":1,"records":2'),
    ],
)
def test_headers_are_spelled_in_one_way(tmp_path: Path, old: bytes, new: bytes) -> None:
    data, file = encode_manifest(manifest_of(keys(2))), tmp_path / "manifest.fpt"
    size = struct.unpack_from("<I", data, 12)[0]
    header = data[16 : 16 + size].replace(old, new)
    assert header != data[16 : 16 + size]
    body = data[:12] + struct.pack("<I", len(header)) + header + data[16 + size : -16]
    file.write_bytes(body + digest(body))
    with pytest.raises(CacheCorrupt, match="has a header that is not"):
        read_manifest(file, "manifest")


def test_keys_in_a_manifest_are_checked(tmp_path: Path) -> None:
    manifest, file = manifest_of(["aaaa", "bbbb"]), tmp_path / "manifest.fpt"
    for names in (b"/aaa\0bbbb\0", b"aaaa\0aaaa\0", b"aaaabbbb\0\0", b"aa\0a\0bbb\0"):
        body = encode_manifest(manifest)[: -16 - 10] + names
        file.write_bytes(body + digest(body))
        with pytest.raises(CacheCorrupt, match="keys"):
            read_manifest(file, "manifest")


def test_fingerprint_and_header_size() -> None:
    with pytest.raises(ValueError, match="JSON values"):
        normalised({"ratio": float("nan")})
    with pytest.raises(ValueError, match="JSON values"):
        normalised({"path": Path()})
    with pytest.raises(ValueError, match="must be a mapping"):
        normalised([("a", 1)])  # type: ignore[arg-type]
    huge = replace(manifest_of(keys(1)), fingerprint={"hash": "x" * MAX_HEADER_BYTES})
    with pytest.raises(ValueError, match="fit in a header"):
        encode_manifest(huge)


def test_journal_trusts_only_whole_entries_of_its_own_cache() -> None:
    plan = replace(manifest_of(keys(5)), checksums=None)
    entries = [encode_journal_entry(plan, row, digest(bytes([row]))) for row in (3, 0, 4)]
    whole = b"".join(entries)
    expected = {row: digest(bytes([row])) for row in (3, 0, 4)}
    assert decode_journal(plan, whole) == expected
    for cut in range(1, JOURNAL_ENTRY_BYTES):
        assert set(decode_journal(plan, whole[:-cut])) == {3, 0}
    for offset in range(JOURNAL_ENTRY_BYTES, 2 * JOURNAL_ENTRY_BYTES):
        torn = bytearray(whole)
        torn[offset] ^= 4
        assert set(decode_journal(plan, bytes(torn))) == {3, 4}
    other = replace(plan, fingerprint={"backbone": "another"})
    assert decode_journal(other, whole) == {}
    assert set(decode_journal(replace(plan, keys=plan.keys[:4]), whole)) == {3, 0}
    again = whole + encode_journal_entry(plan, 3, digest(b"new"))
    assert decode_journal(plan, again)[3] == digest(b"new")


def test_digest_is_xxh3_128_of_all_parts() -> None:
    data = bytes(range(256)) * 40
    assert digest(data[:100], data[100:]) == xxhash.xxh3_128_digest(data)


def test_differences_names_nested_and_absent_fields() -> None:
    assert differences({"a": {"b": 1, "c": 2}, "d": 1}, {"a": {"b": 1, "c": 3}, "e": True}) == [
        ("a.c", 2, 3),
        ("d", 1, "(absent)"),
        ("e", "(absent)", True),
    ]
    assert differences({"a": 1, "b": 1}, {"a": True, "b": 1.0}) == [("a", 1, True)]
