"""What tests/interpreter.py takes out of Triton's interpreter is work done twice, and no more."""

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from fptkernels.select_tokens import select_tokens


def launch(heads: int) -> None:
    """One program a head, of several device functions."""
    k = torch.randn(1, heads, 5, 2)
    select_tokens(torch.rand(1, heads, 5), k, k, 3, torch.float32)


def test_many_programs_replace_the_language_as_often_as_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replaced: list[object] = []
    replace = interpreter._patch_builtin

    def count(package: object, *rest: object) -> None:
        replaced.append(package)
        replace(package, *rest)

    launch(1)  # functions are rewritten at their first call, and see more of the language then
    monkeypatch.setattr(interpreter, "_patch_builtin", count)
    launch(1)
    once = len(replaced)
    launch(6)
    assert len(replaced) == 2 * once > 0


def test_the_language_is_put_back() -> None:
    names = ("load", "arange", "program_id", "range")
    before = [getattr(tl, name) for name in names]
    launch(2)
    assert [getattr(tl, name) for name in names] == before
    with pytest.raises(ValueError, match="_semantic"):
        tl.arange(0, 4)
