"""The cache at the record size of FPT+ on ViT-B at 512 px: write, read, verify.

``FPT_BENCH_RECORDS`` sets the number of records (default 8, 31 MB); for figures of the disk rather
than of the page cache, take more than fit in memory.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout, verify_cache
from fpt_fast.records import SelectedTokens

LAYOUT = RecordLayout(layers=6, heads=12, kept=205, head_width=64)
FINGERPRINT = {"backbone": "benchmark", "layers": [6, 7, 8, 9, 10, 11]}
RECORDS = int(os.environ.get("FPT_BENCH_RECORDS", "8"))
BATCH = 4
KEYS = [f"images/{i}.png" for i in range(RECORDS)]


@pytest.fixture(scope="module")
def tokens() -> SelectedTokens:
    """One batch of features."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn((BATCH, *LAYOUT.kv_shape), generator=generator)
    index = torch.arange(LAYOUT.kept, dtype=torch.int32).expand(BATCH, *LAYOUT.index_shape)
    return SelectedTokens(kv.half(), index.contiguous())


def write_cache(path: Path, tokens: SelectedTokens) -> None:
    """Build a whole cache; the same batch over and over."""
    with CacheWriter(path, LAYOUT, FINGERPRINT, KEYS) as writer:
        for first in range(0, RECORDS, BATCH):
            count = min(BATCH, RECORDS - first)
            part = SelectedTokens(tokens.kv[:count], tokens.index[:count])
            writer.write(range(first, first + count), part)
        writer.finish()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, tokens: SelectedTokens) -> Iterator[Path]:
    """A finished cache."""
    path = tmp_path_factory.mktemp("bench") / "cache"
    write_cache(path, tokens)
    yield path


def record_rate(benchmark: BenchmarkFixture) -> None:
    """Bytes moved by one round, and from them GB/s where the round was timed."""
    benchmark.extra_info["bytes"] = RECORDS * LAYOUT.record_bytes
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median
        benchmark.extra_info["GB/s"] = round(RECORDS * LAYOUT.record_bytes / seconds / 1e9, 3)


def bench_write(benchmark: BenchmarkFixture, tmp_path: Path, tokens: SelectedTokens) -> None:
    """Durable writes: each batch waits for the disk."""
    paths = iter(tmp_path / str(i) for i in range(1000))

    def fresh() -> tuple[tuple[Path, SelectedTokens], dict[str, Any]]:
        return (next(paths), tokens), {}

    benchmark.pedantic(write_cache, setup=fresh, rounds=3)
    record_rate(benchmark)
    assert verify_cache(tmp_path / "0").ok


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("mode", ["mmap", "pread"])
def bench_read(
    benchmark: BenchmarkFixture,
    cache: Path,
    tokens: SelectedTokens,
    mode: Any,
    verify: bool,
    threads: int,
) -> None:
    """Every record once, in batches, in an order that is not the one on disk."""
    order = torch.randperm(RECORDS, generator=torch.Generator().manual_seed(1)).tolist()
    batches = [order[first : first + BATCH] for first in range(0, RECORDS, BATCH)]
    with CacheReader(cache, mode=mode, verify=verify, threads=threads) as reader:
        last = benchmark(lambda: [reader.read(rows) for rows in batches][-1])
    record_rate(benchmark)
    assert torch.equal(last.kv, tokens.kv[[row % BATCH for row in batches[-1]]])


def bench_verify(benchmark: BenchmarkFixture, cache: Path) -> None:
    """The full check of ``fpt-fast cache verify``."""
    report = benchmark(verify_cache, cache)
    record_rate(benchmark)
    assert report.ok
