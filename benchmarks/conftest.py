"""What benchmarks share: ``--full`` sizes, and the plain expression beside every row."""

from collections.abc import Callable
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.cases import Sizes
from benchmarks.contest import Contest, beside_plain, table
from helpers import deselect_gpu_tests

ROWS = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="benchmarks at the published sizes (ViT-B at 512 px), not at tiny ones",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_gpu_tests(config, items)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = [row for row in config.stash.get(ROWS, []) if row["ratio"] is not None]
    if rows:
        terminalreporter.section("beside the plain expression, alternating; ratio: plain / ours")
        terminalreporter.write_line(table(rows))


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
