"""Ranges are there with nvtx, and cost nothing but a call without it."""

import sys
from collections.abc import Iterator

import nvtx
import pytest

from fpt_fast import profiling


@pytest.fixture(autouse=True)
def _found_out_anew() -> Iterator[None]:
    profiling._maker.cache_clear()
    yield
    profiling._maker.cache_clear()


def test_a_range_in_our_domain() -> None:
    with profiling.span("encode"):
        opened = profiling.span("encode")
    assert isinstance(opened, nvtx.annotate)
    assert opened.domain is nvtx.get_domain("fpt_fast")


def test_nothing_without_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    entered = False
    with profiling.span("encode"):
        entered = True
    assert entered
    with pytest.raises(ZeroDivisionError), profiling.span("encode"):
        1 / 0  # noqa: B018
