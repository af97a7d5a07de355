"""Writing a file so that a reader sees the old one or the new one, whole, and never a part; and
what may be replaced by another."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import TextIO


@contextmanager
def write_atomically(path: Path) -> Iterator[TextIO]:
    """Open a text file for writing beside ``path``; on success it replaces ``path``.

    Written to a temporary name, flushed to the disk, renamed, and the directory flushed.  On an
    exception ``path`` is as it was.  Newlines are written as given (for the csv module).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def require_free_file(path: Path, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``path`` is there and is not to be replaced."""
    if path.is_dir():
        raise IsADirectoryError(f"--output must be a file, {path} is a folder; name another")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} is there already; choose another --output, or replace it with --overwrite"
        )


def require_free_folder(path: Path, mark: str, *, overwrite: bool) -> None:
    """Raise ``FileExistsError`` where ``path`` holds anything, unless that is to be replaced, and
    was written by the same command: which leaves the file ``mark``."""
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"--output must be a folder, {path} is a file; name another")
    if not path.is_dir() or not any(path.iterdir()):
        return
    if not (path / mark).is_file():
        raise FileExistsError(
            f"{path} is not empty and has no {mark}; it will not be overwritten: choose another "
            "--output"
        )
    if not overwrite:
        raise FileExistsError(
            f"{path} holds those of an earlier run; choose another --output, or replace them all "
            "with --overwrite"
        )


def output_folder(
    folder: Path, keep: Callable[[], bool] | None = None
) -> AbstractContextManager[None]:
    """``folder``, empty, to write to; what an earlier run left comes back where this one fails,
    unless ``keep()``."""
    if folder.is_dir() and not any(folder.iterdir()):
        return nullcontext()
    return replaced_folder(folder, keep)


@contextmanager
def replaced_folder(folder: Path, keep: Callable[[], bool] | None = None) -> Iterator[None]:
    """An empty folder in the place of ``folder``; on success what was there is gone.

    On an exception it is back, and what was written since is gone, unless ``keep()``.
    """
    aside = folder.with_name(f".{folder.name}.replaced")
    was_there = folder.exists()
    shutil.rmtree(aside, ignore_errors=True)
    if was_there:
        folder.rename(aside)
    folder.mkdir(parents=True)
    try:
        yield
    except BaseException:
        if keep is None or not keep():
            shutil.rmtree(folder)
            if was_there:
                aside.rename(folder)
        raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename in it survives a power loss."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
