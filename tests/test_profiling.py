"""Ranges are there with nvtx, and cost nothing but a call without it; steps are bracketed."""

import logging
import re
import sys
from collections.abc import Iterator

import nvtx
import pytest
import torch

from fpt_fast import profiling
from fpt_fast.model import create_model
from fpt_fast.profiling import RANGES, StepProfiler
from fpt_fast.records import BackboneSpec, FeatureBatch
from helpers import ROOT


@pytest.fixture(autouse=True)
def _found_out_anew() -> Iterator[None]:
    profiling._maker.cache_clear()
    yield
    profiling._maker.cache_clear()


def test_a_range_in_our_domain() -> None:
    with profiling.span("select"):
        opened = profiling.span("select")
    assert isinstance(opened, nvtx.annotate)
    assert opened.domain is nvtx.get_domain("fpt_fast")


def test_nothing_without_nvtx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nvtx", None)
    entered = False
    with profiling.span("select"):
        entered = True
    assert entered
    with pytest.raises(ZeroDivisionError), profiling.span("select"):
        1 / 0  # noqa: B018


def test_every_range_of_the_source_is_listed_and_documented() -> None:
    document = (ROOT / "docs/profiling.md").read_text(encoding="utf-8")
    named = set()
    for path in (ROOT / "python/fpt_fast").rglob("*.py"):
        named |= set(re.findall(r'span\("([^"]+)"\)', path.read_text(encoding="utf-8")))
    assert named == set(RANGES)
    assert all(f"`{name}`" in document for name in RANGES)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of CUDA's profiler, as if there were a device."""
    made: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: made.append("synchronize"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: made.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: made.append("stop"))
    return made


def run_steps(steps: range | None, count: int, calls: list[str]) -> None:
    with StepProfiler(steps) as profiler:
        for i in range(count):
            with profiler.step():
                calls.append(str(i))


def test_steps_are_bracketed(calls: list[str]) -> None:
    run_steps(range(1, 3), 4, calls)
    assert calls == ["0", "synchronize", "start", "1", "2", "synchronize", "stop", "3"]


def test_the_capture_ends_with_the_loop_at_the_latest(calls: list[str]) -> None:
    run_steps(range(1, 9), 2, calls)
    assert calls == ["0", "synchronize", "start", "1", "synchronize", "stop"]
    calls.clear()
    with pytest.raises(ZeroDivisionError), StepProfiler(range(0, 9)) as profiler, profiler.step():
        1 / 0  # noqa: B018
    assert calls[-1] == "stop"


def test_nothing_is_bracketed_unasked(calls: list[str]) -> None:
    run_steps(None, 2, calls)
    run_steps(range(5, 6), 2, calls)
    assert calls == ["0", "1", "0", "1"]


def test_without_a_device_it_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level(logging.WARNING, "fpt_fast")
    run_steps(range(0, 1), 2, [])
    assert [record.getMessage() for record in caplog.records] == [
        "profile_steps: there is no CUDA device here, so nothing is captured"
    ]


def test_ranges_do_not_break_a_compiled_model() -> None:
    spec = BackboneSpec(
        "tiny", "", 48, 3, 4, (8, 8), 1, True, (32, 32), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
    )
    model = create_model("fpt_plus", backbone=spec, num_classes=3, side_size=(16, 16)).eval()
    pixels, kv = torch.randn(2, 3, 16, 16), torch.randn(2, 2, 2, 3, 5, 16).half()

    def logits(pixels: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
        return model(FeatureBatch(pixels, kv, None, torch.zeros(2).long(), ("a", "b")))

    torch.compiler.reset()
    compiled = torch.compile(logits, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(pixels, kv), logits(pixels, kv))
