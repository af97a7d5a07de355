"""Freed memory that stays: counted in page faults, by processes of their own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from toy_training import CLASSES, ToyBatches, toy_config, toy_model

from fpt_fast.trainer import fit, memory
from fpt_fast.trainer.memory import keep_freed_memory

CPU = torch.device("cpu")
IS_GLIBC = platform.libc_ver()[0] == "glibc"
# Thirty tensors of 4 MB at once, ten times: 300,000 pages, if each time they come from the system,
# as they do with the threshold that glibc begins with (it learns others, sooner or later).
SCRIPT = """
import ctypes, resource, sys, torch
from fpt_fast.trainer.memory import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] != "as it is":
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: 0)(-3, 128 << 10)
kept = sys.argv[1] != "leave" and keep_freed_memory(torch.device("cpu"))
def step():
    tensors = [torch.ones(1 << 20) for _ in range(30)]
step(), step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str, **environment: str) -> tuple[bool, int]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, what],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **environment},
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


def test_steps_take_no_page_twice() -> None:
    kept, count = faults("keep")
    assert kept == IS_GLIBC
    if kept:
        assert count < 3000
        assert faults("leave")[1] > 30_000


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_what_the_user_says_stands(name: str, value: str) -> None:
    kept, _ = faults("as it is", **{name: value})
    assert not kept


def test_only_on_a_cpu_and_only_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not keep_freed_memory(torch.device("cuda"))
    monkeypatch.setattr(memory, "_mallopt", lambda: None)
    assert not keep_freed_memory(CPU)


def test_training_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("fpt_fast.trainer.loop.keep_freed_memory", asked.append)
    fit(
        toy_model(),
        ToyBatches(),
        None,
        toy_config(epochs=1),
        run_dir=tmp_path,
        num_classes=CLASSES,
        device="cpu",
    )
    assert asked == [CPU]
