"""Pytest plugin: one JSON line for every test as it ends; a killed run keeps its results."""

import json
import os
from pathlib import Path

import pytest

LOG_VARIABLE = "FPT_TEST_LOG"
_MESSAGE = 3000


def pytest_collection_finish(session: pytest.Session) -> None:
    """How many tests there are; with pytest-xdist its workers know, and one tells."""
    if os.environ.get("PYTEST_XDIST_WORKER", "gw0") == "gw0":
        _write({"collected": len(getattr(session, "items", ()))})


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Every call, and every set-up or tear-down that failed."""
    # What workers of pytest-xdist report reaches the controller.
    is_worker = "PYTEST_XDIST_WORKER" in os.environ
    if (report.when == "call" or report.failed) and not is_worker:
        message = "" if report.passed else report.longreprtext[-_MESSAGE:]
        line = {"name": report.nodeid, "outcome": report.outcome, "seconds": report.duration}
        _write({**line, "message": message})


def _write(line: dict[str, object]) -> None:
    if LOG_VARIABLE in os.environ:
        with Path(os.environ[LOG_VARIABLE]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
