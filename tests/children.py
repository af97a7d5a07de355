"""Processes to be killed: each begins clean, with nothing of torch's state in its parent.

A plain fork of the tests' own process would inherit threads that other tests have started, and
torch refuses to compute gradients in such a child.
"""

import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fpt_fast.interrupts import Stopped

STOPPED, FAILED = 3, 1
_context = multiprocessing.get_context("forkserver")
# With what a run imports when it needs it: once, and not again in every child.
_context.set_forkserver_preload(
    [
        *("children", "helpers", "fpt_fast.pipeline", "fpt_fast.cli"),
        *("matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg"),
        *("matplotlib.figure", "sklearn.metrics"),
    ]
)


def exit_status(work: Callable[..., object], *arguments: Any) -> int:
    """Exit status of ``work(*arguments)``, a function of a module below ``tests``, in a child.

    ``STOPPED`` after ``Stopped``, ``FAILED`` after any other exception (which is printed), and
    minus the number of the signal that killed it.
    """
    child = start(work, *arguments)
    child.join()
    status = child.exitcode
    assert status is not None
    return status


def output_of(code: str, *, folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """What ``code`` writes as a program in ``folder``; fails with it where the program does."""
    with tempfile.NamedTemporaryFile("r") as output:
        child = start(_run_code, code, folder, environment=environment, output=Path(output.name))
        child.join()
        text = output.read()
    assert child.exitcode == 0, text
    return text


def _run_code(code: str, folder: Path) -> None:
    os.chdir(folder)
    exec(compile(code, "<code>", "exec"), {"__name__": "__main__"})


def start(
    work: Callable[..., object],
    *arguments: Any,
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> BaseProcess:
    """Begin ``work(*arguments)`` in a child, which writes to ``output``."""
    child = _context.Process(target=_run, args=(work, arguments, dict(environment or {}), output))
    child.start()
    return child


def _run(
    work: Callable[..., object],
    arguments: tuple[Any, ...],
    environment: dict[str, str],
    output: Path | None,
) -> None:
    os.environ.update(environment)
    if output is not None:
        file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(file, 1)
        os.dup2(file, 2)
    status = 0
    try:
        work(*arguments)
    except Stopped:
        traceback.print_exc()
        status = STOPPED
    except BaseException:
        traceback.print_exc()
        status = FAILED
    # No exit handlers: they are those of the tests' own process.
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)
