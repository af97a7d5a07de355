"""Records looked at where they are: any number of shards, checked when they are first shown."""

import gc
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache.samples import (
    DTYPES,
    LAYOUT,
    LAYOUTS,
    all_bytes,
    assert_tokens_equal,
    build_cache,
    flip,
    tokens,
)

from fpt_fast.cache import CacheCorrupt, CacheReader


@pytest.mark.parametrize("records_per_shard", [None, 4, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_view_of_all_records(tmp_path: Path, dtype: str, records_per_shard: int | None) -> None:
    layout = LAYOUTS[dtype]
    path = build_cache(tmp_path / "c", layout=layout, records_per_shard=records_per_shard)
    before = all_bytes(path)
    with CacheReader(path, mode="mmap") as reader:
        view = reader.view()
        assert view is not None
        assert view.kv.stride(0) == layout.record_bytes // view.kv.element_size()
        assert_tokens_equal(view, tokens(range(6), layout))
        assert_tokens_equal(view, reader.read(range(6)))
        view.kv.view(torch.uint8)[0].zero_()
        for _ in range(3):
            assert_tokens_equal(reader.read([0]), tokens([0], layout))
    del reader
    gc.collect()
    assert torch.equal(view.index, tokens(range(6), layout).index)  # valid after close
    assert all_bytes(path) == before


def test_no_view_by_pread(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c")
    with CacheReader(path, mode="pread") as reader:
        assert reader.view() is None
    for open_again in (lambda: CacheReader(path, mode="pread"), lambda: CacheReader(path)):
        reader = open_again()
        reader.close()
        with pytest.raises(ValueError, match="is closed"):
            reader.view()


def test_checked_when_first_shown(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c", records_per_shard=4)
    shard = path / "shard-00001.fpt"
    flip(shard, 4096 + LAYOUT.record_bytes + 7)
    with CacheReader(path, mode="mmap") as reader:
        view = reader.view([0, 4])
        assert view is not None and torch.equal(view.kv[:5], tokens(range(5)).kv)
        for _ in range(2):  # a record that was refused is refused again
            with pytest.raises(CacheCorrupt, match=r"shard-00001.fpt.*class_1/image 2.png.*row 5"):
                reader.view([5])
        with pytest.raises(CacheCorrupt, match="row 5"):
            reader.view()
        with pytest.raises(IndexError, match="rows must be 0 to 5, got 6"):
            reader.view([6])
        flip(shard, 4096 + LAYOUT.record_bytes + 7)
        reader.view([5])
        flip(shard, 4096 + 7)
        reader.view([4])  # checked before, and not again
    with CacheReader(path, mode="mmap", verify=False) as reader:
        assert reader.view() is not None


def test_checked_each_time_where_pages_may_leave_memory(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c")
    with CacheReader(path, mode="mmap", memory_share=0) as reader:
        reader.view([3])
        flip(path / "shard-00000.fpt", 4096 + 3 * LAYOUT.record_bytes)
        with pytest.raises(CacheCorrupt, match="row 3"):
            reader.view([3])


def test_a_cache_larger_than_its_share_is_not_mapped(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c")
    with CacheReader(path, memory_share=0) as reader:
        assert reader.mode == "pread"
        assert_tokens_equal(reader.read([4, 0, 4]), tokens([4, 0, 4]))
    with CacheReader(path) as reader:
        assert reader.mode == "mmap"


def test_shard_truncated_under_a_view(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c", records_per_shard=4)
    with CacheReader(path, mode="mmap") as reader:
        with (path / "shard-00001.fpt").open("r+b") as file:
            file.truncate(4096)
        reader.view([0])
        with pytest.raises(CacheCorrupt, match=r"shard-00001.fpt.*was opened with"):
            reader.view([5])


LIMITED = """
import resource, sys
from fpt_fast.cache import CacheReader
import torch
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]), resource.RLIM_INFINITY))
with CacheReader(sys.argv[1]) as reader:
    sys.stdout.write(reader.mode)
    reader.read([0])
try:
    CacheReader(sys.argv[1], mode="mmap")
except OSError as error:
    sys.stdout.write(" " + str(error))
"""


def test_no_room_to_map(tmp_path: Path) -> None:
    """Where the address space ends, auto reads by pread, and mmap says what to do."""
    path = build_cache(tmp_path / "c")
    ran = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path), str(2**20)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.stdout.startswith("pread") and "use mode='pread'" in ran.stdout, ran.stderr
