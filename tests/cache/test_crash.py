"""A build that dies at any instant goes on from there, and ends byte-equal to one in one go."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = ("build", "extend", "repair")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """What crash_builder.py counted; it fails where a kill cost more than the running batch."""
    root, script = tmp_path_factory.mktemp("crash"), Path(__file__).with_name("crash_builder.py")
    result = subprocess.run(
        [
            sys.executable,
            str(script),
            str(root),
            "25",
            *SCENARIOS,
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert result.returncode == 0, result.stderr
    counts: dict[str, dict[str, int]] = json.loads(result.stdout)
    return counts


def test_random_kills(report: dict[str, dict[str, int]]) -> None:
    assert report["random"]["kills"] >= 25
    assert report["random"]["builds"] >= 1


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_kill_at_every_step(report: dict[str, dict[str, int]], scenario: str) -> None:
    # So many calls change the disk at the very least: a count near 0 would test nothing.
    assert report[scenario]["steps"] > 30
