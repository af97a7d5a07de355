"""Preloading that is killed, stopped or damaged goes on to the same bytes."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from small_run import files_of

from fpt_fast.cache import CacheCorrupt, CacheReader, CacheUnfinished, verify_cache
from fpt_fast.interrupts import Stopped
from fpt_fast.pipeline import PreloadSettings, preload, preloading, repair
from helpers import write_image_set

MakePreload = Callable[..., PreloadSettings]


def run_and_kill(settings: PreloadSettings, seconds: float) -> bool:
    """Preload in a child process and kill it after ``seconds``; True if it had finished."""
    child = os.fork()
    if child == 0:
        os.close(2)
        try:
            preload(settings)
        except BaseException:
            os._exit(1)
        os._exit(0)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "the child failed by itself"
            return True
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def test_twenty_kills_leave_no_trace(preload_settings: MakePreload, tmp_path: Path) -> None:
    data = write_image_set(tmp_path / "many", counts={"train": 30, "val": 2, "test": 2})
    whole = preload_settings(data=data, cache=tmp_path / "whole", workers=1)
    started = time.monotonic()
    preload(whole)
    length = time.monotonic() - started
    killed = preload_settings(data=data, cache=tmp_path / "killed", workers=1)
    rng = random.Random(0)
    kills = 0
    while kills < 20:
        # A kill lands anywhere from before the first byte to after the last.
        if run_and_kill(killed, rng.uniform(0.0, 1.2 * length)):
            for path in sorted(killed.cache.rglob("*")):
                path.unlink()
        else:
            kills += 1
    preload(killed)
    assert files_of(killed.cache) == files_of(whole.cache)
    assert verify_cache(killed.cache).ok


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_cleanly_and_the_same_call_goes_on(
    number: signal.Signals,
    preload_settings: MakePreload,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = preload_settings()
    original = preloading.select_features
    computed = []

    def counting(*arguments: object, **named: object) -> object:
        computed.append(len(arguments[1]))  # type: ignore[arg-type]
        if len(computed) == 2:
            os.kill(os.getpid(), number)
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(preloading, "select_features", counting)
    before = signal.getsignal(number)
    with pytest.raises(Stopped, match="same command"):
        preload(settings)
    assert signal.getsignal(number) is before
    assert sum(computed) == 10
    with pytest.raises(CacheUnfinished, match="10 of 24"):
        CacheReader(settings.cache)
    assert preload(settings).computed == 14
    assert sum(computed) == 24
    preload(preload_settings(cache=tmp_path / "whole"))
    assert files_of(settings.cache) == files_of(tmp_path / "whole")


def test_an_error_in_the_middle_keeps_what_was_done(
    preload_settings: MakePreload, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = preload_settings()
    original = preloading.select_features
    calls = []

    def failing(*arguments: object, **named: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise MemoryError("the machine is full")
        return original(*arguments, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(preloading, "select_features", failing)
    with pytest.raises(MemoryError):
        preload(settings)
    assert preload(settings).computed == 14


def test_repair_rebuilds_only_the_bad_records(
    preload_settings: MakePreload, data: Path, backbone: Path
) -> None:
    settings = preload_settings()
    preload(settings)
    good = files_of(settings.cache)
    shard = max(settings.cache.rglob("*"), key=lambda path: path.stat().st_size)
    with CacheReader(settings.cache) as reader:
        key, record = reader.keys[7], reader.layout.record_bytes
    content = bytearray(shard.read_bytes())
    content[shard.stat().st_size - (24 - 7) * record + 100] ^= 0x10
    shard.write_bytes(content)
    report = verify_cache(settings.cache)
    assert not report.ok and key in str(report)
    with CacheReader(settings.cache) as reader, pytest.raises(CacheCorrupt, match="repair"):
        reader.read([reader.row(key)])
    rebuilt, after = repair(
        cache=settings.cache, data=data, backbone=str(backbone), batch_size=5, workers=1
    )
    assert rebuilt == [key]
    assert after.ok
    assert files_of(settings.cache) == good


def test_preloading_a_finished_cache_computes_nothing(preload_settings: MakePreload) -> None:
    settings = preload_settings()
    assert preload(settings).computed == 24
    before = files_of(settings.cache)
    assert preload(settings).computed == 0
    assert files_of(settings.cache) == before


def test_before_it_starts_it_says_how_large_and_how_long(
    preload_settings: MakePreload, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "fpt_fast")
    preload(preload_settings())
    said = [record.getMessage() for record in caplog.records]
    size = next(i for i, line in enumerate(said) if "the cache of 24 images takes" in line)
    assert "are free" in said[size]
    assert re.match(r"this takes about [\d.]+ (s|min|h) for 24 images", said[size + 1])
    caplog.clear()
    preload(preload_settings())
    assert not any("this takes" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 s"), (42.4, "42 s"), (600, "10 min"), (7200, "2.0 h")]
)
def test_durations(seconds: float, text: str) -> None:
    assert preloading._duration(seconds) == text
