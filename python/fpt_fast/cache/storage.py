"""Files as a crash-safe cache needs them: durable writes, a lock, honest errors on a full disk."""

import contextlib
import errno
import fcntl
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fpt_fast.cache.errors import CacheBusy, CacheError, CacheFull, corrupt
from fpt_fast.words import format_bytes

LOCK_FILE = "lock"
TEMPORARY_SUFFIX = ".tmp"

_logger = logging.getLogger("fpt_fast")
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
_NO_PREALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)
# On these a mapped page can fail to arrive, which kills the process instead of raising an error.
_NETWORK_FILE_SYSTEMS = (
    *("9p", "afs", "beegfs", "ceph", "cifs", "fuse", "glusterfs", "gpfs", "lustre", "ncpfs"),
    *("nfs", "orangefs", "pvfs2", "smb", "virtiofs", "wekafs"),
)


@contextmanager
def naming(file: Path | int) -> Iterator[None]:
    """Add the name of the file (a path, or a descriptor) to an error that does not say it."""
    try:
        yield
    except OSError as error:
        if error.filename is None and not isinstance(error, CacheError):
            if isinstance(file, int):
                with contextlib.suppress(OSError):  # no /proc: nothing to add
                    error.filename = str(Path(f"/proc/self/fd/{file}").readlink())
            else:
                error.filename = str(file)
        raise


def open_regular(file: Path, flags: int = os.O_RDONLY) -> tuple[int, int]:
    """Open a regular file that is not a symbolic link: (descriptor, size in bytes).

    Raises ``CacheCorrupt`` for a link, directory, pipe or device under that name, and ``OSError``
    as ``os.open`` does.
    """
    try:
        # O_NONBLOCK keeps a pipe under this name from blocking; regular files ignore it.
        fd = os.open(file, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise corrupt(file, "is a symbolic link, and a cache has none") from None
        if error.errno == errno.EISDIR:
            raise corrupt(file, "is a directory, expected a file") from None
        raise
    try:
        with naming(file):
            status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise corrupt(file, "is not a regular file")
    except BaseException:
        os.close(fd)
        raise
    return fd, status.st_size


def file_mode(file: Path) -> int | None:
    """Kind and permissions of what has this name, a symbolic link included; None for nothing.

    Raises ``OSError`` where that cannot be found out, unlike ``Path.exists``, which would call a
    file absent that the disk fails to show.
    """
    try:
        return file.lstat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def exists(file: Path) -> bool:
    """True where something has this name."""
    return file_mode(file) is not None


@contextmanager
def opened(file: Path, flags: int = os.O_RDONLY) -> Iterator[tuple[int, int]]:
    """``open_regular`` for the length of a ``with`` block."""
    fd, size = open_regular(file, flags)
    with naming(file):
        try:
            yield fd, size
        finally:
            os.close(fd)


def read_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` on; return the bytes read, fewer only at the file's end."""
    done = 0
    with naming(fd):
        while done < len(buffer):
            count = os.preadv(fd, [buffer[done:]], offset + done)
            if count == 0:
                break
            done += count
    return done


def read_optional(file: Path) -> bytes:
    """All bytes of a file; none where there is no such file."""
    try:
        with opened(file) as (fd, size):
            data = bytearray(size)
            return bytes(data[: read_into(fd, memoryview(data), 0)])
    except FileNotFoundError:
        return b""


def write_all(fd: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset``, in as many calls as it takes."""
    view = memoryview(data)
    done = 0
    while done < len(view):
        done += os.pwrite(fd, view[done:], offset + done)


def sync_data(fd: int) -> None:
    """Return once the file's data (and size) is on stable storage."""
    # macOS has no fdatasync.
    getattr(os, "fdatasync", os.fsync)(fd)


def sync_directory(directory: Path) -> None:
    """Return once the directory's entries are on stable storage."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    with naming(directory):
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def make_directory(directory: Path) -> None:
    """Make a directory and those above it, each durably: a power loss takes none of them."""
    made = [at for at in (directory, *directory.parents) if not exists(at)]
    directory.mkdir(parents=True, exist_ok=True)
    for at in reversed(made):
        sync_directory(at.parent)


def write_temporary(file: Path, data: bytes) -> Path:
    """Write ``data`` durably beside ``file``; return the path to rename."""
    temporary = file.with_name(file.name + TEMPORARY_SUFFIX)
    temporary.unlink(missing_ok=True)
    with opened(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL) as (fd, _):
        write_all(fd, data, 0)
        os.fsync(fd)
    return temporary


def write_atomic(file: Path, data: bytes) -> None:
    """Replace ``file`` by ``data``: after a crash it holds the old bytes or the new ones."""
    write_temporary(file, data).replace(file)
    sync_directory(file.parent)


def preallocate(fd: int, size: int, *, network: bool) -> None:
    """Make a file ``size`` bytes long, with disk blocks reserved where the file system can."""
    # Where the file system cannot, glibc touches every block: too slow over a network.
    if not network and hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise
    os.ftruncate(fd, size)


@contextmanager
def report_full_disk(directory: Path, needed: int, state: str) -> Iterator[None]:
    """Turn "no space", "over quota" and "file too large" into ``CacheFull``.

    ``needed``: bytes about to be written; ``state``: what is safe already.
    """
    try:
        yield
    except OSError as error:
        if isinstance(error, CacheFull) or error.errno not in _FULL:
            raise
        reason = {
            errno.ENOSPC: "the disk is full",
            errno.EDQUOT: "the disk quota is used up",
            errno.EFBIG: "the file size limit is reached (see `ulimit -f`)",
        }[error.errno]
        raise CacheFull(
            error.errno,
            f"{directory}: {reason}: needs {format_bytes(needed)}, "
            f"{format_bytes(free_bytes(directory))} are free; {state}; make room, then preload "
            "again to resume",
        ) from error


def free_bytes(path: Path) -> int:
    """Bytes that this user can still write at ``path``, which need not exist yet."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    return shutil.disk_usage(existing).free


def is_network_file_system(path: Path) -> bool:
    """True where ``path`` is on NFS, Lustre, SMB, FUSE or the like, by /proc/self/mountinfo."""
    # Names go on with a version or a flavour: nfs4, smb3, fuse.sshfs.
    return file_system_type(path).startswith(_NETWORK_FILE_SYSTEMS)


def file_system_type(path: Path, mountinfo: Path = Path("/proc/self/mountinfo")) -> str:
    """Name of the file system that holds ``path``, such as ``ext4``; empty where unknown."""
    try:
        lines = mountinfo.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    target = path.resolve()
    best, kind = -1, ""
    for line in lines:
        left, _, right = line.partition(" - ")
        fields = left.split(" ")
        if len(fields) < 5 or not right:
            continue
        point = Path(_unescape(fields[4]))
        # Of two mounts on one point, the later one hides the other.
        if target.is_relative_to(point) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split(" ")[0]
    return kind


def _unescape(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


class DirectoryLock:
    """At most one builder of a directory at a time, across processes.

    The operating system drops the lock of a process that dies.  Raises ``CacheBusy`` where
    another process holds it, and names that process.
    """

    def __init__(self, directory: Path) -> None:
        self._file = directory / LOCK_FILE
        self._fd = -1
        # The last word tells one hold of a process from its next.
        self.owner = f"{os.getpid()} {socket.gethostname()} {os.urandom(8).hex()}\n".encode()
        try:
            with report_full_disk(directory, 1, "nothing was changed"), naming(self._file):
                self._open()
        except BaseException:
            self.release()
            raise

    def _open(self) -> None:
        while self._fd < 0:
            fd, _ = open_regular(self._file, os.O_RDWR | os.O_CREAT)
            try:
                self._acquire(fd)
                current = self._is_current(fd)
            except BaseException:
                os.close(fd)
                raise
            if current:
                self._fd = fd
            else:  # the last owner removed the file between our open and our lock
                os.close(fd)
        os.ftruncate(self._fd, 0)
        write_all(self._fd, self.owner, 0)

    def _acquire(self, fd: int) -> None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(fd, 300, 0).decode(errors="replace").split()
            who = f"process {owner[0]} on {owner[1]}" if len(owner) > 1 else "another process"
            raise CacheBusy(
                f"{self._file.parent} is being built by {who}; wait until it ends, or stop it"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            _logger.warning(
                "%s is on a file system without locks: do not run two builds of it at once",
                self._file.parent,
            )

    def _is_current(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), self._file.stat(follow_symlinks=False))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        """Remove the lock file and let others build; harmless when called again."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        # Removed while still held, so that nobody else's lock file can be hit.
        try:
            self._file.unlink(missing_ok=True)
        finally:
            with naming(self._file):
                os.close(fd)
