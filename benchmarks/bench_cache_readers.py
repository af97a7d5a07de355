"""Other ways to keep features on disk, beside ours: the same random batches from the page cache.

Every row is a reader, and its plain twin the published one (a safetensors file of f32 tensors for
each image).  ``packed`` is one file of f16 records, mapped, behind an index: what FFCV does for
samples of one size, with neither checksum nor check of any kind.  ``cache`` verifies checksums.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.bench_cache import BATCH, LAYOUT, RECORDS, read_files, write_cache, write_files
from benchmarks.beside import alternate
from benchmarks.counts import Count
from fpt_fast.cache import CacheReader
from fpt_fast.records import SelectedTokens

Read = Callable[[list[int]], Tensor]


@pytest.fixture(scope="module")
def tokens() -> SelectedTokens:
    """One batch of features, which every record is one of."""
    kv = torch.randn((BATCH, *LAYOUT.kv_shape), generator=torch.Generator().manual_seed(0))
    index = torch.arange(LAYOUT.kept, dtype=torch.int32).expand(BATCH, *LAYOUT.index_shape)
    return SelectedTokens(kv.half(), index.contiguous())


@contextmanager
def cache(folder: Path, tokens: SelectedTokens) -> Iterator[Read]:
    write_cache(folder / "cache", tokens)
    with CacheReader(folder / "cache") as reader:
        yield lambda rows: reader.read(rows).kv


@contextmanager
def safetensors_f16(folder: Path, tokens: SelectedTokens) -> Iterator[Read]:
    paths = [folder / f"{i}.safetensors" for i in range(RECORDS)]
    for i, path in enumerate(paths):
        save_file({"kv": tokens.kv[i % BATCH].contiguous()}, path)
    yield lambda rows: torch.stack([load_file(paths[row])["kv"] for row in rows])


@contextmanager
def torch_load(folder: Path, tokens: SelectedTokens) -> Iterator[Read]:
    paths = [folder / f"{i}.pt" for i in range(RECORDS)]
    for i, path in enumerate(paths):
        torch.save(tokens.kv[i % BATCH].clone(), path)
    yield lambda rows: torch.stack([torch.load(paths[row], weights_only=True) for row in rows])


@contextmanager
def packed(folder: Path, tokens: SelectedTokens) -> Iterator[Read]:
    path = folder / "packed.bin"
    with path.open("wb") as file:
        for i in range(RECORDS):
            file.write(tokens.kv[i % BATCH].numpy().tobytes())
    records = np.memmap(path, np.float16, "r", shape=(RECORDS, *LAYOUT.kv_shape))
    yield lambda rows: torch.from_numpy(records[rows])


@pytest.mark.parametrize("make", [cache, safetensors_f16, torch_load, packed])
def bench_cache_readers(
    benchmark: BenchmarkFixture,
    tmp_path: Path,
    tokens: SelectedTokens,
    make: Callable[[Path, SelectedTokens], object],
) -> None:
    """Every record once, in batches, in an order that is not the one on disk."""
    files = [tmp_path / f"plain{i}.safetensors" for i in range(RECORDS)]
    write_files(files, tokens)
    order = torch.randperm(RECORDS, generator=torch.Generator().manual_seed(1)).tolist()
    batches = [order[first : first + BATCH] for first in range(0, RECORDS, BATCH)]
    benchmark.group = "cache, readers"
    with make(tmp_path, tokens) as read:  # type: ignore[attr-defined]
        last = alternate(
            benchmark,
            lambda: [read(rows) for rows in batches][-1],
            lambda: [read_files([files[row] for row in rows]) for rows in batches],
            dtype="float16",
            count=Count(flops=0, bytes=RECORDS * LAYOUT.record_bytes),
            rounds=9,
        )
    benchmark.extra_info["reader"] = make.__name__
    assert torch.equal(last, tokens.kv[[row % BATCH for row in batches[-1]]])
