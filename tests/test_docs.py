"""The examples of the how-to pages: Python is run, commands are parsed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fpt_fast import cli

ROOT = Path(__file__).parent.parent
PAGES = ("medical-images.md", "labels.md")


def blocks(page: str, language: str) -> list[str]:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES)
def test_python_examples_run(page: str, tmp_path: Path) -> None:
    examples = blocks(page, "python")
    assert examples
    path = os.pathsep.join([str(ROOT / "python"), str(ROOT / "tests"), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(examples)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", PAGES)
def test_commands_are_understood(page: str) -> None:
    commands = [line for block in blocks(page, "bash") for line in block.splitlines() if line]
    assert commands
    for line in commands:
        words = shlex.split(line)
        assert words[0] == "fpt-fast"
        cli._parse(words[1:])
