"""The C++ extension as a whole: it is there where it can be, its levels, what it says when not."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from children import output_of

from fpt_fast.ops import explain, native_reasons, select_tokens
from fpt_fast.ops.native_reasons import native_levels, native_missing
from helpers import ROOT, implementation

X = torch.zeros(1, 1, 3, 8)
SCORES = torch.zeros(1, 1, 3)


def native_build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("native_build", ROOT / "csrc/native_build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_is_built_wherever_it_can_be() -> None:
    missing = native_missing()
    assert missing is None or native_build().why_not() is not None, missing


def test_an_extension_older_than_a_part_of_it_is_not_current(tmp_path: Path) -> None:
    is_current = native_build().is_current
    built, parts = tmp_path / "_native.so", [tmp_path / "a.cpp", tmp_path / "b.h"]
    for part in parts:
        part.touch()
        os.utime(part, (1000, 1000))
    assert not is_current(built, parts)
    built.touch()
    os.utime(built, (2000, 2000))
    assert is_current(built, parts)
    os.utime(parts[1], (3000, 3000))
    assert not is_current(built, parts)


def test_the_best_level_stands_first_and_portable_last() -> None:
    levels = native_levels().split(", ")
    order = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
    assert levels == [level for level in order if level in levels]
    assert levels[-1] == "portable"
    assert ("avx512" in levels) == torch.cpu._is_avx512_supported()
    assert ("avx2" in levels) == torch.cpu._is_avx2_supported()
    assert ("avx512_bf16" in levels) == torch.cpu._is_avx512_bf16_supported()
    assert ("amx" in levels) == torch.cpu._is_amx_tile_supported()


def test_an_unknown_level_is_refused_by_name() -> None:
    with (
        implementation("native/mmx") as impl,
        pytest.raises(RuntimeError, match="FPT_NATIVE_LEVEL must be one of .*portable.*, got mmx"),
    ):
        select_tokens(SCORES, X, X, 2, impl=impl)


def test_arguments_that_would_be_read_out_of_bounds_are_refused() -> None:
    op = torch.ops.fpt_native.select_tokens
    with pytest.raises(RuntimeError, match=r"scores must be \(1, 1, 3\).*, got \(1, 1, 2\)"):
        op(SCORES[..., :2], X, X, 2, torch.float32, "")
    with pytest.raises(RuntimeError, match=r"v must be \(1, 1, 3, 8\).*, got \(1, 1, 3, 7\)"):
        op(SCORES, X, X[..., :7], 2, torch.float32, "")
    with pytest.raises(RuntimeError, match="v must have the dtype of k"):
        op(SCORES, X, X.half(), 2, torch.float32, "")
    with pytest.raises(RuntimeError, match=r"keep must be in 1..3, .*, got 4"):
        op(SCORES, X, X, 4, torch.float32, "")
    with pytest.raises(RuntimeError, match="k must be float16, bfloat16, float32 or float64"):
        op(SCORES, X.int(), X.int(), 2, torch.float32, "")


def test_other_devices_are_a_reason() -> None:
    text = explain("select_tokens", SCORES.to("meta"), X.to("meta"), X.to("meta"), 2)
    assert "  native: it runs on cpu tensors, got tensors on meta" in text


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    scores, k = torch.rand(2, 3, 50), torch.randn(2, 3, 50, 8)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 3):
            torch.set_num_threads(count)
            results.append(select_tokens(scores, k, k, 20, impl="native"))
    finally:
        torch.set_num_threads(threads)
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)


EXPLAIN = """
import torch
from fpt_fast.info import describe_installation
from fpt_fast.ops import explain, select_tokens
x, scores = torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3)
print(describe_installation())
print(explain("select_tokens", scores, x, x, 2))
select_tokens(scores, x, x, 2)
"""


def explained(library: str, folder: Path) -> str:
    return output_of(EXPLAIN, folder=folder, environment={"FPT_NATIVE_LIBRARY": library})


@pytest.mark.parametrize(
    ("library", "why"),
    [
        ("", "the C++ extension is switched off by FPT_NATIVE_LIBRARY"),
        ("nowhere/_native.so", "the C++ extension is not installed: there is no _native.so"),
        (__file__, "the C++ extension does not load: "),
    ],
)
def test_without_it_everything_runs_and_says_why(library: str, why: str, tmp_path: Path) -> None:
    text = explained(library, tmp_path)
    lines = text.splitlines()
    assert any(line.startswith(f"native: {why}") for line in lines), text  # info
    assert any(line.startswith(f"  native: {why}") for line in lines), text  # explain
    assert "impl='auto' runs 'cpu'" in text


def test_the_note_of_a_failed_build_is_repeated(tmp_path: Path) -> None:
    (tmp_path / "_native_missing.txt").write_text("there was no C++ compiler (c++)\n")
    text = explained(str(tmp_path / "_native.so"), tmp_path)
    assert "when fpt-fast was installed, there was no C++ compiler (c++)" in text


def test_a_build_of_other_sources_is_left_alone(tmp_path: Path) -> None:
    other = Path(torch.__file__).parent / "lib/libc10.so"
    text = explained(str(other), tmp_path)
    assert "was built from other sources, without levels, select_tokens, token_scores," in text


def test_what_native_calls_is_looked_for() -> None:
    folder = ROOT / "python/fpt_fast/ops"
    sources = [(folder / name).read_text() for name in ("native.py", "native_optimizer.py")]
    called = set(re.findall(r"_ops\.(\w+)\(", "".join(sources))) | {"levels"}
    assert called == set(native_reasons._OPS)


def test_it_is_loaded_on_first_use_only() -> None:
    code = """
import torch, fpt_fast.ops
assert not torch.ops.loaded_libraries
x = torch.zeros(1, 1, 3, 8)
fpt_fast.ops.select_tokens(x[..., 0], x, x, 2)
assert len(torch.ops.loaded_libraries) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("needs", "tag"),
    [
        (("GLIBC_2.2.5", "GLIBCXX_3.4", "CXXABI_1.3"), "manylinux_2_17_x86_64"),
        (("GLIBC_2.2.5", "GLIBC_2.28", "GLIBC_2.14"), "manylinux_2_28_x86_64"),
        (("GLIBC_2.17", "GLIBCXX_3.4.21", "GLIBCXX_3.4.29"), "manylinux_2_34_x86_64"),
        (("GLIBC_2.36", "CXXABI_1.3.11"), "manylinux_2_36_x86_64"),
        (("GLIBC_2.17", "GLIBCXX_3.4.99"), "linux_x86_64"),
    ],
)
def test_a_wheel_is_tagged_by_the_symbols_it_needs(
    tmp_path: Path, needs: tuple[str, ...], tag: str
) -> None:
    library = tmp_path / "_native.so"
    library.write_bytes(b"\0" + b"\0".join(name.encode() for name in needs) + b"\0")
    assert native_build().platform_tag(library, "linux_x86_64") == tag
    assert native_build().platform_tag(tmp_path / "none.so", "linux_x86_64") == "linux_x86_64"
    assert native_build().platform_tag(library, "macosx_11_0_arm64") == "macosx_11_0_arm64"
