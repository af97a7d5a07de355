"""What Nsight would see of the four calls, by a stand-in for nvtx."""

import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import pytest

from fpt_fast import profiling
from fpt_fast.pipeline import PreloadSettings, TrainSettings, predict, preload, train

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]


class Recorder(ModuleType):
    """``nvtx.annotate`` that notes each range, and that threads close what they opened last."""

    def __init__(self) -> None:
        super().__init__("nvtx")
        self.opened: list[str] = []
        self.inside: set[tuple[str, str]] = set()
        stacks: dict[int, list[str]] = defaultdict(list)
        recorder = self

        class Annotate:
            def __init__(self, name: str, *, domain: str) -> None:
                assert domain == "fpt_fast"
                self.name = name

            def __enter__(self) -> Self:
                stack = stacks[threading.get_ident()]
                if stack:
                    recorder.inside.add((stack[-1], self.name))
                stack.append(self.name)
                recorder.opened.append(self.name)
                return self

            def __exit__(self, *_: Any) -> None:
                assert stacks[threading.get_ident()].pop() == self.name

        self.annotate = Annotate
        self.stacks = stacks

    def take(self) -> set[str]:
        """Names since the last call; every range is closed."""
        assert not any(self.stacks.values())
        names = set(self.opened)
        self.opened.clear()
        return names


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    made = Recorder()
    monkeypatch.setitem(sys.modules, "nvtx", made)
    profiling._maker.cache_clear()
    yield made
    profiling._maker.cache_clear()


def test_each_call_shows_its_ranges(
    recorder: Recorder,
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    data: Path,
    tmp_path: Path,
) -> None:
    preload(preload_settings())
    preloaded = {"decode", "frozen pass", "select", "write"}
    assert recorder.take() == preloaded
    run = train(train_settings(epochs=1)).run
    learned = {"read", "copy", "augment", "fusion", "side forward", "backward", "optimiser"}
    assert recorder.take() == learned | {"decode"}
    predict(run=run, images=(data / "test",), output=tmp_path / "out.csv")
    unseen = {"write", "read", "augment", "backward", "optimiser"}
    assert recorder.take() == (preloaded | learned) - unseen
    assert preloaded | learned == set(profiling.RANGES)
    assert recorder.inside == {("frozen pass", "select")}
