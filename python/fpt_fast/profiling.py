"""NVTX ranges for Nsight: ``nsys profile --capture-range=nvtx --nvtx-capture=encode@fpt_fast …``.

Ranges lie in the domain ``fpt_fast`` and have registered strings, without which Nsight's capture
range does not see them.  They need the ``profile`` extra; without it they are nothing.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

DOMAIN = "fpt_fast"


def span(name: str) -> AbstractContextManager[Any]:
    """A range called ``name`` in Nsight's timeline, for a ``with`` block."""
    return _maker()(name)


@cache
def _maker() -> Callable[[str], AbstractContextManager[Any]]:
    """Found out once, and not before somebody needs it: importing stays cheap."""
    try:
        import nvtx
    except ImportError:
        return lambda name: nullcontext()
    return lambda name: nvtx.annotate(name, domain=DOMAIN)
