"""Benchmarks that need a GPU are left out where there is none."""

import pytest

from helpers import deselect_gpu_tests


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    deselect_gpu_tests(config, items)
