"""The cache at the record size of FPT+ on ViT-B at 512 px: write, read, verify.

``FPT_BENCH_RECORDS`` sets the number of records (default 48 with ``--full``, 184 MB; else 16).
Reading is from the page cache, and beside it, in turns, the same bytes are copied from memory to
memory by as many threads:
``extra_info["of memcpy"]`` is the ratio of the two speeds.  The plain twin has a safetensors file
for each image, in f32, as published.
"""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.beside import alternate, clock
from benchmarks.counts import Count
from benchmarks.plain.epoch import write_features
from fpt_fast.cache import CacheReader, CacheWriter, RecordLayout, verify_cache
from fpt_fast.cache import fetch as fetching
from fpt_fast.ops import quantise_kv
from fpt_fast.records import SelectedTokens

LAYOUT = RecordLayout(layers=6, heads=12, kept=205, head_width=64)
FINGERPRINT = {"backbone": "benchmark", "layers": [6, 7, 8, 9, 10, 11]}
RECORDS = int(os.environ.get("FPT_BENCH_RECORDS", "48"))
BATCH = 16
ROUNDS = 40 if RECORDS >= 48 else 8
KEYS = [f"images/{i}.png" for i in range(RECORDS)]


@pytest.fixture(scope="module")
def tokens() -> SelectedTokens:
    """One batch of features."""
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn((BATCH, *LAYOUT.kv_shape), generator=generator)
    index = torch.arange(LAYOUT.kept, dtype=torch.int32).expand(BATCH, *LAYOUT.index_shape)
    return SelectedTokens(kv.half(), index.contiguous())


def write_cache(path: Path, tokens: SelectedTokens, layout: RecordLayout = LAYOUT) -> None:
    """Build a whole cache; the same batch over and over."""
    quantise = quantise_kv if layout.has_scales else None
    with CacheWriter(path, layout, FINGERPRINT, KEYS, quantise=quantise) as writer:
        for first in range(0, RECORDS, BATCH):
            count = min(BATCH, RECORDS - first)
            part = SelectedTokens(tokens.kv[:count], tokens.index[:count])
            writer.write(range(first, first + count), part)
        writer.finish()


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, tokens: SelectedTokens) -> dict[str, Path]:
    """A finished cache of either size of element, by dtype."""
    folder = tmp_path_factory.mktemp("bench")
    for dtype in ("float16", "int8"):
        write_cache(folder / dtype, tokens, replace(LAYOUT, dtype=dtype))
    return {dtype: folder / dtype for dtype in ("float16", "int8")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tokens: SelectedTokens) -> list[Path]:
    """The published form of the same features: a file of f32 tensors for each image."""
    folder = tmp_path_factory.mktemp("files")
    paths = [folder / f"{i}.safetensors" for i in range(RECORDS)]
    write_files(paths, tokens)
    return paths


def write_files(paths: list[Path], tokens: SelectedTokens) -> None:
    for i, path in enumerate(paths):
        write_features(path, tokens.kv[i % BATCH])


def read_files(paths: list[Path]) -> Tensor:
    """A batch [B, L, 2, H, K, D] f32 as the published data set reads it."""
    loaded = [load_file(path) for path in paths]
    names = ("key_states", "value_states")
    return torch.stack([torch.stack([one[name] for one in loaded]) for name in names], 2)


def bench_write(benchmark: BenchmarkFixture, tmp_path: Path, tokens: SelectedTokens) -> None:
    """Durable writes: each batch waits for the disk, which the plain files do not."""
    paths = iter(tmp_path / str(i) for i in range(1000))
    plain = [tmp_path / f"{i}.safetensors" for i in range(RECORDS)]
    benchmark.group = "cache, write"
    alternate(
        benchmark,
        lambda: write_cache(next(paths), tokens),
        lambda: write_files(plain, tokens),
        dtype="float16",
        count=Count(flops=0, bytes=RECORDS * LAYOUT.record_bytes),
        rounds=3,
    )
    assert verify_cache(tmp_path / "0").ok


def memcpy_of(count: int, threads: int) -> Callable[[int], Any]:
    """What copies batch *i* of ``count`` bytes to a buffer that is there, with ``threads``."""
    source = np.ones((RECORDS // BATCH, threads, count // threads), np.uint8)
    target = np.zeros(source.shape[1:], np.uint8)
    pool = ThreadPoolExecutor(threads)
    return lambda i: list(pool.map(np.copyto, target, source[i]))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("verify", [True, False], ids=["verified", "unverified"])
@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("way", ["native", "python"])
def bench_read(
    benchmark: BenchmarkFixture,
    monkeypatch: pytest.MonkeyPatch,
    caches: dict[str, Path],
    tokens: SelectedTokens,
    files: list[Path],
    way: str,
    mode: Any,
    dtype: str,
    verify: bool,
    threads: int,
) -> None:
    """Every record once, in batches, in an order that is not the one on disk."""
    assert fetching.can_read_records(), "these figures need the C++ extension: make native"
    monkeypatch.setattr(fetching, "can_read_records", lambda: way == "native")
    order = torch.randperm(RECORDS, generator=torch.Generator().manual_seed(1)).tolist()
    batches = [order[first : first + BATCH] for first in range(0, RECORDS, BATCH)]
    with CacheReader(caches[dtype], mode=mode, verify=verify, threads=threads) as reader:
        moved = RECORDS * reader.layout.record_bytes
        benchmark.group = "cache, read"
        last = alternate(
            benchmark,
            lambda: [reader.read(rows) for rows in batches][-1],
            lambda: [read_files([files[row] for row in rows]) for rows in batches],
            dtype=dtype,
            count=Count(flops=0, bytes=moved),
        )
        if benchmark.enabled:
            # Batch by batch in turns, and the best time of each: short enough to be undisturbed.
            copy = memcpy_of(moved // len(batches), threads)
            times = [
                (clock(lambda i=i: copy(i)), clock(lambda rows=rows: reader.read(rows)))
                for _ in range(ROUNDS)
                for i, rows in enumerate(batches)
            ]
            copying, reading = (
                sum(min(kind[i :: len(batches)]) for i in range(len(batches)))
                for kind in zip(*times, strict=True)
            )
            benchmark.extra_info["GB/s, best"] = round(moved / reading / 1e9, 2)
            benchmark.extra_info["of memcpy"] = round(copying / reading, 3)
    kv = tokens.kv[[row % BATCH for row in batches[-1]]]
    assert torch.equal(last.kv, kv if dtype == "float16" else quantise_kv(kv)[0])


def bench_verify(benchmark: BenchmarkFixture, caches: dict[str, Path], files: list[Path]) -> None:
    """The full check of ``fpt-fast cache verify``; beside it, sha256 of the published files."""

    def plain() -> list[str]:
        return [hashlib.sha256(path.read_bytes()).hexdigest() for path in files]

    benchmark.group = "cache, verify"
    report = alternate(
        benchmark,
        lambda: verify_cache(caches["float16"]),
        plain,
        dtype="float16",
        count=Count(flops=0, bytes=RECORDS * LAYOUT.record_bytes),
    )
    assert report.ok
