"""The commands and code blocks of the documents run, in a folder like the one they speak of."""

import re
import shlex
from pathlib import Path

import pytest
from small_run import write_backbone

from fpt_fast.cli import main
from fpt_fast.pipeline import preload, train
from helpers import ROOT, write_image_set


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the documents take for granted: images, a cache, and two runs that differ by seed."""
    root = tmp_path_factory.mktemp("docs")
    data = write_image_set(root / "images", counts={"train": 4, "val": 2, "test": 3})
    cache = root / "cache"
    preload(
        data=data,
        backbone=str(write_backbone(root / "vit")),
        cache=cache,
        input_size="48",
        normalization="backbone",
        workers=1,
    )
    for seed, name in enumerate(("first", "second")):
        train(
            data=data,
            cache=str(cache),
            run=root / "runs" / name,
            side_size="24",
            epochs=1,
            seed=seed,
            workers=1,
        )
    return root


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / "docs" / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, re.S)


DOCUMENTS = ("trust.md", "explanation.md", "prediction.md")


@pytest.mark.usefixtures("small_pictures")
@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_and_code_run(
    document: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    commands = [line for block in blocks(document, "sh") for line in block.splitlines()]
    assert commands
    for command in commands:
        words = shlex.split(command)
        assert words[0] == "fpt-fast"
        assert main(words[1:]) == 0, command
    for code in blocks(document, "python"):
        exec(compile(code, document, "exec"), {})
