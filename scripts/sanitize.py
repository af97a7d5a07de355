"""The C++ extension under sanitizers; ``make sanitize`` runs all.

    python scripts/sanitize.py address    # ASan and UBSan: every op at every level, and the reader
    python scripts/sanitize.py stack      # ASan again, stack after returns: vectors of 32 bytes
    python scripts/sanitize.py thread     # TSan: the reader's threads

The extension alone is instrumented; the sanitizer's library is loaded before Python and torch, so
that memory of tensors is watched too.  What a sanitizer finds ends the tests.  GCC, Linux.
"""

import argparse
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# The processors' own instructions are compiled as they are; these flags come after setup.py's.
COMMON = "-g -O1 -fno-omit-frame-pointer"
ADDRESS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined"
# libstdc++ too: what it throws must be found before ASan looks for it.
ADDRESS_LIBRARIES = ("libasan.so", "libstdc++.so.6")


@dataclass(frozen=True)
class Sanitizer:
    """How to build, what to load before Python, what to set, and what to run."""

    flags: str
    libraries: tuple[str, ...]
    environment: dict[str, str]
    tests: tuple[str, ...]
    fixed_addresses: bool = False
    options: tuple[str, ...] = ()
    build_of: str | None = None  # another one's, whose flags are the same


SANITIZERS = {
    "address": Sanitizer(
        ADDRESS,
        ADDRESS_LIBRARIES,
        {
            # Python and torch keep much until the process ends.  The stack that ASan has for uses
            # after a return stands at multiples of 32, which vectors of 64 bytes do not bear (GCC
            # 12): there is a run of its own for that.
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=0",
            "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        },
        ("tests/ops", "tests/native", "tests/test_native.py", "tests/cache/test_fetch.py"),
    ),
    # The same build at levels whose vectors are shorter.
    "stack": Sanitizer(
        ADDRESS,
        ADDRESS_LIBRARIES,
        {
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1:detect_stack_use_after_return=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
            "FPT_NATIVE_LEVEL": "avx2",
        },
        ("tests/ops", "tests/native", "tests/cache/test_fetch.py"),
        options=("-k", "not amx and not avx512"),
        build_of="address",
    ),
    "thread": Sanitizer(
        "-fsanitize=thread",
        ("libtsan.so",),
        {"TSAN_OPTIONS": "halt_on_error=1:abort_on_error=1:report_signal_unsafe=0"},
        ("tests/cache/test_fetch.py", "tests/native/test_reader_threads.py"),
        # TSan has places of its own for memory, and Linux must put nothing else there.
        fixed_addresses=True,
    ),
}


def build(name: str, sanitizer: Sanitizer) -> Path:
    """Compile the extension with a sanitizer; the library."""
    folder = ROOT / "build" / f"sanitize-{sanitizer.build_of or name}"
    folder.mkdir(parents=True, exist_ok=True)
    compiler = folder / "c++"
    compiler.write_text(f'#!/bin/sh\nexec c++ "$@" {COMMON} {sanitizer.flags}\n')
    compiler.chmod(0o755)
    subprocess.run(
        [
            *(sys.executable, "setup.py", "--quiet", "build_ext"),
            *("--build-lib", str(folder), "--build-temp", str(folder / "objects")),
        ],
        cwd=ROOT,
        env={**os.environ, "CXX": str(compiler)},
        check=True,
    )
    return folder / "fpt_fast" / "_native.so"


def library(name: str) -> str:
    """Where the compiler has a library."""
    found = subprocess.run(
        ["c++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(f"the C++ compiler has no {name}: install GCC's sanitizers")
    return found


def main() -> int:
    """Build and test; pytest's exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SANITIZERS)
    parser.add_argument("tests", nargs="*", help="for pytest, instead of those of the sanitizer")
    given = parser.parse_args()
    sanitizer = SANITIZERS[given.name]
    native = build(given.name, sanitizer)
    prefix = ["setarch", platform.machine(), "-R"] if sanitizer.fixed_addresses else []
    tests = given.tests or [*sanitizer.tests]
    return subprocess.run(
        [
            *(*prefix, sys.executable, "-m", "pytest", "-q", "-x", "-n", "0"),
            *("-s", "-p", "no:cacheprovider", "-p", "no:faulthandler", *sanitizer.options, *tests),
        ],
        cwd=ROOT,
        env={
            **os.environ,
            **sanitizer.environment,
            "FPT_NATIVE_LIBRARY": str(native),
            "LD_PRELOAD": ":".join(map(library, sanitizer.libraries)),
        },
        check=False,
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
