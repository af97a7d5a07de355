"""Build the sdist and the wheel, install each in an environment of its own, and use it.

    python scripts/check_wheels.py                    # what `make wheels` runs
    python scripts/check_wheels.py --under PYTHON...  # and the op tests from the same wheel there

Three installations: the wheel (ops by the extension against the oracle, then a whole preload and
training on a few images), the sdist (ops), and the sdist where there is no C++ compiler (it must
succeed, say so once, and run in PyTorch).  An environment is empty but for a .pth file that borrows
the dependencies, torch first, from the one that runs this script: gigabytes need not be installed
anew.  ``--under`` takes Pythons with a torch of their own and pytest, hypothesis and the
dependencies, such as one with the oldest torch and one with the newest; prints what pytest said.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OP_TESTS = ("tests/ops", "tests/native", "tests/test_native.py")
PACKED = (
    *("fpt_fast/__init__.py", "fpt_fast/_native.so", "fpt_fast/py.typed"),
    *("fpt_fast/images/presets.json", "fpt_fast/demo/backbone/model.safetensors"),
    "fptkernels/prompt_attention.py",
)

# Run in the environment, outside of the clone.
OPS = """
import sys
from pathlib import Path
import torch, fpt_fast
from fpt_fast.ops import (
    explain, frozen_attention, prompt_attention, quantise_kv, select_tokens, token_scores)
from fpt_fast.ops.native_reasons import native_missing

assert Path(fpt_fast.__file__).is_relative_to(sys.prefix), fpt_fast.__file__
missing = native_missing()
impl = sys.argv[1]
torch.manual_seed(0)
q, k, v = torch.randn(3, 2, 3, 37, 16)
if impl == "native":
    assert missing is None, missing
else:
    assert "there was no C++ compiler" in missing, missing
    assert "impl='auto' runs 'cpu'" in explain("token_scores", q, k)

def close(op, *args, **kwargs):
    for ours, oracle in zip(op(*args, impl=impl, **kwargs), op(*args, impl="reference", **kwargs)):
        torch.testing.assert_close(ours, oracle, rtol=1e-4, atol=1e-5)

close(frozen_attention, q, k, v)
close(token_scores, q, k)
scores = token_scores(q, k)
close(select_tokens, scores, k, v, 7)
kv = select_tokens(scores, k, v, 7)[0].unsqueeze(1)
prompts = torch.randn(1, 3, 4, 16, requires_grad=True)
close(prompt_attention, prompts, kv)
kv8, *scales = quantise_kv(kv, torch.int8)
close(prompt_attention, prompts, kv8, None, tuple(scales))
prompt_attention(prompts, kv8, None, tuple(scales), impl=impl).sum().backward()
assert torch.isfinite(prompts.grad).all()
print(f"ops by {impl}, torch {torch.__version__}")
"""
WHOLE = """
import sys
from pathlib import Path
import numpy as np
from PIL import Image
from fpt_fast.demo.run import BACKBONE
from fpt_fast.pipeline import evaluate, preload, train

folder = Path(sys.argv[1])
pick = np.random.default_rng(0)
for split in ("train", "val", "test"):
    for label in ("a", "b"):
        (folder / "images" / split / label).mkdir(parents=True)
        for number in range(3):
            levels = pick.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(levels).save(folder / "images" / split / label / f"{number}.png")
data, cache, run = str(folder / "images"), str(folder / "cache"), str(folder / "run")
preload(data=data, backbone=str(BACKBONE), cache=cache, input_size="64")
train(data=data, cache=cache, run=run, epochs=1, side_size="32", batch_size=4)
print(f"preloaded and trained; test AUC {evaluate(run=run).metrics.values['auc']:.2f} (of noise)")
"""


def call(*command: object, cwd: Path, **environment: str) -> str:
    """Run a command; its output.  Raises ``SystemExit`` with it where the command fails."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env={**clean, "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, command))[:300]}\n{done.stdout[-6000:]}")
    return done.stdout


def build(target: Path, *options: str) -> Path:
    """What ``python -m build`` makes: the sdist, and unless ``options`` say --sdist the wheel from
    it; the last one made.
    """
    command = (sys.executable, "-m", "build", "--no-isolation", "--outdir", target)
    call(*command, *options, ROOT, cwd=target)
    made = list(target.iterdir())
    if len(made) != 2 - len(options):
        raise SystemExit(f"expected an sdist and one wheel, got {made}")
    return max(made, key=lambda file: file.suffix == ".whl")


def check_contents(wheel: Path) -> None:
    """One tag for every Python 3, and no file too few or too many."""
    tag = wheel.stem.split("-", 2)[2]
    if not tag.startswith("py3-none-manylinux_2_"):
        raise SystemExit(f"expected a wheel for any Python 3 and manylinux, got {tag}")
    packed = zipfile.ZipFile(wheel).namelist()
    if absent := [name for name in PACKED if name not in packed]:
        raise SystemExit(f"{wheel.name} lacks {', '.join(absent)}")
    strange = {name.split("/")[0] for name in packed} - {"fpt_fast", "fptkernels"}
    if any(not name.endswith(".dist-info") for name in strange):
        raise SystemExit(f"{wheel.name} holds {', '.join(sorted(strange))} too")


def environment(folder: Path) -> Path:
    """Python of a new environment, empty but for what it borrows."""
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own = Path(call(python, "-c", code, cwd=folder).strip())
    (own / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


def install(python: Path, what: Path, **variables: str) -> str:
    """Install without dependencies; what pip said."""
    return call(
        *(sys.executable, "-m", "pip", "--python", python, "install", "-v", "--no-index"),
        *("--no-deps", "--no-build-isolation", "--ignore-installed", what),
        cwd=python.parent,
        **variables,
    )


def check_wheel(wheel: Path, folder: Path) -> str:
    """Install and use the wheel."""
    python = environment(folder)
    install(python, wheel)
    said = "wheel: " + call(python, "-c", OPS, "native", cwd=folder)
    said += call(python, "-c", WHOLE, folder, cwd=folder).splitlines()[-1]
    info = call(python.with_name("fpt-fast"), "info", cwd=folder)
    if "native: levels " not in info:
        raise SystemExit(info)
    return said


def check_sdist(sdist: Path, folder: Path) -> str:
    """Install the sdist, compiling, and use its ops."""
    python = environment(folder)
    install(python, sdist)
    return "sdist: " + call(python, "-c", OPS, "native", cwd=folder)


def check_without_compiler(sdist: Path, folder: Path) -> str:
    """Install the sdist where no compiler is found: said once, and everything runs."""
    python = environment(folder)
    said = install(python, sdist, CXX="no-such-compiler")
    warnings = [line.strip() for line in said.splitlines() if "no C++ extension" in line]
    if len(warnings) != 1:
        raise SystemExit(f"expected to be told once, got {warnings} in\n{said}")
    return f"no compiler: {warnings[0]}\n{call(python, '-c', OPS, 'cpu', cwd=folder)}"


def check_under(wheel: Path, python: Path, folder: Path) -> str:
    """The op tests of this clone with the wheel under another Python and torch."""
    site = folder / "site"
    call(
        *(sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--target", site),
        wheel,
        cwd=folder,
    )
    code = "import torch, fpt_fast; print(torch.__version__, fpt_fast.__file__)"
    said = call(python, "-c", code, cwd=folder, PYTHONPATH=str(site))
    version, place = said.splitlines()[-1].split(maxsplit=1)
    if not Path(place).is_relative_to(site):
        raise SystemExit(f"expected fpt_fast of the wheel, got {place}")
    said = call(
        *(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", *OP_TESTS),
        cwd=ROOT,
        PYTHONPATH=str(site),
    )
    return f"op tests under torch {version}: {said.splitlines()[-1]}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Check everything; prints what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--under", nargs="*", type=Path, default=[], metavar="PYTHON")
    parser.add_argument("--only-under", action="store_true", help="skip the installations")
    parser.add_argument("--wheel", type=Path, help="for --under: one that was built before")
    parser.add_argument("--keep", type=Path, help="put a copy of the wheel into this folder")
    given = parser.parse_args(arguments)
    with (
        tempfile.TemporaryDirectory(prefix="fpt-fast-wheels-") as name,
        ThreadPoolExecutor() as pool,
    ):
        folder = Path(name)
        for place in ("source", "dist"):
            (folder / place).mkdir()
        checks = []
        if not given.only_under:
            # Beside each other, since most of it is compiling.
            sdist = build(folder / "source", "--sdist")
            print(f"{sdist.name} ({sdist.stat().st_size:,} bytes)")
            for check in (check_sdist, check_without_compiler):
                checks.append(pool.submit(check, sdist, folder / check.__name__))
        wheel = given.wheel.absolute() if given.wheel else build(folder / "dist")
        print(f"{wheel.name} ({wheel.stat().st_size:,} bytes)")
        check_contents(wheel)
        if given.keep:
            given.keep.mkdir(parents=True, exist_ok=True)
            shutil.copy(wheel, given.keep)
        if not given.only_under:
            checks.append(pool.submit(check_wheel, wheel, folder / "check_wheel"))
        for check in checks:
            print(check.result().strip())
        for number, python in enumerate(given.under):
            place = folder / f"under {number}"
            place.mkdir()
            print(check_under(wheel, python.absolute(), place), flush=True)


if __name__ == "__main__":
    main()
