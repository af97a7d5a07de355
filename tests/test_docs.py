"""The examples of README and documents: Python is run, commands are parsed, the site is built."""

import re
import shlex
from pathlib import Path

import pytest
from children import output_of
from small_run import write_backbone

from fpt_fast import cli
from helpers import write_image_set

ROOT = Path(__file__).parent.parent
PAGES = sorted(path.relative_to(ROOT) for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")])
# Their examples start from files of the authors' code, which tests/compat makes and calls, or from
# finished runs, with which tests/pipeline/test_docs.py runs code and commands.
NEED_FILES = {Path(f"docs/{name}.md") for name in ("drop-in", "explanation", "prediction")}
# Examples name a published frozen model at its size; here a tiny one stands in for it.
STAND_INS = {
    'backbone="vit_base_patch16_384"': 'backbone="VIT"',
    'input_size="512"': 'input_size="48"',
    "epochs=20": 'epochs=1, side_size="24"',
}
# Commands of others, and those that are run elsewhere: by CI itself, or where there is a GPU.
OTHERS = {
    *("make", "pip", "pytest", "python", "python3", "nsys", "ncu", "torchrun", "sbatch", "srun"),
    *("export", "export,", "cd", "git"),
}


def blocks(page: Path, language: str) -> list[str]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def with_blocks(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.mark.parametrize("page", sorted(set(with_blocks("python")) - NEED_FILES), ids=str)
def test_python_examples_run(page: Path, tmp_path: Path) -> None:
    text = "\n".join(blocks(page, "python"))
    for written, stand_in in STAND_INS.items():
        text = text.replace(written, stand_in)
    write_image_set(tmp_path / "DATA")
    write_backbone(tmp_path / "VIT")
    output_of(text, folder=tmp_path)


@pytest.mark.parametrize("page", with_blocks("bash"), ids=str)
def test_commands_are_understood(page: Path) -> None:
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            # A configuration is a run's own, which other tests read.
            if words and words[0] == "fpt-fast" and not {"--help", "--config"} & set(words):
                cli._parse(words[1:])
            elif words:
                assert words[0] in {"fpt-fast", *OTHERS} or "=" in words[0], line


def test_there_are_examples_to_try() -> None:
    assert Path("README.md") in with_blocks("python") and Path("README.md") in with_blocks("bash")
    assert len(with_blocks("python")) > len(NEED_FILES) + 3
