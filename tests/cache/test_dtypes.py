"""Records of every dtype: what is stored, what is refused, and f16 caches that never change."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from cache.samples import (
    DTYPES,
    FINGERPRINT,
    LAYOUT,
    LAYOUTS,
    all_bytes,
    assert_tokens_equal,
    build_cache,
    flip,
    keys,
    quantiser,
    tokens,
)

from fpt_fast.cache import (
    CacheMismatch,
    CacheReader,
    CacheWriter,
    FeatureValueError,
    RecordLayout,
    drop_bad_records,
    inspect_cache,
    verify_cache,
)
from fpt_fast.ops import dequantise_kv
from fpt_fast.records import SelectedTokens

EIGHT_BIT = DTYPES[1:]

# xxh3-128 of the files that the first version of the format wrote; never to be changed.
FILES_OF_VERSION_1 = {
    "manifest-copy.fpt": "a27d31bc523e56d58ee27897e535d21b",
    "manifest.fpt": "a27d31bc523e56d58ee27897e535d21b",
    "shard-00000.fpt": "f6b4cfccc5c206b827065e6b14f48735",
    "shard-00001.fpt": "9b6624ff938156ab477f0f601758e9b8",
}


def test_f16_caches_are_byte_equal_to_those_of_the_first_version(tmp_path: Path) -> None:
    count = 6
    values = torch.arange(count * LAYOUT.kv_bytes // 2) % 2011 - 1000
    kv = values.reshape(count, *LAYOUT.kv_shape).half() / 8
    index = torch.arange(count * 30).reshape(count, *LAYOUT.index_shape).int()
    with CacheWriter(
        tmp_path / "c",
        LAYOUT,
        {"backbone": "tiny", "layers": (6, 7), "token_ratio": 0.2},
        keys(count),
        digests=[f"{i:016x}" for i in range(count)],
        notes={"source": "here"},
        records_per_shard=4,
    ) as writer:
        writer.write(range(count), SelectedTokens(kv, index))
        writer.finish()
    written = all_bytes(tmp_path / "c")
    digests = {name: xxhash.xxh3_128_hexdigest(data) for name, data in written.items()}
    assert digests == FILES_OF_VERSION_1


def test_record_sizes_of_the_published_setting() -> None:
    f16 = RecordLayout(layers=6, heads=12, kept=205, head_width=64)
    int8 = replace(f16, dtype="int8")
    f32_bytes = 2 * f16.kv_bytes
    assert 1.95 < f32_bytes / f16.record_bytes <= 2
    assert 3.7 < f32_bytes / int8.record_bytes <= 4
    assert int8.record_bytes == replace(f16, dtype="float8_e4m3fn").record_bytes
    assert [part.name for part in int8.parts] == ["kv", "k_scales", "v_scales", "index"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_parts_follow_each_other(dtype: str) -> None:
    layout = LAYOUTS[dtype]
    end = 0
    for part in layout.parts:
        assert end <= part.offset < end + 4
        assert part.offset % 4 == 0
        end = part.offset + part.bytes
    assert end == layout.payload_bytes <= layout.record_bytes


@pytest.mark.parametrize("mode", ["mmap", "pread"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(tmp_path: Path, dtype: str, mode: Any) -> None:
    layout = LAYOUTS[dtype]
    path = build_cache(tmp_path / "c", records_per_shard=4, layout=layout)
    assert verify_cache(path).ok
    assert dtype in str(inspect_cache(path))
    with CacheReader(path, mode=mode) as reader:
        rows = [5, 0, 3, 3]
        assert_tokens_equal(reader.read(rows), tokens(rows, layout))
        given = reader.read([1, 2])
        assert reader.read(rows[:2], out=given) is given
        assert_tokens_equal(given, tokens(rows[:2], layout))


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_bytes_of_a_record(tmp_path: Path, dtype: str) -> None:
    layout, want = LAYOUTS[dtype], tokens([0], LAYOUTS[dtype])
    path = build_cache(tmp_path / "c", 1, layout=layout)
    record = np.frombuffer((path / "shard-00000.fpt").read_bytes()[4096:], np.uint8)
    assert want.k_scales is not None and want.v_scales is not None
    at = 0
    for tensor in (want.kv, want.k_scales, want.v_scales, want.index):
        data = tensor.contiguous().view(torch.uint8).flatten().numpy()
        assert np.array_equal(record[at : at + len(data)], data)
        at += -(-len(data) // 4) * 4
    assert not record[at:].any()
    assert len(record) == layout.record_bytes


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_quantised_on_the_way(tmp_path: Path, dtype: str) -> None:
    layout = LAYOUTS[dtype]
    half = tokens(range(6), LAYOUTS["float16"])
    with CacheWriter(
        tmp_path / "quantised", layout, FINGERPRINT, keys(6), quantise=quantiser(layout)
    ) as writer:
        writer.write([0, 1, 2, 3], SelectedTokens(half.kv[:4].float(), half.index[:4]))
        # Those that are done are left alone, and what is 8-bit already is stored as it is.
        writer.write([2, 4], SelectedTokens(half.kv[[0, 4]], half.index[[0, 4]]))
        writer.write([5], tokens([5], layout))
        writer.finish()
    given = build_cache(tmp_path / "given", layout=layout)
    assert all_bytes(tmp_path / "quantised") == all_bytes(given)
    with CacheReader(given) as reader:
        back = reader.read(range(6))
    assert back.k_scales is not None and back.v_scales is not None
    wide = dequantise_kv(back.kv, back.k_scales, back.v_scales)
    error = (wide - half.kv.float()).norm() / half.kv.float().norm()
    assert 0 < float(error) < 0.05


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_values_that_are_refused(tmp_path: Path, dtype: str) -> None:
    layout = LAYOUTS[dtype]
    good = tokens(range(2), layout)
    assert good.k_scales is not None and good.v_scales is not None
    place = r"features of 'class_1/image 0.png', layer 0"
    with CacheWriter(
        tmp_path / "c", layout, FINGERPRINT, keys(2), quantise=quantiser(layout)
    ) as writer:
        for name in ("k_scales", "v_scales"):
            for value in (float("nan"), float("inf"), -1.0):
                bad = getattr(good, name).clone()
                bad[1, 0, 2, 1] = value
                with pytest.raises(FeatureValueError, match=f"{place}: have {name} that are NaN"):
                    writer.write(range(2), replace(good, **{name: bad}))
        if dtype == "float8_e4m3fn":
            kv = good.kv.clone()
            kv.view(torch.uint8)[1, 0, 1, 2, 3, 0] = 0xFF
            with pytest.raises(FeatureValueError, match=f"{place}: hold NaN"):
                writer.write(range(2), replace(good, kv=kv))
        half = tokens(range(2), LAYOUTS["float16"])
        half.kv[1, 0, 0, 0, 0, 0] = float("nan")
        with pytest.raises(FeatureValueError, match=rf"{place}.*hold 1 NaN"):
            writer.write(range(2), half)
        assert writer.pending == [0, 1]


def test_shapes_and_dtypes_that_are_refused(tmp_path: Path) -> None:
    layout = LAYOUTS["int8"]
    good, half = tokens([0], layout), tokens([0], LAYOUTS["float16"])
    with CacheWriter(tmp_path / "int8", layout, FINGERPRINT, keys(1)) as writer:
        for given, message in [
            (half, r"kv must be .* of torch.int8, got .* of torch.float16; ops.quantise_kv"),
            (replace(good, k_scales=None), r"k_scales must be \[B, L, H, D\] = .*, got None"),
            (replace(good, v_scales=good.k_scales), r"v_scales must be \[B, L, H, K\]"),
            (replace(good, k_scales=good.k_scales.half()), "k_scales must be .* of torch.float32"),
            (tokens([0], LAYOUTS["float8_e4m3fn"]), "kv must be .* of torch.int8"),
        ]:
            with pytest.raises(ValueError, match=message):
                writer.write([0], given)
    f16 = LAYOUTS["float16"]
    with CacheWriter(tmp_path / "f16", f16, FINGERPRINT, keys(1)) as writer:
        with pytest.raises(ValueError, match=r"kv must be .* of f16, bf16, f32 or f64"):
            writer.write([0], good)
        with pytest.raises(ValueError, match=r"k_scales must be None in a cache of float16"):
            writer.write([0], replace(half, k_scales=good.k_scales))
    with pytest.raises(ValueError, match="quantise goes with 8-bit features"):
        CacheWriter(tmp_path / "x", f16, FINGERPRINT, keys(1), quantise=quantiser(layout))


def test_another_dtype_is_refused_with_the_difference(tmp_path: Path) -> None:
    path = build_cache(tmp_path / "c", layout=LAYOUTS["int8"])
    before = all_bytes(path)
    with pytest.raises(CacheMismatch, match=r"layout.dtype: the cache has 'int8', asked for 'fl"):
        CacheWriter(path, LAYOUTS["float16"], FINGERPRINT, keys(6))
    assert all_bytes(path) == before


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_extended_and_repaired(tmp_path: Path, dtype: str) -> None:
    layout = LAYOUTS[dtype]
    whole = all_bytes(build_cache(tmp_path / "whole", 6, records_per_shard=4, layout=layout))
    path = build_cache(tmp_path / "c", 3, records_per_shard=4, layout=layout)
    with CacheWriter(path, layout, FINGERPRINT, keys(6)) as writer:
        assert writer.pending == [3, 4, 5]
        writer.write([3, 4, 5], tokens([3, 4, 5], layout))
        writer.finish()
    assert all_bytes(path) == whole
    scales_at = layout.parts[1].offset
    flip(path / "shard-00000.fpt", 4096 + 2 * layout.record_bytes + scales_at + 1)
    assert verify_cache(path).bad_keys == (keys(6)[2],)
    assert drop_bad_records(path) == [keys(6)[2]]
    with CacheWriter(path, layout, FINGERPRINT, keys(6)) as writer:
        writer.write(range(6), tokens(range(6), layout))
        writer.finish()
    assert all_bytes(path) == whole
