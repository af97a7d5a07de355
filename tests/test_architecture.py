"""The layout of DESIGN.md section 3 holds: who imports whom, sizes, docstrings, bans.

The rules are in tests/architecture.py; the last tests plant violations in a tree of their own
and see each one caught.
"""

import re
import textwrap
from pathlib import Path

import pytest

import fpt_fast
from architecture import (
    MAX_FILE_LINES,
    MAX_FUNCTION_LINES,
    RULES,
    Rule,
    bans,
    contributing_paths,
    docstrings,
    import_table,
    kernels_stay_behind_the_library,
    layout_is_documented,
    native_stays_behind_its_door,
    one_op_one_name,
    python_files,
    records,
    sizes,
)
from helpers import ROOT

MAX_PUBLIC_NAMES = 20


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule: Rule) -> None:
    complaints = list(rule(ROOT))
    assert not complaints, "\n".join([str(rule.__doc__), *complaints])


def test_public_names() -> None:
    assert len(fpt_fast.__all__) <= MAX_PUBLIC_NAMES
    assert list(fpt_fast.__all__) == sorted(set(fpt_fast.__all__), key=sort_key)
    for name in fpt_fast.__all__:
        assert getattr(fpt_fast, name) is not None
    assert set(fpt_fast.__all__) <= set(dir(fpt_fast))


def sort_key(name: str) -> tuple[bool, str]:
    return (not name[0].isupper(), name)


def test_no_test_is_switched_off() -> None:
    pattern = re.compile(r"mark\.(xfail|skip)|pytest\.(skip|xfail)\(|importorskip")
    for path in python_files(ROOT, "tests", "benchmarks"):
        if path != Path(__file__):
            assert not pattern.search(path.read_text(encoding="utf-8")), path


PLANTED = [
    (import_table, "selection.py", "from fpt_fast.trainer import fit"),
    (import_table, "trainer.py", "def f():\n    from fpt_fast.backbone import load_backbone"),
    (import_table, "trainer/loop.py", "from fpt_fast import cache"),
    (import_table, "cache/writer.py", "from fpt_fast.backbone import load_backbone"),
    (import_table, "fusion.py", "from fpt_fast import create_model"),
    (import_table, "model.py", "if TYPE_CHECKING:\n    from fpt_fast.pipeline import train"),
    (import_table, "cli.py", "from fpt_fast.trainer import fit"),
    (import_table, "ops/token_scores.py", "import timm.layers"),
    (import_table, "cache/format.py", "from .errors import CacheCorrupt"),
    (import_table, "utils.py", ""),
    (kernels_stay_behind_the_library, "selection.py", "import fptkernels.token_scores"),
    (kernels_stay_behind_the_library, "ops/token_scores.py", 'M = "fptkernels.token_scores"'),
    (kernels_stay_behind_the_library, "ops/library.py", "from fptkernels import token_scores"),
    (kernels_stay_behind_the_library, "../../fptkernels/k.py", "import fpt_fast"),
    (native_stays_behind_its_door, "selection.py", "torch.ops.fpt_native.levels()"),
    (native_stays_behind_its_door, "../../csrc/fold.cpp", "#include <torch/extension.h>"),
    (native_stays_behind_its_door, "../../csrc/kernels/fold.h", "STABLE_TORCH_LIBRARY(x, m) {}"),
    (native_stays_behind_its_door, "../../csrc/fold.cpp", "\n" * (MAX_FILE_LINES + 1)),
    (sizes, "model.py", "\n" * (MAX_FILE_LINES + 1)),
    (sizes, "model.py", "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES),
    (docstrings, "model.py", "x = 1"),
    (docstrings, "model.py", '"""M."""\nclass A:\n    """A."""\n    def b(self):\n        pass'),
    (bans, "model.py", "def f():\n    print(1)"),
    (bans, "model.py", "import pickle"),
    (bans, "model.py", "from torch import *"),
    (bans, "compat/checkpoints.py", "torch.load(path)"),
    (bans, "trainer.py", "torch.save(state, path)"),
    (bans, "model.py", "def f():\n    raise NotImplementedError"),
    (bans, "model.py", "x = 1  # TO" + "DO later"),
    (bans, "../../fptkernels/k.py", "@triton.autotune(configs=[])\ndef f(): ..."),
    (records, "records.py", "@dataclass\nclass A:\n    x: int"),
    (records, "records.py", "@dataclass(frozen=True)\nclass A:\n    x: dict[str, Tensor]"),
]


@pytest.mark.parametrize(("rule", "name", "source"), PLANTED)
def test_planted_violation_is_caught(rule: Rule, name: str, source: str, tmp_path: Path) -> None:
    clean = tmp_path / "python" / "fpt_fast"
    (clean / "ops").mkdir(parents=True)
    (tmp_path / "fptkernels").mkdir()
    lazily = 'def load():\n    """Load."""\n    import fptkernels.token_scores'
    (clean / "ops" / "library.py").write_text(f'"""Library."""\n{lazily}\n')
    (clean / "model.py").write_text('"""Model."""\nfrom fpt_fast.fusion import PromptFusion\n')
    assert list(rule(tmp_path)) == []
    path = clean / name
    path.resolve().parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source) + "\n")
    assert len(list(rule(tmp_path))) == 1


def plant_op(root: Path) -> None:
    """A tree in which one op, ``fold``, stands in every place."""
    files = {
        "python/fpt_fast/ops/reference.py": "def fold(x): ...",
        "python/fpt_fast/ops/fold.py": "def fold(x): ...",
        "python/fpt_fast/ops/library.py": "_register('fold')",
        "python/fpt_fast/ops/frozen_schemas.py": "'fold(Tensor x) -> Tensor'",
        "tests/ops/test_fold.py": "fold",
        "benchmarks/bench_fold.py": "fold",
        "fptkernels/fold.py": "",
        "DESIGN.md": "| `fold(x)` | folds |",
    }
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("python/fpt_fast/ops/fold.py", "def crease(x): ..."),
        ("python/fpt_fast/ops/library.py", ""),
        ("python/fpt_fast/ops/frozen_schemas.py", ""),
        ("tests/ops/test_fold.py", ""),
        ("benchmarks/bench_fold.py", ""),
        ("DESIGN.md", ""),
        ("fptkernels/crease.py", ""),
    ],
)
def test_op_missing_in_one_place_is_caught(name: str, text: str, tmp_path: Path) -> None:
    plant_op(tmp_path)
    assert list(one_op_one_name(tmp_path)) == []
    (tmp_path / name).write_text(text)
    assert len(list(one_op_one_name(tmp_path))) == 1


def test_path_that_does_not_exist_is_caught(tmp_path: Path) -> None:
    plant_op(tmp_path)
    contributing = tmp_path / "CONTRIBUTING.md"
    contributing.write_text("See `DESIGN.md`, `tests/ops/test_<op>.py` and `fptkernels/<op>.py`.")
    assert list(contributing_paths(tmp_path)) == []
    contributing.write_text("See `docs/missing.md`, `benchmarks/plain_<op>.py`.")
    assert len(list(contributing_paths(tmp_path))) == 2


def test_module_that_design_does_not_know_is_caught(tmp_path: Path) -> None:
    folder = tmp_path / "python" / "fpt_fast"
    (folder / "cache").mkdir(parents=True)
    (folder / "cache" / "reader.py").touch()
    (folder / "fusion.py").touch()
    (tmp_path / "DESIGN.md").write_text("## 3. Layout\ncache/  features\nfusion.py\n## 4. Ops\n")
    assert list(layout_is_documented(tmp_path)) == []
    (folder / "fission.py").touch()
    assert len(list(layout_is_documented(tmp_path))) == 1
