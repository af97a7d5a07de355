"""How far the CPU path is from what the machine can do: the tables of docs/cpu-floors.md.

The floor of a piece of work is the larger of its bytes over the bandwidth of a copy and its
operations over the rate of matrix products, both measured in the same turns as the work.  Best
times of ``--rounds`` turns, of more for what is short: the machine undisturbed, for ours, plain and
floors alike.  Writes ``benchmarks/results/floors.json``, and with ``--write`` the document, which
says how to call it.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks import bench_cache, bench_prompt_attention, bench_side_attention
from benchmarks.cases import Sizes
from benchmarks.contest import Contest
from benchmarks.floor_steps import frozen_row, step_rows
from benchmarks.floor_tables import DOCUMENT, END, START, render
from benchmarks.marked_block import write_block
from benchmarks.turns import Row, best_times, probes, processor, share
from fpt_fast.cache import CacheReader
from fpt_fast.ops.native_reasons import native_missing
from fpt_fast.records import SelectedTokens
from fpt_fast.trainer.memory import keep_freed_memory

RESULTS = Path(__file__).resolve().parent / "results" / "floors.json"
READ_MODES = ("mmap", "pread")
READ_THREADS = 2


def op_rows(full: bool, rounds: int) -> Iterator[Row]:
    """prompt_attention each way and side_attention both ways, each beside the torch expression."""
    sizes = Sizes("full" if full else "tiny")
    case = sizes.prompt[0]
    makers: list[Callable[[], Contest]] = []
    for kv_dtype in (torch.float16, torch.float32, torch.int8):
        for form in (bench_prompt_attention.FORWARD, bench_prompt_attention.BACKWARD):
            makers.append(
                lambda form=form, kv_dtype=kv_dtype: bench_prompt_attention.contest(
                    form, case, torch.float32, kv_dtype, sizes
                )
            )
        makers.append(
            lambda kv_dtype=kv_dtype: bench_prompt_attention.both_ways(case, kv_dtype, sizes)
        )
    for name in bench_side_attention.CASES:
        makers.append(lambda name=name: bench_side_attention.contest(name, sizes))
    for make in makers:
        contest = make()
        contest.check(contest.ours("native"))
        measured, ceilings = probes(full)
        best = best_times(
            {"ours": lambda c=contest: c.ours("native"), "plain": contest.plain, **measured},
            3 * rounds,  # short work, which a busy moment hides as a whole
        )
        yield {
            "what": contest.group,
            "case": contest.case,
            "dtype": contest.dtype,
            **share(contest.count, ceilings(best), best["ours"]),
            "plain_over_ours": best["plain"] / best["ours"],
        }


def read_rows(full: bool, rounds: int) -> Iterator[Row]:
    """Random records from the page cache, beside a copy of as many bytes by as many threads."""
    generator = torch.Generator().manual_seed(0)
    layout = bench_cache.LAYOUT if full else replace(bench_cache.LAYOUT, layers=1, kept=5)
    kv = torch.randn((bench_cache.BATCH, *layout.kv_shape), generator=generator).half()
    index = torch.arange(layout.kept, dtype=torch.int32)
    index = index.expand(bench_cache.BATCH, *layout.index_shape).contiguous()
    order = torch.randperm(bench_cache.RECORDS, generator=generator)[: bench_cache.BATCH].tolist()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache"
        bench_cache.write_cache(path, SelectedTokens(kv, index), layout)
        copy = bench_cache.memcpy_of(bench_cache.BATCH * layout.record_bytes, READ_THREADS)
        for mode in READ_MODES:
            for verify in (True, False):
                with CacheReader(path, mode=mode, verify=verify, threads=READ_THREADS) as reader:
                    best = best_times(
                        {"copy": lambda: copy(0), "read": lambda r=reader: r.read(order)},
                        rounds if full else 1,
                        time.perf_counter,  # it waits for threads of its own
                    )
                yield {
                    "mode": mode,
                    "verified": verify,
                    "threads": READ_THREADS,
                    "seconds": best["read"],
                    "of_memcpy": best["copy"] / best["read"],
                }


def measure(full: bool = True, rounds: int = 9) -> Row:
    """All rows, and what they were measured on."""
    keep_freed_memory(torch.device("cpu"))  # as training does, so that outputs are not mapped anew
    work, ceilings = probes(full)
    limits = ceilings(best_times(work, rounds))
    return {
        "machine": {
            "processor": processor(),
            "threads": torch.get_num_threads(),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "copy_GBs": limits.bandwidth / 1e9,
            "f32_GFLOPs": limits.flops["float32"] / 1e9,
            "bf16_GFLOPs": limits.flops["bfloat16"] / 1e9,
        },
        "ops": list(op_rows(full, rounds)),
        "reading": list(read_rows(full, 4 * rounds)),
        "steps": list(step_rows(full, rounds + rounds // 2)),
        "frozen_pass": frozen_row(full, max(1, 2 * rounds // 3)),
    }


def main() -> None:
    """Measure, write the JSON, and print the tables or write them into the document."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, whose times say nothing")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help=f"the tables into {DOCUMENT.name}")
    given = parser.parse_args()
    if why := native_missing():
        raise SystemExit(f"these figures need the C++ extension (make native): {why}")
    torch.set_num_threads(given.threads)
    result = measure(not given.tiny, given.rounds)
    given.output.parent.mkdir(parents=True, exist_ok=True)
    given.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if given.write:
        write_block(DOCUMENT, START, END, render(result))
    else:
        print(render(result))


if __name__ == "__main__":
    main()
