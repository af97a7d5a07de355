"""What every kernel costs on every architecture, told without a GPU.

``python -m fptkernels.compile_report [TEXT]`` compiles each row of the launch table (those with
TEXT in their name) and prints registers and spills, as ptxas reports them of the binary that
Triton loads, shared memory, and what is over a limit; its exit status is 1 where something is.
Needs a process in which TRITON_INTERPRET is not 1.  Triton caches what it has compiled.
"""

import argparse
import contextlib
import importlib
import io
import json
import multiprocessing
import os
import re
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.cache import get_cache_manager

from fptkernels.launch_table import CompileSpec, is_interpreted

KERNEL_MODULES = (
    "frozen_attention",
    "token_scores",
    "select_tokens",
    "quantise_kv",
    "prompt_attention",
)
# Bytes that one block may use.
SHARED_LIMITS = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}

_LOG = "ptxas.log"


@dataclass(frozen=True, slots=True)
class Figures:
    """Of one compiled kernel: registers a thread, bytes spilled a thread, bytes shared a block."""

    name: str
    architecture: str
    registers: int
    spill_stores: int
    spill_loads: int
    shared: int


@cache
def all_specs() -> tuple[CompileSpec, ...]:
    """Every kernel in every dtype and row of the launch table."""
    modules = (importlib.import_module(f"fptkernels.{name}") for name in KERNEL_MODULES)
    return tuple(spec for module in modules for spec in module.compile_specs())


def measure(spec: CompileSpec) -> Figures:
    """Compile one kernel and read its figures."""
    names = spec.kernel.arg_names
    source = ASTSource(
        spec.kernel,
        {name: spec.signature.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in spec.constexprs.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
    )
    compiled, log = _compiled_and_log(
        source,
        target=GPUTarget("cuda", int(spec.architecture.removeprefix("sm_")), 32),
        options={"num_warps": spec.num_warps, "num_stages": spec.num_stages},
    )
    return Figures(
        spec.name,
        spec.architecture,
        registers=_number(r"Used (\d+) registers", log),
        spill_stores=_number(r"(\d+) bytes spill stores", log),
        spill_loads=_number(r"(\d+) bytes spill loads", log),
        shared=compiled.metadata.shared,
    )


def complaints(figures: Figures) -> list[str]:
    """What is over a limit: shared memory of a block, and spills where ViT-B runs on Hopper.

    Spills elsewhere (heads of other than 64 channels, other architectures) only stand in the table.
    """
    found = []
    spilled = max(figures.spill_stores, figures.spill_loads)
    if spilled and figures.architecture == "sm_90" and "D64" in figures.name.split():
        found.append(f"spills {spilled} bytes")
    limit = SHARED_LIMITS[figures.architecture]
    if figures.shared > limit:
        found.append(f"shared memory over {limit} bytes")
    return found


def table(rows: Iterable[Figures]) -> str:
    """One line a kernel, and what is over a limit."""
    head = f"{'kernel':48} {'arch':7} {'registers':>9} {'spills':>7} {'shared':>7}"
    lines = [
        f"{row.name:48} {row.architecture:7} {row.registers:9} "
        f"{max(row.spill_stores, row.spill_loads):7} {row.shared:7} {'; '.join(complaints(row))}"
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in [head, *lines])


def measure_all(text: str = "", workers: int | None = None) -> list[Figures]:
    """Figures of every spec with ``text`` in its name, by several processes."""
    if is_interpreted():
        raise RuntimeError("kernels are interpreted here: set TRITON_INTERPRET=0 before starting")
    indices = [i for i, spec in enumerate(all_specs()) if text in spec.name]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers or os.cpu_count(), mp_context=context) as pool:
        return list(pool.map(_measure_by_index, indices, chunksize=4))


def _measure_by_index(index: int) -> Figures:
    return measure(all_specs()[index])


def _compiled_and_log(source: ASTSource, **how: Any) -> tuple[CompiledKernel, str]:
    """A kernel, and what ptxas said when it was compiled: kept in Triton's cache beside it."""
    compiled, log = _compile(source, **how)
    kept = get_cache_manager(compiled.hash)
    if not log and (path := kept.get_file(_LOG)) is not None:
        return compiled, Path(path).read_text(encoding="utf-8")
    if not log:  # compiled by somebody else
        with knobs.compilation.scope():
            knobs.compilation.always_compile = True
            compiled, log = _compile(source, **how)
    kept.put(log, _LOG, binary=False)
    return compiled, log


def _compile(source: ASTSource, **how: Any) -> tuple[CompiledKernel, str]:
    """A kernel, and what Triton prints of ptxas: nothing where it had compiled it before."""
    printed = io.StringIO()
    with knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
        knobs.nvidia.dump_ptxas_log = True
        return triton.compile(source, **how), printed.getvalue()


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"ptxas reported nothing like {pattern!r}:\n{log}")
    return int(found[1])


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, or JSON; 1 where a kernel is over a limit."""
    parser = argparse.ArgumentParser(prog="python -m fptkernels.compile_report")
    parser.add_argument("text", nargs="?", default="", help="only kernels with this in their name")
    parser.add_argument("--json", action="store_true", help="figures as JSON")
    options = parser.parse_args(arguments)
    rows = measure_all(options.text)
    out = json.dumps([asdict(row) for row in rows], indent=1) if options.json else table(rows)
    sys.stdout.write(f"{out}\n")
    return int(any(complaints(row) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
