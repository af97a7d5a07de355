"""Triton's interpreter, without the work that it repeats at every call of a device function.

A launch puts interpreted functions in the place of ``triton.language``'s own.  Triton does so
again at every call of a ``@triton.jit`` function inside the kernel, where nothing is left to
replace: most of the time of a small kernel.
"""

from collections.abc import Callable
from typing import Any

from triton.runtime import interpreter


class _NothingToRestore:
    def restore(self) -> None:
        pass


def patch_each_module_once_a_launch() -> None:
    """From now on a launch replaces what one module's functions see of the language once."""
    patch: Callable[[Any], Any] = interpreter._patch_lang
    launch = interpreter.GridExecutor.__call__
    patched: set[int] = set()

    def patch_once(function: Any) -> Any:
        module = id(function.__globals__)
        if module in patched:
            return _NothingToRestore()
        scope = patch(function)
        patched.add(module)
        return scope

    def launch_anew(self: Any, *arguments: Any, **named: Any) -> Any:
        patched.clear()
        try:
            return launch(self, *arguments, **named)
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew
