"""The reader's threads: several of its own in one call, several calls at once, one file.

Under ThreadSanitizer (``make sanitize``) a race in the extension ends the run; without it the
results are compared.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cache.samples import LAYOUTS, all_bytes, assert_tokens_equal, build_cache, tokens

from fpt_fast.cache import CacheReader
from fpt_fast.ops.native_reasons import native_missing

RECORDS, ROUNDS, THREADS = 12, 20, 4


@pytest.mark.parametrize("dtype", sorted(LAYOUTS))
@pytest.mark.parametrize("share", [0.5, 0.0], ids=["from memory", "past the page cache"])
def test_calls_at_once_with_threads_of_their_own(tmp_path: Path, dtype: str, share: float) -> None:
    assert native_missing() is None
    layout = LAYOUTS[dtype]
    path = build_cache(tmp_path / "cache", RECORDS, records_per_shard=5, layout=layout)
    before = all_bytes(path)
    wanted = tokens(range(RECORDS), layout)

    def read(number: int, reader: CacheReader) -> None:
        generator = torch.Generator().manual_seed(number)
        rows = torch.randint(RECORDS, (RECORDS,), generator=generator).tolist()
        reader.announce(rows)
        assert_tokens_equal(reader.read(rows), _picked(wanted, rows))

    with (
        CacheReader(path, threads=THREADS, memory_share=share) as reader,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        for done in [pool.submit(read, number, reader) for number in range(ROUNDS)]:
            done.result()
    assert all_bytes(path) == before


def _picked(whole: object, rows: list[int]) -> object:
    names = ("kv", "index", "k_scales", "v_scales")
    values = {name: getattr(whole, name) for name in names}
    return type(whole)(**{name: None if x is None else x[rows] for name, x in values.items()})
