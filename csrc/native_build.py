"""Build backend: setuptools, which also asks for torch where its headers are not at hand.

``torch.stable`` needs headers at build time, and an isolated build sees no installed torch.  That
of the environment that is installed into will do: its files are read, and it is not imported.
Also names the platform of a wheel (``platform_tag``).
"""

import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from os import environ
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)
from setuptools.modified import newer_group

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "find_torch",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "is_current",
    "platform_tag",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
    "why_not",
]

OLDEST_TORCH = (2, 10)
# The first glibc whose manylinux policy has these versions of libstdc++'s symbols (PEP 600).
LIBSTDCXX = {
    "GLIBCXX_3.4": {19: 17, 22: 24, 24: 27, 28: 31, 29: 34, 30: 35, 33: 39},
    "CXXABI_1.3": {7: 17, 10: 24, 11: 27, 12: 31, 13: 34, 15: 39},
}


def find_torch() -> Path | None:
    """Folder of the first installed torch that is new enough, or None."""
    places = [*sys.path, sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for place in dict.fromkeys(places):
        torch = Path(place) / "torch"
        if not (torch / "include/torch/csrc/stable/ops.h").exists():
            continue
        version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
        if version and (int(version[1]), int(version[2])) >= OLDEST_TORCH:
            return torch
    return None


def why_not() -> str | None:
    """Why nothing can be compiled here, torch aside; None where it can."""
    if sys.platform != "linux":
        return f"it is built on Linux only, and this is {sys.platform}"
    compiler = environ.get("CXX", "c++").split()[0]
    if shutil.which(compiler) is None:
        return f"there was no C++ compiler ({compiler})"
    return None


def is_current(built: Path, parts: Iterable[str | Path]) -> bool:
    """Whether ``built`` is there and none of ``parts``, all that it is made of, is newer."""
    return not newer_group([str(part) for part in parts], str(built))


def _torch_if_needed() -> list[str]:
    needed = why_not() is None and find_torch() is None
    return ["torch>=" + ".".join(map(str, OLDEST_TORCH))] if needed else []


def get_requires_for_build_wheel(config_settings: dict[str, object] | None = None) -> list[str]:
    """What setuptools needs, and torch where there are no headers."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_torch_if_needed()]


def get_requires_for_build_editable(config_settings: dict[str, object] | None = None) -> list[str]:
    """What setuptools needs, and torch where there are no headers."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_torch_if_needed()]


def platform_tag(library: Path, platform: str) -> str:
    """``linux_x86_64`` -> ``manylinux_2_34_x86_64``, the oldest that has all symbols which
    ``library`` needs; unchanged where there is no library or none has them.

    libtorch_cpu.so is left to torch, whose own wheels have their own tag.
    """
    system, _, machine = platform.partition("_")
    if system != "linux" or not library.exists():
        return platform
    names = library.read_bytes()
    minors = [17, *(int(minor) for minor in re.findall(rb"(?<=\0)GLIBC_2\.(\d+)(?=[.\0])", names))]
    for name, first_glibc in LIBSTDCXX.items():
        needed = max(
            map(int, re.findall(rf"(?<=\0){name}\.(\d+)(?=\0)".encode(), names)), default=0
        )
        enough = [glibc for version, glibc in first_glibc.items() if version >= needed]
        if not enough:
            return platform
        minors.append(min(enough))
    return f"manylinux_2_{max(minors)}_{machine}"
