"""Imports in fresh processes: silent, cheap, without triton, without touching a GPU."""

import os
import subprocess
import sys
import textwrap

import pytest

# As on a machine where triton is not installed: torch itself asks importlib for its spec.
HIDE_TRITON = """
    from importlib.machinery import PathFinder

    find_spec = PathFinder.find_spec
    PathFinder.find_spec = lambda name, *rest: (
        None if name.partition(".")[0] == "triton" else find_spec(name, *rest)
    )
    try:
        import triton
    except ImportError:
        pass
    else:
        raise SystemExit("triton is still here")
"""

SUBMODULES = (
    *("backbone", "cache", "cli", "compat.bridge", "compat.frozen_vit", "compat.side_vit"),
    *("config", "images", "loader", "model", "ops", "pipeline", "records", "report"),
    *("selection", "trainer"),
)


def run_fresh(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *flags, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        env={**environment, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=False,
    )


def test_import_is_silent_and_cheap() -> None:
    heavy = ["matplotlib", "sklearn", "timm", "torch", "torchvision", "triton", "tyro"]
    done = run_fresh(
        f"""
        import sys
        import fpt_fast
        loaded = [name for name in {heavy} if name in sys.modules]
        sys.exit(f"imported {{loaded}}" if loaded else 0)
        """,
        "-W",
        "error",
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_every_public_name_resolves_in_a_fresh_process() -> None:
    done = run_fresh(
        """
        import fpt_fast
        for name in fpt_fast.__all__:
            assert getattr(fpt_fast, name) is getattr(fpt_fast, name), name
        try:
            fpt_fast.no_such_name
        except AttributeError as error:
            assert "no_such_name" in str(error)
        else:
            raise SystemExit("a name that does not exist resolved")
        from fpt_fast import *
        assert create_model and token_scores
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_everything_but_kernels_works_without_triton() -> None:
    done = run_fresh(
        textwrap.dedent(HIDE_TRITON)
        + textwrap.dedent(
            f"""
            import importlib
            for name in {SUBMODULES}:
                importlib.import_module("fpt_fast." + name)
            import torch
            from fpt_fast.ops import token_scores
            q, k = torch.randn(2, 1, 2, 5, 8)
            expected = (q @ k.mT / 8**0.5).softmax(-1).mean(-2)
            for impl in ("reference", "cpu", "auto"):
                torch.testing.assert_close(token_scores(q, k, impl=impl), expected)
            """
        )
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("module", ["fpt_fast.ops", "fpt_fast.model", "fpt_fast.cli", "fptkernels"])
def test_import_touches_no_gpu_and_warns_of_nothing(module: str) -> None:
    done = run_fresh(
        f"""
        import os, sys, warnings
        import torch
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            import {module}
        assert not torch.cuda.is_initialized()
        ours = [str(w) for w in caught if w.filename.startswith(os.path.dirname({module}.__file__))]
        sys.exit("\\n".join(ours) or 0)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
