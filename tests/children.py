"""Processes to be killed: each begins clean, with nothing of torch's state in its parent.

A plain fork of the tests' own process would inherit threads that other tests have started, and
torch refuses to compute gradients in such a child.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from typing import Any

from fpt_fast.interrupts import Stopped

STOPPED, FAILED = 3, 1
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["children", "fpt_fast.pipeline"])


def exit_status(work: Callable[..., object], *arguments: Any) -> int:
    """Exit status of ``work(*arguments)``, a function of a module below ``tests``, in a child.

    ``STOPPED`` after ``Stopped``, ``FAILED`` after any other exception (which is printed), and
    minus the number of the signal that killed it.
    """
    child = _context.Process(target=_run, args=(work, arguments))
    child.start()
    child.join()
    status = child.exitcode
    assert status is not None
    return status


def _run(work: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    try:
        work(*arguments)
    except Stopped:
        os._exit(STOPPED)
    except BaseException:
        traceback.print_exc()
        os._exit(FAILED)
    os._exit(0)
