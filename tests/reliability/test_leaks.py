"""Reading, refusing, resuming and counting leave no memory behind, whatever their number."""

from pathlib import Path
from tempfile import TemporaryDirectory

from children import exit_status
from reliability.attack import folder_in_memory
from reliability.leaks import check_leaks
from reliability.memory import COUNTS_MALLOC, Memory


def test_nothing_is_left_behind() -> None:
    with TemporaryDirectory(dir=folder_in_memory(), prefix="fpt-fast-leaks-") as root:
        # int8, since its records have all the parts that there are.
        assert exit_status(check_leaks, Path(root), "int8") == 0


def test_memory_in_use_is_what_malloc_gave_out() -> None:
    assert exit_status(hold_and_let_go) == 0  # where nobody else asks for memory


def hold_and_let_go() -> None:
    before = Memory.kept()
    held = bytearray(3 * 2**20)
    grown = Memory.kept() - before
    expected = len(held) if COUNTS_MALLOC else 0
    assert abs(grown.in_use - expected) < 2**20, grown
    del held
    left = Memory.kept() - before
    assert abs(left.in_use) < 2**20, left
