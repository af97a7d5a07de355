"""Every kernel compiles for every architecture, in every row of the launch table, without a GPU.

Compiled in a process of its own: in this one, kernels are interpreted functions.
"""

import json
import os
import subprocess
import sys

import pytest

from fptkernels.compile_report import Figures, complaints, measure_all, table
from fptkernels.launch_table import ARCHITECTURES, PADDED_WIDTHS, TABLE
from helpers import ROOT


@pytest.fixture(scope="module")
def figures() -> list[Figures]:
    """Of all kernels; minutes where Triton's cache is empty, seconds where it is not."""
    places = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "fptkernels.compile_report", "--json"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "PYTHONPATH": os.pathsep.join(filter(None, places)),
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1) and done.stdout, done.stderr
    return [Figures(**row) for row in json.loads(done.stdout)]


@pytest.mark.slow
def test_nothing_is_over_a_limit(figures: list[Figures]) -> None:
    over = [row for row in figures if complaints(row)]
    assert not over, table(over)


@pytest.mark.slow
def test_every_row_of_the_launch_table_is_compiled(figures: list[Figures]) -> None:
    names = {row.name.split()[0] for row in figures}
    assert {kernel for kernel, *_ in TABLE} <= names
    assert len({(row.name, row.architecture) for row in figures}) == len(figures) >= len(TABLE)
    assert all(row.registers > 0 for row in figures)
    for kernel in names:
        built = {row.architecture for row in figures if row.name.split()[0] == kernel}
        assert built == set(ARCHITECTURES), kernel


def test_the_table_is_complete() -> None:
    for kernel, dtype in {key[:2] for key in TABLE}:
        rows = {key[2:] for key in TABLE if key[:2] == (kernel, dtype)}
        assert rows == {(width, name) for width in PADDED_WIDTHS for name in ARCHITECTURES}, kernel


def row(spilled: int = 0, shared: int = 0, architecture: str = "sm_80") -> Figures:
    return Figures("token_scores_rows fp16 D64", architecture, 64, spilled, spilled, shared)


def test_limits() -> None:
    assert complaints(row(shared=163 * 1024)) == []
    assert complaints(row(shared=163 * 1024 + 1)) == ["shared memory over 166912 bytes"]
    assert complaints(row(shared=227 * 1024, architecture="sm_100")) == []
    assert complaints(row(shared=227 * 1024 + 1, architecture="sm_90")) != []
    assert complaints(row(spilled=8)) == []
    spilled = row(spilled=8, architecture="sm_90")
    assert complaints(spilled) == ["spills 8 bytes"]
    assert "spills 8 bytes" in table([row(), spilled]).splitlines()[2]
    assert len(table([row()]).splitlines()[1].split()) == 7


def test_an_interpreted_process_is_refused() -> None:
    with pytest.raises(RuntimeError, match="set TRITON_INTERPRET=0"):
        measure_all()
