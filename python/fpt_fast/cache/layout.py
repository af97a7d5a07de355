"""Shape of a record, and what a key may be."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PAGE_BYTES = 4096
MAX_KEY_BYTES = 4096
DEFAULT_SHARD_BYTES = 4 * 2**30

# Bytes of an element of kv; a reader refuses a name that it does not know.
DTYPES = {"float16": 2, "int8": 1, "float8_e4m3fn": 1}
_SCALE_BYTES = _INDEX_BYTES = 4


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of a record: ``shape`` of ``dtype`` (torch's name), from byte ``offset`` on."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: str
    bytes: int


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """One image's record: ``kv`` [L, 2, H, K, D] of ``dtype``, then ``index`` [L, H, K] i32.

    Between the two, a record of 8-bit features has the f32 scales of keys [L, H, D] and values
    [L, H, K].  ``parts`` are these tensors in the order they have on disk.  Each begins at a
    multiple of 4 bytes; zeros fill the gaps, and the record up to ``record_bytes``, a multiple of
    4096.  Raises ``ValueError`` for an axis that is not an integer of 1 to 2^20, and for a dtype
    that this version does not know.
    """

    layers: int
    heads: int
    kept: int
    head_width: int
    dtype: str = "float16"
    # Worked out once: readers look at them for every record.
    parts: tuple[Part, ...] = field(init=False, repr=False, compare=False)
    record_bytes: int = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("layers", "heads", "kept", "head_width"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 2**20:
                raise ValueError(f"{name} must be an integer of 1 to {2**20}, got {value!r}")
        if self.dtype not in DTYPES:
            raise ValueError(
                f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}; "
                "another version of fpt-fast may know it"
            )
        object.__setattr__(self, "parts", _parts(self))
        pages = -(-self.payload_bytes // PAGE_BYTES)
        object.__setattr__(self, "record_bytes", pages * PAGE_BYTES)

    @property
    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """``(L, 2, H, K, D)``."""
        return (self.layers, 2, self.heads, self.kept, self.head_width)

    @property
    def index_shape(self) -> tuple[int, int, int]:
        """``(L, H, K)``."""
        return (self.layers, self.heads, self.kept)

    @property
    def has_scales(self) -> bool:
        """True where kv has 8 bits an element, and scales."""
        return DTYPES[self.dtype] == 1

    @property
    def kv_bytes(self) -> int:
        """Bytes of ``kv``."""
        return self.parts[0].bytes

    @property
    def payload_bytes(self) -> int:
        """Bytes of all parts, without the padding behind them."""
        return self.parts[-1].offset + self.parts[-1].bytes

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by field name."""
        return {
            "layers": self.layers,
            "heads": self.heads,
            "kept": self.kept,
            "head_width": self.head_width,
            "dtype": self.dtype,
        }


def _parts(layout: RecordLayout) -> tuple[Part, ...]:
    layers, _, heads, kept, width = layout.kv_shape
    described: list[tuple[str, tuple[int, ...], str, int]] = [
        ("kv", layout.kv_shape, layout.dtype, DTYPES[layout.dtype])
    ]
    if layout.has_scales:
        described += [
            ("k_scales", (layers, heads, width), "float32", _SCALE_BYTES),
            ("v_scales", (layers, heads, kept), "float32", _SCALE_BYTES),
        ]
    described.append(("index", layout.index_shape, "int32", _INDEX_BYTES))
    parts: list[Part] = []
    offset = 0
    for name, shape, dtype, item in described:
        size = math.prod(shape) * item
        parts.append(Part(name, offset, shape, dtype, size))
        offset += -(-size // 4) * 4  # a part of 4-byte elements must not lie across them
    return tuple(parts)


def default_records_per_shard(layout: RecordLayout) -> int:
    """Records that fit in 4 GiB, at least one: a small data set is one shard."""
    return max(1, DEFAULT_SHARD_BYTES // layout.record_bytes)


def check_keys(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the keys; raise ``ValueError`` for one that is not a unique relative POSIX path."""
    checked = tuple(keys)
    if not checked:
        raise ValueError("keys must name at least one image, got none")
    first_at: dict[str, int] = {}
    for position, key in enumerate(checked):
        if not isinstance(key, str):
            raise ValueError(f"keys must be strings, got {key!r} at position {position}")
        if set(key.split("/")) & {"", ".", ".."} or "\0" in key:
            raise ValueError(
                f"keys must be relative POSIX paths without '.', '..' or empty parts, got {key!r} "
                f"at position {position}"
            )
        if len(key_bytes(key)) > MAX_KEY_BYTES:
            raise ValueError(
                f"keys must have at most {MAX_KEY_BYTES} bytes, got {key[:80]!r}... "
                f"at position {position}"
            )
        if first_at.setdefault(key, position) != position:
            raise ValueError(
                f"keys must be unique, got {key!r} at positions {first_at[key]} and {position}; "
                "list each image once, by its path relative to the data set"
            )
    return checked


def key_bytes(key: str) -> bytes:
    """Bytes of a key as the manifest stores them."""
    # File names on POSIX are bytes; Python shows those that are not UTF-8 as surrogates.
    return key.encode("utf-8", "surrogateescape")
