"""Manifests, plans, shard headers and journals that lie, with checksums that are right.

A lie is a file of a cache whose bytes were changed with knowledge of the format: counts, sizes,
layouts, keys, JSON.  Checksums are recomputed, so that nothing but the checks of meaning stands
between the lie and the code behind it.
"""

import copy
import json
import random
import struct
from collections.abc import Callable, Sequence
from typing import Any

from fpt_fast.cache.format import DIGEST_BYTES, JOURNAL_ENTRY_BYTES, MAGIC, digest
from fpt_fast.cache.layout import PAGE_BYTES

_PREFIX = struct.Struct("<8sII")
HUGE = (2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 10**400)
ODD = (0, -1, 1, 2, 3, 7, 255, 4096, 2**20, 2**20 + 1, *HUGE)
WRONG: tuple[Any, ...] = (
    *(None, True, False, 0.5, -0.0, 1e308, "", "5", "\0", "\ud800", "../../x", [], {}, [[]]),
    *({"": {}}, [None] * 50, {"float16": 2}, "x" * 5000),
)
# What json.dumps does not write.
RAW = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1" + "0" * 5000,
        "0x10",
        "01",
        "1.",
        "+1",
    ),
    *(
        '"\\ud800"',
        '"\\',
        "'x'",
        "tru",
        "[",
        "{",
        '{"a":1,"a":2}',
        "[" * 3000,
        "[" * 900 + "]" * 900,
    ),
    *('{"a":' * 900 + "1" + "}" * 900, "\xff", "/**/1", " 1 ", "1,", '"\x01"'),
)
DTYPES = ("float16", "int8", "float8_e4m3fn", "float32", "object", "O", "")


class Lie:
    """The parts of a manifest or plan, to be changed and put together again."""

    def __init__(self, data: bytes) -> None:
        _, self.version, size = _PREFIX.unpack_from(data)
        self.magic = MAGIC
        self.header: Any = json.loads(data[_PREFIX.size : _PREFIX.size + size])
        rest = data[_PREFIX.size + size : -DIGEST_BYTES]
        self.keys = rest[-self.header["keys_bytes"] :]
        self.table = rest[: -self.header["keys_bytes"]]
        self.raw: tuple[str, str] | None = None  # a placeholder in the JSON, and what it becomes
        self.header_bytes = 0  # added to what the prefix claims
        self.honest = False  # counts are put right after the change
        self.tail = b""

    def bytes(self) -> bytes:
        """The file."""
        if self.honest and isinstance(self.header, dict):
            self.header["keys_bytes"] = len(self.keys)
            self.header["records"] = max(1, self.keys.count(b"\0"))
            if self.table:
                size = 16 * self.header["records"]
                self.table = (self.table * (size // len(self.table) + 1))[:size]
        header = json.dumps(self.header, sort_keys=True, separators=(",", ":")).encode()
        if self.raw is not None:
            header = header.replace(self.raw[0].encode(), self.raw[1].encode("latin-1"))
        claim = max(0, len(header) + self.header_bytes) % 2**32
        body = _PREFIX.pack(self.magic, self.version % 2**32, claim)
        body += header + self.table + self.keys + self.tail
        return body + digest(body)


def _one_of(values: Sequence[Any], pick: random.Random) -> Any:
    """A copy: what one lie puts in another may change, and it must not change all that follow."""
    return copy.deepcopy(pick.choice(values))


def _number(lie: Lie, pick: random.Random) -> None:
    lie.header[pick.choice(("records", "records_per_shard", "keys_bytes"))] = pick.choice(ODD)


def _layout(lie: Lie, pick: random.Random) -> None:
    name = pick.choice(("layers", "heads", "kept", "head_width"))
    lie.header["layout"][name] = _one_of((*ODD, *WRONG), pick)


def _dtype(lie: Lie, pick: random.Random) -> None:
    lie.header["layout"]["dtype"] = _one_of((*DTYPES, *WRONG), pick)


def _type(lie: Lie, pick: random.Random) -> None:
    lie.header[pick.choice(sorted(lie.header))] = _one_of((*WRONG, *ODD), pick)


def _inside(lie: Lie, pick: random.Random) -> None:
    place = lie.header[pick.choice(("fingerprint", "notes", "layout"))]
    if isinstance(place, dict):
        place[pick.choice(("digests", "layers", "x", "", "dtype", "\ud800"))] = _one_of(WRONG, pick)


def _field(lie: Lie, pick: random.Random) -> None:
    if pick.random() < 0.5:
        lie.header.pop(pick.choice(sorted(lie.header)))
    else:
        lie.header[pick.choice(("shards", "", "ranges", "path", "records "))] = _one_of(WRONG, pick)


def _json(lie: Lie, pick: random.Random) -> None:
    lie.raw = ('"<here>"', pick.choice(RAW))
    if pick.random() < 0.3:
        lie.header[pick.choice(sorted(lie.header))] = "<here>"
    else:
        lie.header["fingerprint" if pick.random() < 0.5 else "notes"] = {"a": "<here>"}


def _twice(lie: Lie, pick: random.Random) -> None:
    name = pick.choice(sorted(lie.header))
    lie.raw = (f'"{name}":', f'"{name}":{pick.choice(("1", "[]", "null"))},"{name}":')


def _whole(lie: Lie, pick: random.Random) -> None:
    lie.header = _one_of(WRONG, pick)


def _keys(lie: Lie, pick: random.Random) -> None:
    keys = lie.keys.split(b"\0")[:-1]
    evil = (
        *(b"../up", b"/etc/passwd", b"a/../b", b"", b"a//b", b".", b"\xff\xfe", b"a" * 5000),
        *(keys[0], b"a\nb", b"C:\\x", "é".encode(), b"\xed\xa0\x80", b"\xf4\x90\x80\x80"),
    )
    keys[pick.randrange(len(keys))] = pick.choice(evil)
    if pick.random() < 0.3:
        pick.shuffle(keys)
    if pick.random() < 0.2:
        times = pick.choice((2, 100))
        # Lies add up, and the memory to tell them in is limited; an empty key takes some, too.
        if times * sum(len(key) + 1 for key in keys) <= 2**20:
            keys *= times
    lie.keys = b"\0".join(keys) + (b"" if pick.random() < 0.1 else b"\0")
    lie.honest = pick.random() < 0.8


def _frame(lie: Lie, pick: random.Random) -> None:
    what = pick.randrange(4)
    if what == 0:
        lie.magic = pick.choice((b"FPTCACHF", b"\0" * 8, b"SAFETENS"))
    elif what == 1:
        lie.version = pick.choice((0, 2, 2**31, 2**32 - 1))
    elif what == 2:
        lie.header_bytes = pick.choice((1, -1, 16, -100, 2**24, 2**31))
    else:
        lie.tail = pick.randbytes(pick.choice((1, 16, 48, 4096)))


def _table(lie: Lie, pick: random.Random) -> None:
    if lie.table:
        at = pick.randrange(len(lie.table))
        lie.table = lie.table[:at] + pick.randbytes(1) + lie.table[at + 1 :]
    if pick.random() < 0.3:
        lie.table = lie.table[: -pick.choice((1, 16))]


def _kind(lie: Lie, pick: random.Random) -> None:
    lie.header["kind"] = pick.choice(("manifest", "plan", "shard", "Manifest", ""))


LIES: tuple[Callable[[Lie, random.Random], None], ...] = (
    *(_number, _layout, _dtype, _type, _inside, _field, _json, _twice, _whole, _keys, _frame),
    *(_table, _kind),
)


def lying_manifest(data: bytes, pick: random.Random) -> Lie:
    """A manifest or plan with one to three lies in it."""
    lie = Lie(data)
    for _ in range(pick.choice((1, 1, 1, 2, 3))):
        if isinstance(lie.header, dict):
            try:
                pick.choice(LIES)(lie, pick)
            except (KeyError, TypeError, IndexError, ValueError):
                continue  # an earlier change has removed what this one wants
    return lie


def lying_shard(page: bytes, pick: random.Random) -> bytes:
    """Another first page of a shard."""
    _, _, size = _PREFIX.unpack_from(page)
    header = json.loads(page[_PREFIX.size : _PREFIX.size + size])
    before = json.dumps(header)
    while json.dumps(header) == before:
        place = header if pick.random() < 0.7 else header["layout"]
        place[pick.choice(sorted(place))] = _one_of((*ODD, *WRONG, *DTYPES), pick)
        if not isinstance(header["layout"], dict):
            break
    body = json.dumps(header, sort_keys=True, separators=(",", ":")).encode()
    page = _PREFIX.pack(MAGIC, 1, len(body)) + body
    page = page[: PAGE_BYTES - DIGEST_BYTES].ljust(PAGE_BYTES - DIGEST_BYTES, b"\0")
    return page + digest(page)


def lying_journal(data: bytes, identity: bytes, pick: random.Random) -> bytes:
    """A journal with entries for rows that are not there, of other bytes, torn, or endless."""
    size = JOURNAL_ENTRY_BYTES - DIGEST_BYTES
    entries = [data[at : at + size] for at in range(0, len(data), JOURNAL_ENTRY_BYTES)]
    for _ in range(pick.choice((1, 2, 5, 200))):
        entry = bytearray(pick.choice(entries))
        what = pick.randrange(4)
        if what == 0:
            entry[8:16] = (pick.choice(ODD) % 2**64).to_bytes(8, "little")
        elif what == 1:
            entry[16:] = pick.randbytes(16)
        elif what == 2:
            entry[:8] = pick.randbytes(8)
        entries.append(bytes(entry))
    pick.shuffle(entries)
    whole = b"".join(entry + digest(identity, entry) for entry in entries)
    return whole[: pick.randrange(len(whole))] if pick.random() < 0.2 else whole
