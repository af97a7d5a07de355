"""What benchmarks share: ``--full`` sizes, the plain twin beside every row, what each must say."""

import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.beside import ALWAYS, MEASURED, lacking
from benchmarks.cases import Sizes
from benchmarks.ceilings import ceilings
from benchmarks.contest import Contest, beside_plain, table
from fpt_fast.ops.native_reasons import native_missing
from helpers import deselect_gpu_tests

ROWS = pytest.StashKey[list[dict[str, Any]]]()
FAILED = pytest.StashKey[list[str]]()
PACKAGES = ("fpt-fast", "torch", "torchvision", "triton", "timm", "numpy", "safetensors")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="benchmarks at the published sizes (ViT-B at 512 px), not at tiny ones",
    )


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--full"):
        os.environ.setdefault("FPT_BENCH_RECORDS", "16")  # before bench_cache.py is imported
    config.stash[FAILED] = []
    config.pluginmanager.register(Failures(config.stash[FAILED]), "fpt-benchmark-failures")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_gpu_tests(config, items)


class Failures:
    """Names what failed: a benchmark that failed leaves no other trace in the JSON."""

    def __init__(self, failed: list[str]) -> None:
        self.failed = failed

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and report.nodeid not in self.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    """Versions, threads, extension and ceilings, without which no figure means anything."""
    machine_info["packages"] = {name: _version(name) for name in PACKAGES}
    machine_info["threads"] = torch.get_num_threads()
    machine_info["extension"] = native_missing() or "built"
    machine_info["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = ceilings()
    machine_info["ceilings"] = {
        "bandwidth": found.bandwidth,
        "flops": dict(found.flops),
        "exponentials": found.exponentials,
    }


def pytest_benchmark_update_json(
    config: Any, benchmarks: object, output_json: dict[str, Any]
) -> None:
    """What failed, and at which sizes this was: the report must not mix them up."""
    output_json["failed"] = sorted(config.stash[FAILED])
    output_json["sizes"] = "full" if config.getoption("--full") else "tiny"


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [row for row in config.stash.get(ROWS, []) if row["ratio"] is not None]
    if rows:
        terminalreporter.section("beside the plain expression, alternating; ratio: plain / ours")
        terminalreporter.write_line(table(rows))


@pytest.fixture
def benchmark(
    request: pytest.FixtureRequest, benchmark: BenchmarkFixture
) -> Iterator[BenchmarkFixture]:
    """pytest-benchmark's own, which then insists that the row says all that a row must say."""
    yield benchmark
    if request.node.nodeid in request.config.stash[FAILED]:
        return
    needed = MEASURED if benchmark.enabled else ALWAYS
    missing = lacking(benchmark.extra_info, needed)
    assert not missing, f"extra_info lacks {', '.join(missing)}: use benchmarks.beside.alternate"


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to measure at the published sizes."""
    return bool(request.config.getoption("--full"))


@pytest.fixture
def sizes(full: bool) -> Sizes:
    """Sizes of the contests to measure on this CPU."""
    return Sizes("full" if full else "tiny")


@pytest.fixture
def beside(
    benchmark: BenchmarkFixture, request: pytest.FixtureRequest
) -> Callable[[Contest, str], None]:
    """``beside(contest, impl)`` measures one implementation and the plain expression."""

    def measure(contest: Contest, impl: str) -> None:
        benchmark.group = contest.group
        row = beside_plain(benchmark, contest, impl)
        request.config.stash.setdefault(ROWS, []).append(row)

    return measure


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
