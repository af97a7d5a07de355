"""What benchmarks share: ``--full`` sizes, and none that needs a GPU where there is none."""

import pytest

from helpers import deselect_gpu_tests


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="benchmarks at the published sizes (ViT-B at 512 px), not at tiny ones",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_gpu_tests(config, items)


@pytest.fixture
def full(request: pytest.FixtureRequest) -> bool:
    """Whether to measure at the published sizes."""
    return bool(request.config.getoption("--full"))
