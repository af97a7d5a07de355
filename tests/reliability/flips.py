"""Every single byte of a cache changed, to one value, to several or to all: seen, or harmless.

Finished: each byte of each file.  Opening, reading in both modes and the view must give the right
features or an error of the cache; where the byte is one that a reader looks at they must fail; and
``verify_cache`` must complain in every case.  Bytes of records are changed under open readers, all
others before opening.  Unfinished: each byte of plan, journal and unfinished shards; going on must
end in the right bytes, or be refused for a plan.
"""

import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from cache.samples import all_bytes
from reliability.disk import real
from reliability.subjects import MODES, SMALL, Broken, Subject, same

from fpt_fast.cache import (
    CacheCorrupt,
    CacheError,
    CacheReader,
    verify_cache,
)
from fpt_fast.cache.layout import PAGE_BYTES


def masks_of(name: str, offset: int, stride: int) -> Sequence[int]:
    """Changes of a byte: one bit where ``stride`` is above 1; else each bit of a shard's bytes,
    and all 255 of any other file's.
    """
    count = 1 if stride > 1 else 8 if name.startswith("shard") else 255
    bits = [1 << (offset + bit) % 8 for bit in range(8)]
    return [*bits, *(mask for mask in range(1, 256) if mask not in bits)][:count]


class Byte:
    """A byte of a file that is changed for the length of a ``with`` block."""

    def __init__(self, fd: int, offset: int, mask: int) -> None:
        self._fd, self._offset = fd, offset
        self._was = real.pread(fd, 1, offset)
        self._is = bytes([self._was[0] ^ mask])

    def __enter__(self) -> None:
        real.pwrite(self._fd, self._is, self._offset)

    def __exit__(self, *_: object) -> None:
        real.pwrite(self._fd, self._was, self._offset)


def flip_finished(subject: Subject, root: Path, stride: int = 1) -> dict[str, int]:
    """Change each byte of a finished cache; counts of flips and of verdicts.

    ``stride``: of shards only every so-many-th byte; see ``masks_of`` for the values.
    """
    counts: Counter[str] = Counter()
    path = root / "flipped"
    shutil.copytree(subject.small, path)
    subject.check_reader(path)
    for file in sorted(path.iterdir()):
        fd = real.open(file, 2)
        size = file.stat().st_size
        records_at = PAGE_BYTES if file.name.startswith("shard") else size
        for offset in range(0, records_at, stride if records_at < size else 1):
            for mask in masks_of(file.name, offset, stride):
                with Byte(fd, offset, mask):
                    counts[_look(subject, path, file, offset)] += 1
        if file.name.startswith("shard"):
            offsets = range(records_at, size, stride)
            counts["detected"] += _flip_records(subject, path, file, fd, offsets)
        real.close(fd)
    counts["flips"] = counts["detected"] + counts["harmless to readers"]
    if not verify_cache(path).ok:
        raise Broken("a flip was not taken back, so that this proves nothing")
    shutil.rmtree(path)
    return dict(counts)


def _look(subject: Subject, path: Path, file: Path, offset: int) -> str:
    try:
        found = not verify_cache(path, workers=1).ok
    except CacheError:
        found = True
    if not found:
        raise Broken(f"verify_cache misses byte {offset} of {file.name}")
    try:
        subject.check_reader(path, ["mmap" if offset % 2 else "pread"])
    except CacheError:
        return "detected"
    if file.name != "manifest-copy.fpt":  # the one file that readers do not need
        raise Broken(f"readers miss byte {offset} of {file.name}")
    return "harmless to readers"


def _flip_records(subject: Subject, path: Path, file: Path, fd: int, offsets: range) -> int:
    count = 0
    readers = [CacheReader(path, mode=mode) for mode in MODES]  # type: ignore[arg-type]
    first = int(file.stem.removeprefix("shard-")) * 3
    for offset in offsets:
        row = first + (offset - PAGE_BYTES) // subject.layout.record_bytes
        for number, mask in enumerate(masks_of(file.name, offset, offsets.step)):
            with Byte(fd, offset, mask):
                for reader in readers:
                    _must_fail(reader, row, f"byte {offset} of {file.name} by {reader.mode}")
                if number == 0 and offset % 16 == 0 and verify_cache(path, workers=1).ok:
                    raise Broken(f"verify_cache misses byte {offset} of {file.name}")
            count += 1
        # What is seen once must not be remembered: the byte is right again.
        if offset % 64 == 0 and not same(
            readers[0].read([row]), subject.features[readers[0].keys[row]]
        ):
            raise Broken(f"row {row} is wrong after byte {offset} was put right")
    for reader in readers:
        reader.close()
    return count


def _must_fail(reader: CacheReader, row: int, what: str) -> None:
    try:
        reader.read([row])
    except CacheCorrupt as error:
        if repr(reader.keys[row]) not in str(error):
            raise Broken(f"{what}: the error does not name the image: {error}") from error
    else:
        raise Broken(f"{what} was read unseen")
    try:
        view = reader.view([row])
    except CacheCorrupt:
        return
    if view is not None:
        raise Broken(f"{what} was shown unseen")


def flip_unfinished(subject: Subject, root: Path, stride: int = 1) -> dict[str, int]:
    """Change each byte of an unfinished build, and go on.

    ``stride``: of shards only every 16 times so-many-th byte, for they are mostly not yet written.
    """
    counts: Counter[str] = Counter()
    begun, path = root / "begun", root / "going on"
    subject.fill(begun, 4, batch=1, finish=False)
    for name, data in all_bytes(begun).items():
        for offset in range(0, len(data), 16 * stride if name.startswith("shard") else 1):
            for mask in masks_of(name, offset, 2):
                shutil.copytree(begun, path)
                changed = data[:offset] + bytes([data[offset] ^ mask]) + data[offset + 1 :]
                (path / name).write_bytes(changed)
                counts[_go_on(subject, path, name, offset)] += 1
                shutil.rmtree(path)
    counts["flips"] = sum(counts.values())
    shutil.rmtree(begun)
    return dict(counts)


def _go_on(subject: Subject, path: Path, name: str, offset: int) -> str:
    try:
        subject.fill(path, SMALL)
    except CacheError as error:
        if name != "plan.fpt":
            raise Broken(f"byte {offset} of {name} stops the build: {error}") from error
        return "refused"
    if all_bytes(path) != subject.small_bytes:
        raise Broken(f"byte {offset} of {name} ends in another cache")
    return "mended"
