"""The bytes of a feature cache: manifest, shard header, journal entries.

``docs/cache-format.md`` shows the format on one screen.  Everything here is a pure function of
its arguments: no clock, no host name, so that equal features make equal files.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xxhash
from numpy.typing import NDArray

from fpt_fast.cache.errors import CacheMismatch, corrupt, repair_command
from fpt_fast.cache.layout import DTYPES, PAGE_BYTES, RecordLayout, check_keys, key_bytes
from fpt_fast.cache.storage import opened, read_into

FORMAT_VERSION = 1
MAGIC = b"FPTCACHE"
DIGEST_BYTES = 16
MAX_HEADER_BYTES = 16 * 2**20

MANIFEST_FILE = "manifest.fpt"
MANIFEST_COPY_FILE = "manifest-copy.fpt"
PLAN_FILE = "plan.fpt"
JOURNAL_FILE = "journal.fpt"

# The note that holds one digest per key.
DIGESTS = "digests"

_PREFIX = struct.Struct("<8sII")  # magic, format version, bytes of the JSON header
_JOURNAL_ENTRY = struct.Struct("<4sIQ16s")  # magic, zero, row, digest of the record
_JOURNAL_MAGIC = b"DONE"
JOURNAL_ENTRY_BYTES = _JOURNAL_ENTRY.size + DIGEST_BYTES

Kind = Literal["manifest", "plan"]
Fingerprint = Mapping[str, Any]


def digest(*parts: bytes | bytearray | memoryview) -> bytes:
    """xxh3-128 of the parts one after the other, 16 bytes in canonical (big-endian) order."""
    state = xxhash.xxh3_128()
    for part in parts:
        state.update(part)
    return state.digest()


def canonical_json(value: Any, name: str) -> bytes:
    """The one spelling of a JSON value; raises ``ValueError`` for what JSON cannot hold."""
    try:
        text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"{name} must be made of JSON values (finite numbers, strings, booleans, None, lists, "
            f"string-keyed mappings): {error}"
        ) from error
    return text.encode()


def normalised(given: Mapping[str, Any], name: str = "fingerprint") -> dict[str, Any]:
    """A mapping as it comes back from a manifest: tuples are lists, mappings are dicts."""
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a mapping, got {type(given).__name__}")
    values: dict[str, Any] = json.loads(canonical_json(dict(given), name))
    return values


@dataclass(frozen=True, eq=False)
class Manifest:
    """Everything about a cache but its features.

    Row *i*, the features of ``keys[i]``, is record ``i % records_per_shard`` of shard
    ``i // records_per_shard``.  ``checksums`` u8 [M, 16] holds the digest of each record; None in
    a plan, the manifest of an unfinished build.  ``notes`` (JSON values) are for people and for
    finding things again, and no part of the cache's identity.
    """

    layout: RecordLayout
    fingerprint: dict[str, Any]
    keys: tuple[str, ...]
    records_per_shard: int
    checksums: NDArray[np.uint8] | None = None
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def shard_count(self) -> int:
        """Number of shards."""
        return -(-len(self.keys) // self.records_per_shard)

    @cached_property
    def identity(self) -> bytes:
        """Digest of what every record has in common; ties shards and journal to this cache."""
        return digest(canonical_json(self.common(), "fingerprint"))

    def common(self) -> dict[str, Any]:
        """What must be equal for two caches to share records, as JSON values."""
        return {
            "fingerprint": self.fingerprint,
            "layout": self.layout.to_json(),
            "records_per_shard": self.records_per_shard,
        }

    def locate(self, row: int) -> tuple[int, int]:
        """Shard and byte offset of a row."""
        shard, place = divmod(row, self.records_per_shard)
        return shard, PAGE_BYTES + place * self.layout.record_bytes

    def shard_rows(self, shard: int) -> range:
        """Rows of a shard."""
        first = shard * self.records_per_shard
        return range(first, min(first + self.records_per_shard, len(self.keys)))

    def shard_bytes(self, shard: int) -> int:
        """Exact file size of a shard."""
        return PAGE_BYTES + len(self.shard_rows(shard)) * self.layout.record_bytes


def recorded_digests(manifest: Manifest) -> dict[str, str]:
    """Digest by key of the images that a cache was made from; empty where it does not say."""
    digests = manifest.notes.get(DIGESTS, [])
    return dict(zip(manifest.keys, digests, strict=False)) if isinstance(digests, list) else {}


def shard_file(shard: int, *, finished: bool) -> str:
    """File name of a shard; a build keeps its shards under another name until it is finished."""
    return f"shard-{shard:05d}.{'fpt' if finished else 'partial'}"


def shard_header(manifest: Manifest, shard: int) -> bytes:
    """The first page of a shard: prefix, JSON, zeros, and the digest of these."""
    header = canonical_json(
        {
            "identity": manifest.identity.hex(),
            "kind": "shard",
            "layout": manifest.layout.to_json(),
            "record_bytes": manifest.layout.record_bytes,
            "shard": shard,
        },
        "header",
    )
    page = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(header)) + header
    page = page.ljust(PAGE_BYTES - DIGEST_BYTES, b"\0")
    return page + digest(page)


def encode_manifest(manifest: Manifest) -> bytes:
    """Bytes of a manifest, or of a plan where ``checksums`` is None.

    Raises ``ValueError`` where the fingerprint takes the header above 16 MB.
    """
    keys = b"".join(key_bytes(key) + b"\0" for key in manifest.keys)
    header = canonical_json(
        {
            **manifest.common(),
            "keys_bytes": len(keys),
            "kind": "plan" if manifest.checksums is None else "manifest",
            "notes": manifest.notes,
            "records": len(manifest.keys),
        },
        "fingerprint",
    )
    if len(header) > MAX_HEADER_BYTES:
        raise ValueError(
            f"fingerprint must fit in a header of {MAX_HEADER_BYTES} bytes, got {len(header)}; "
            "record hashes of large values, not the values"
        )
    table = b"" if manifest.checksums is None else manifest.checksums.tobytes()
    body = _PREFIX.pack(MAGIC, FORMAT_VERSION, len(header)) + header + table + keys
    return body + digest(body)


def read_manifest(file: Path, kind: Kind) -> Manifest:
    """Read and check a manifest or plan.

    No count is believed before it agrees with the file's size.  Raises ``CacheCorrupt`` for
    bytes that are not what was written, ``CacheMismatch`` for another format version or dtype,
    and ``FileNotFoundError`` where there is no such file.
    """
    with opened(file) as (fd, size):
        header = _read_header(file, fd, size)
        header_end = _PREFIX.size + header["header_bytes"]
        records, keys_bytes = header["records"], header["keys_bytes"]
        table_bytes = DIGEST_BYTES * records if kind == "manifest" else 0
        expected = header_end + table_bytes + keys_bytes + DIGEST_BYTES
        if size != expected:
            raise corrupt(file, f"has {size} bytes, its header describes {expected}")
        data = _read_bytes(file, fd, size)
    body = memoryview(data)[:-DIGEST_BYTES]
    if digest(body) != data[-DIGEST_BYTES:]:
        raise corrupt(file, "does not match its own checksum")
    if header["kind"] != kind:
        raise corrupt(file, f"is a {header['kind']!r}, expected a {kind!r}")
    keys_at = header_end + table_bytes
    table = np.frombuffer(body[header_end:keys_at], np.uint8)
    return Manifest(
        layout=_parse_layout(file, header["layout"]),
        fingerprint=header["fingerprint"],
        keys=_parse_keys(file, bytes(body[keys_at:]), records),
        records_per_shard=header["records_per_shard"],
        checksums=table.reshape(records, DIGEST_BYTES) if kind == "manifest" else None,
        notes=header["notes"],
    )


def _read_header(file: Path, fd: int, size: int) -> dict[str, Any]:
    if size < _PREFIX.size + DIGEST_BYTES:
        raise corrupt(file, f"is cut short: {size} bytes")
    magic, version, header_bytes = _PREFIX.unpack(_read_bytes(file, fd, _PREFIX.size))
    if magic != MAGIC:
        raise corrupt(file, f"does not start with {MAGIC!r}, so it is no file of a feature cache")
    if version != FORMAT_VERSION:
        raise CacheMismatch(
            f"{file}: has format version {version}, this fpt-fast reads {FORMAT_VERSION}; use the "
            "fpt-fast that made it, or another --cache directory; if it was this one, the file is "
            f"damaged: run {repair_command(file.parent)}"
        )
    if header_bytes > min(MAX_HEADER_BYTES, size - _PREFIX.size - DIGEST_BYTES):
        raise corrupt(file, f"claims a header of {header_bytes} bytes in a file of {size}")
    data = _read_bytes(file, fd, _PREFIX.size + header_bytes)
    return {**_parse_header(file, data[_PREFIX.size :]), "header_bytes": header_bytes}


def _read_bytes(file: Path, fd: int, count: int) -> bytes:
    data = bytearray(count)
    if read_into(fd, memoryview(data), 0) < count:
        raise corrupt(file, "became shorter while it was read")
    return bytes(data)


def _parse_header(file: Path, data: bytes) -> dict[str, Any]:
    try:
        header = json.loads(data)
        spelling = canonical_json(header, "header")
    except (ValueError, RecursionError) as error:
        raise corrupt(file, f"has a header that is not JSON ({str(error)[:200]})") from None
    # No NaN, no name twice, no other encoding: what is read is what would be written.
    if spelling != data:
        raise corrupt(file, "has a header that is not spelled as this format spells JSON")
    expected: dict[str, type] = {
        "fingerprint": dict,
        "keys_bytes": int,
        "kind": str,
        "layout": dict,
        "notes": dict,
        "records": int,
        "records_per_shard": int,
    }
    if not isinstance(header, dict) or set(header) != set(expected):
        raise corrupt(file, f"must have a header of {', '.join(expected)}")
    for name, kind in expected.items():
        value = header[name]
        if type(value) is not kind or (isinstance(value, int) and value < 1):
            raise corrupt(file, f"has a header with {name} = {str(value)[:80]}")
    return header


def _parse_layout(file: Path, values: Mapping[str, Any]) -> RecordLayout:
    dtype = values.get("dtype")
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise CacheMismatch(
            f"{file}: has features of dtype {dtype!r}, this fpt-fast reads {', '.join(DTYPES)}; "
            "use a newer fpt-fast, or another --cache directory"
        )
    try:
        return RecordLayout(**values)
    except (TypeError, ValueError) as error:
        raise corrupt(file, f"describes an impossible layout ({error})") from None


def _parse_keys(file: Path, data: bytes, records: int) -> tuple[str, ...]:
    if data.count(b"\0") != records or not data.endswith(b"\0"):
        raise corrupt(file, f"must list {records} keys, lists {data.count(bytes(1))}")
    try:
        return check_keys(key.decode("utf-8", "surrogateescape") for key in data.split(b"\0")[:-1])
    except ValueError as error:
        raise corrupt(file, f"has a list of keys that cannot be ({error})") from None


def encode_journal_entry(manifest: Manifest, row: int, record_digest: bytes) -> bytes:
    """48 bytes that say: this row's record is on disk and has this digest."""
    entry = _JOURNAL_ENTRY.pack(_JOURNAL_MAGIC, 0, row, record_digest)
    return entry + digest(manifest.identity, entry)


def decode_journal(manifest: Manifest, data: bytes) -> dict[int, bytes]:
    """Digest by row, of the entries whose own checksum is right; the last of a row counts.

    A torn tail, a flipped byte or the journal of another cache costs the entries it touches.
    """
    done: dict[int, bytes] = {}
    for at in range(0, len(data) - JOURNAL_ENTRY_BYTES + 1, JOURNAL_ENTRY_BYTES):
        entry = data[at : at + _JOURNAL_ENTRY.size]
        if digest(manifest.identity, entry) != data[at + len(entry) : at + JOURNAL_ENTRY_BYTES]:
            continue
        _, _, row, record_digest = _JOURNAL_ENTRY.unpack(entry)
        if row < len(manifest.keys):
            done[row] = record_digest
    return done


def checksum_table(digests: Sequence[bytes]) -> NDArray[np.uint8]:
    """u8 [M, 16] of M digests."""
    return np.frombuffer(b"".join(digests), np.uint8).reshape(len(digests), DIGEST_BYTES)
