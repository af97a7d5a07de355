"""Power loss, simulated: what a disk may hold after one, by a stated model, from a recording.

The model.  A file has pages of 4096 bytes; a directory has entries, name to file.

- ``fsync`` or ``fdatasync`` of a file makes its bytes and its size durable, not its name; ``fsync``
  of a directory makes its entries durable, not what they name.
- A page that was written since its file was last synced holds any of its versions since then, each
  page on its own; or it is torn: the first sectors of 512 bytes from one version, the others from
  another; or, where the disk never held that page before, junk.
- The size of a file is any that it had since its last sync.
- Creating, renaming and removing since the directory was last synced happened or did not, each on
  its own, in any combination; a rename is atomic; of several that concern one name the last that
  happened shows.
- Nothing else is ordered: data, sizes and names reach the disk in any order.
- An ``fsync`` that fails leaves the pages what they were on the disk, and no later one brings them
  back (``lost``): what Linux does.

This allows more than a journalling file system does.
"""

import hashlib
import itertools
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from reliability.disk import Call, real, watched

PAGE, SECTOR = 4096, 512
JUNK = bytes(range(1, 256)) * 17
Image = dict[str, bytes]


@dataclass
class File:
    """What the disk may hold of a file: durable version first, the newest last."""

    pages: dict[int, list[bytes]] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=lambda: [0])
    seen: dict[int, bytes] = field(default_factory=dict)  # what the running process reads
    held: set[int] = field(default_factory=set)  # pages that the disk has held at some time

    def write(self, offset: int, data: bytes) -> None:
        """Add a version to every page that ``data`` touches."""
        done = 0
        while done < len(data):
            number, start = divmod(offset + done, PAGE)
            part = data[done : done + PAGE - start]
            newest = self.seen.get(number, bytes(PAGE))
            self._add(number, newest[:start] + part + newest[start + len(part) :])
            done += len(part)
        self.resize(max(self.sizes[-1], offset + len(data)))

    def resize(self, size: int) -> None:
        """Note a size; zeros beyond it, should it grow again."""
        if size == self.sizes[-1]:
            return
        for number, page in list(self.seen.items()):
            kept = min(max(size - number * PAGE, 0), PAGE)
            if any(page[kept:]):
                self._add(number, page[:kept] + bytes(PAGE - kept))
        self.sizes.append(size)

    def sync(self) -> None:
        """Only the newest versions are left."""
        self.pages = {number: versions[-1:] for number, versions in self.pages.items()}
        self.held.update(self.pages)
        self.sizes = self.sizes[-1:]

    def lose(self) -> None:
        """A sync failed: the kernel calls the pages clean, and the disk has the old ones."""
        self.pages = {number: versions[:1] for number, versions in self.pages.items()}

    def _add(self, number: int, page: bytes) -> None:
        self.pages.setdefault(number, [bytes(PAGE)]).append(page)
        self.seen[number] = page


@dataclass
class Disk:
    """Files, durable entries of the directory, and entries that are on their way."""

    files: list[File] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)
    pending: list[dict[str, int | None]] = field(default_factory=list)
    exists: bool = False  # the directory, durably
    made: bool = False

    @classmethod
    def of(cls, directory: Path) -> "Disk":
        """A disk on which all of ``directory`` is durable."""
        disk = cls()
        disk.exists = disk.made = directory.is_dir()
        for file in sorted(directory.iterdir()) if disk.exists else []:
            disk.entries[file.name] = disk.create()
            disk.files[-1].write(0, file.read_bytes())
            disk.files[-1].sync()
        return disk

    def create(self) -> int:
        """A new file, without a name yet."""
        self.files.append(File())
        return len(self.files) - 1

    def newest(self) -> dict[str, int]:
        """Entries as the running process sees them."""
        return _applied(self.entries, self.pending)


def _applied(entries: dict[str, int], changes: Sequence[dict[str, int | None]]) -> dict[str, int]:
    result: dict[str, int | None] = {**entries}
    for change in changes:
        result.update(change)
    return {name: file for name, file in result.items() if file is not None}


@dataclass(frozen=True)
class Instant:
    """A point at which the power may fail: a factory of disks, and what was promised by then."""

    step: int
    name: str
    safe: frozenset[int]


class Recorder:
    """Plays the calls of a run onto a ``Disk``, and offers each instant to ``at``."""

    def __init__(self, directory: Path, at: Callable[[Disk, Instant], None]) -> None:
        self.directory = directory.absolute()
        self.disk = Disk.of(directory)
        self.safe: set[int] = set()
        self.steps = 0
        self.failing: Callable[[Call], BaseException | None] = lambda call: None
        self._at = at

    def run(self, work: Callable[[], None]) -> None:
        """Record ``work``; the instants before its first change and after its last are offered."""
        self._offer("begin")
        with watched(self.directory.parent, self._hook):
            work()

    def acknowledge(self, positions: Sequence[int]) -> None:
        """The cache has promised that these records survive."""
        self.safe.update(positions)
        self._offer("acknowledged")

    def _offer(self, name: str) -> None:
        self._at(self.disk, Instant(self.steps, name, frozenset(self.safe)))
        self.steps += 1

    def _hook(self, call: Call, proceed: Callable[[], Any]) -> Any:
        if (error := self.failing(call)) is not None:
            if call.name in ("fsync", "fdatasync"):
                self._lose(call)
            raise error
        apply = getattr(self, f"_{call.name}", None)
        if apply is None:
            return proceed()
        result = proceed()
        before = self.disk.newest() if call.name in ("fsync", "fdatasync") else {}
        apply(call, before)
        self._offer(f"{call.name} {Path(call.path).name}")
        return result

    def _file(self, call: Call) -> File:
        return self.disk.files[self.disk.newest()[Path(call.path).name]]

    def _create(self, call: Call, _: Any) -> None:
        self.disk.pending.append({Path(call.path).name: self.disk.create()})

    def _pwrite(self, call: Call, _: Any) -> None:
        self._file(call).write(call.args[2], bytes(call.args[1]))

    def _ftruncate(self, call: Call, _: Any) -> None:
        self._file(call).resize(call.args[1])

    def _posix_fallocate(self, call: Call, _: Any) -> None:
        file = self._file(call)
        file.resize(max(file.sizes[-1], call.args[1] + call.args[2]))

    def _fsync(self, call: Call, newest: dict[str, int]) -> None:
        if call.path == str(self.directory):
            self.disk.entries, self.disk.pending = newest, []
        elif call.path == str(self.directory.parent):
            self.disk.exists = self.disk.made
        else:
            self._file(call).sync()

    _fdatasync = _fsync

    def _lose(self, call: Call) -> None:
        if call.path not in (str(self.directory), str(self.directory.parent)):
            self._file(call).lose()

    def _rename(self, call: Call, _: Any) -> None:
        old, new = Path(call.path).name, Path(call.target).name
        self.disk.pending.append({old: None, new: self.disk.newest()[old]})

    _replace = _rename

    def _unlink(self, call: Call, _: Any) -> None:
        self.disk.pending.append({Path(call.path).name: None})

    def _mkdir(self, call: Call, _: Any) -> None:
        self.disk.made = True


def images(disk: Disk, generator: random.Random, most: int) -> Iterator[Image | None]:
    """Directories that a power loss may leave now; None where there is no directory.

    All of them (torn pages apart, which are sampled) where there are at most ``most``; else the
    extremes, each single difference from them, and a sample of that size.
    """
    pages = [
        (file, number)
        for file in disk.files
        for number, versions in sorted(file.pages.items())
        if len(versions) > 1
    ]
    sizes = [file for file in disk.files if len(file.sizes) > 1]
    options = [len(file.pages[number]) for file, number in pages]
    options += [len(file.sizes) for file in sizes] + [2] * len(disk.pending)
    picks: Iterator[tuple[int, ...]] = itertools.product(*map(range, options))
    if math.prod(options) > most:
        picks = _sample(options, generator, most)
    if not disk.exists:
        yield None
    for pick in picks:
        chosen = iter(pick)
        page_of = {(id(file), number): next(chosen) for file, number in pages}
        size_of = {id(file): next(chosen) for file in sizes}
        entries = _applied(disk.entries, [change for change in disk.pending if next(chosen)])
        for torn in (None, generator) if pages else (None,):
            yield {
                name: _bytes(disk.files[file], page_of, size_of, torn)
                for name, file in entries.items()
            }


def _sample(options: list[int], generator: random.Random, count: int) -> Iterator[tuple[int, ...]]:
    newest = [number - 1 for number in options]
    yield tuple(0 for _ in options)
    yield tuple(newest)
    for at in range(len(options)):
        yield tuple(0 if i == at else new for i, new in enumerate(newest))
        yield tuple(new if i == at else 0 for i, new in enumerate(newest))
    for _ in range(count):
        bias = generator.choice((0.1, 0.5, 0.9))
        yield tuple(
            new if generator.random() < bias else generator.randrange(new + 1) for new in newest
        )


def _bytes(
    file: File,
    page_of: dict[tuple[int, int], int],
    size_of: dict[int, int],
    torn: random.Random | None,
) -> bytes:
    size = file.sizes[size_of.get(id(file), 0)]
    data = bytearray(size)
    for number, versions in file.pages.items():
        page = versions[page_of.get((id(file), number), 0)]
        if torn is not None and len(versions) > 1 and torn.random() < 0.3:
            cut = SECTOR * torn.randrange(1, PAGE // SECTOR)
            page = page[:cut] + torn.choice(versions)[cut:]
            if number not in file.held and torn.random() < 0.3:
                page = JUNK[:PAGE]
        start = number * PAGE
        if start < size:
            part = page[: size - start]
            data[start : start + len(part)] = part
    return bytes(data)


def fingerprint_of(image: Image | None, safe: frozenset[int]) -> bytes:
    """Tells equal images with equal promises apart from others."""
    state = hashlib.blake2b(repr(sorted(safe)).encode(), digest_size=16)
    for name, data in sorted((image or {"(none)": b""}).items()):
        state.update(f"{name} {len(data)} ".encode() + data)
    return state.digest()


def materialise(image: Image | None, path: Path) -> None:
    """Write an image as a directory."""
    if image is None:
        return
    path.mkdir()
    for name, data in image.items():
        fd = real.open(path / name, os.O_WRONLY | os.O_CREAT)
        real.pwrite(fd, data, 0)
        real.close(fd)
