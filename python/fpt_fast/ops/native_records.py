"""``read_records`` of the C++ extension: many records of a cache into given memory.

No op of the model's, and so without an oracle, a gradient or a choice of implementations: the cache
calls it where the extension is there, and reads in Python where it is not.
"""

import torch
from torch import Tensor

from fpt_fast.ops.native import level
from fpt_fast.ops.native_reasons import native_missing

_ops = torch.ops.fpt_native


def can_read_records() -> bool:
    """True where the extension is there."""
    return native_missing() is None


def read_records(
    places: Tensor,
    mapped: Tensor,
    kv: Tensor,
    k_scales: Tensor,
    v_scales: Tensor,
    index: Tensor,
    *,
    record_bytes: int,
    digests: bool,
    threads: int,
) -> tuple[Tensor, Tensor]:
    """Read the record at each place into its row of ``kv`` ... ``index``, u8 [B, bytes of it].

    ``places`` [B, 3] i64: descriptor, offset, and 0 for a file, 1 for a file that was opened with
    O_DIRECT (then the offset must be a multiple of 4096, as ``record_bytes`` is), or 2 for an
    offset into ``mapped`` u8, mapped files, whose descriptor is not looked at.  Each part of a
    record begins at the next multiple of 4 bytes behind the one before; a part that records lack
    has 0 bytes.

    Returns counts [B] i64, the bytes that were read (fewer than a record where the file ended, or
    -errno), and with ``digests`` the xxh3-128 [B, 16] u8 of each whole record.
    """
    counts, hashes = _ops.read_records(
        places, mapped, kv, k_scales, v_scales, index, record_bytes, digests, threads, level()
    )
    return counts, hashes
