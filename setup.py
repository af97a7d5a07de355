"""Two packages from two places, and the C++ extension ``fpt_fast/_native.so``.

The library stands under ``python/``, the Triton kernels beside it; everything else is in
``pyproject.toml``.  The extension is a plain shared library on torch's stable ABI: one for all
versions of Python and torch.  Where it cannot be built, a note that says why takes its place.
Nothing here uses the network.
"""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
from native_build import find_torch, is_current, platform_tag, why_not  # noqa: E402

FLAGS = ["-std=c++20", "-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi"]
TORCH_2_10 = "0x020a000000000000"


class BuildNative(build_ext):
    """Compile, or leave ``_native_missing.txt`` behind and go on."""

    def run(self) -> None:
        package = ROOT / "python" if self.inplace else Path(self.build_lib)
        torch = find_torch()
        reason = why_not() or (None if torch else "there was no torch of 2.10 or newer to build on")
        if torch:
            for extension in self.extensions:
                extension.extra_compile_args += ["-isystem", str(torch / "include")]
                extension.library_dirs.append(str(torch / "lib"))
        try:
            if reason is None and not self.is_in_place(package):
                super().run()
        except (BaseError, CCompilerError) as error:
            self.warn(str(error))
            reason = "the compiler failed (pip install -v shows how)"
        note = package / "fpt_fast" / "_native_missing.txt"
        note.unlink(missing_ok=True)
        if reason:
            self.warn(f"no C++ extension: {reason}. The torch implementations serve instead.")
            note.parent.mkdir(parents=True, exist_ok=True)
            note.with_name("_native.so").unlink(missing_ok=True)  # that of older sources
            note.write_text(reason + "\n")

    def is_in_place(self, package: Path) -> bool:
        """Whether the source tree has it already: pip has made it in a folder of its own, of which
        distutils knows nothing."""
        (extension,) = self.extensions
        parts = [__file__, "csrc/native_build.py", *extension.sources, *extension.depends]
        built = package / "fpt_fast" / "_native.so"
        return bool(self.inplace) and not self.force and is_current(built, parts)

    def build_extensions(self) -> None:
        """Sources side by side: one after another they take minutes."""
        compile_all = self.compiler.compile

        def compile_each(sources: list[str], **options: object) -> list[str]:
            sys.stderr.write("compiling the C++ extension, which takes a minute or two\n")
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = pool.map(lambda source: compile_all([source], **options), sources)
                return [file for files in objects for file in files]

        self.compiler.compile = compile_each
        super().build_extensions()

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + ".so"


class AnyPython(bdist_wheel):
    """The platform counts, Python's version does not."""

    def get_tag(self) -> tuple[str, str, str]:
        built = self.get_finalized_command("build_ext").get_ext_fullpath("fpt_fast._native")
        return "py3", "none", platform_tag(Path(built), super().get_tag()[2])


setup(
    package_dir={"": "python", "fptkernels": "fptkernels"},
    packages=[*find_packages("python"), "fptkernels"],
    package_data={"fpt_fast": ["py.typed", "images/presets.json", "demo/backbone/*"]},
    include_package_data=False,
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPython},
    ext_modules=[
        Extension(
            "fpt_fast._native",
            sources=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/*.cpp")),
            depends=sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*.h")),
            define_macros=[("TORCH_STABLE_ONLY", None), ("TORCH_TARGET_VERSION", TORCH_2_10)],
            libraries=["torch_cpu"],
            extra_compile_args=FLAGS,
            language="c++",
        )
    ],
)
