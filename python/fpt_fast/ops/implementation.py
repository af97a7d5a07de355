"""Which implementation of an op runs, and why another cannot.

An implementation is registered once, by ``ops/library.py``, with a name, a loader that
imports it on first use, and a function that lists the reasons why it cannot run on given
arguments.  ``"auto"`` runs the first one, in order of registration, that has no reason.
"""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

AUTO = "auto"

Reasons = Callable[[Sequence[object]], list[str]]


@dataclass(frozen=True, slots=True)
class Implementation:
    """One implementation of one op: ``module``:``function``, imported on first use.

    ``reasons(args)`` gets the arguments of the public function (``impl`` left out) and says
    in full sentences why this implementation cannot run on them; empty where it can.
    """

    op: str
    name: str
    module: str
    function: str
    reasons: Reasons

    def load(self) -> Callable[..., Any]:
        """Import and return the function."""
        return _load(self.module, self.function)


_registry: dict[str, dict[str, Implementation]] = {}


def register(implementation: Implementation) -> None:
    """Add an implementation, after those of its op that ``auto`` should prefer."""
    of_op = _registry.setdefault(implementation.op, {})
    if implementation.name in of_op:
        raise ValueError(f"{implementation.op} already has an implementation {implementation.name}")
    of_op[implementation.name] = implementation


def ops() -> tuple[str, ...]:
    """Names of all ops that have an implementation."""
    return tuple(_registry)


def implementations(op: str) -> tuple[str, ...]:
    """Names of the implementations of ``op``, the one that ``auto`` prefers first."""
    return tuple(_of(op))


def unsupported_reasons(op: str, impl: str, *args: object) -> list[str]:
    """Why ``impl`` cannot run ``op`` on these arguments; empty where it can."""
    return _named(op, impl).reasons(args)


def resolve(op: str, impl: str, args: Sequence[object]) -> Implementation:
    """The implementation to run; raises ``ValueError`` with reasons where there is none."""
    if impl != AUTO:
        chosen = _named(op, impl)
        reasons = chosen.reasons(args)
        if reasons:
            raise ValueError(
                f"impl={impl!r} cannot run {op} here: {'; '.join(reasons)}. "
                "Use impl='auto', or mend the arguments"
            )
        return chosen
    for candidate in _of(op).values():
        if not candidate.reasons(args):
            return candidate
    raise ValueError(f"no implementation can run this call.\n{explain(op, *args)}")


def explain(op_name: str, *args: object) -> str:
    """Say which implementation ``impl="auto"`` runs on ``args``, and why each other does not.

    ``op_name`` is a public function of ``fpt_fast.ops`` and ``args`` are its arguments, in
    order.  Returns a few lines of text.  Raises ``ValueError`` for an unknown op.
    """
    of_op = _of(op_name)
    reasons = {name: candidate.reasons(args) for name, candidate in of_op.items()}
    chosen = next((name for name in of_op if not reasons[name]), None)
    if chosen is None:
        lines = [f"{op_name}: no implementation can run on these arguments"]
    else:
        lines = [f"{op_name}: impl='auto' runs {chosen!r}"]
    for name in of_op:
        if name == chosen:
            continue
        why = "; ".join(reasons[name]) or f"can run, but {chosen!r} is preferred"
        lines.append(f"  {name}: {why}")
    return "\n".join(lines)


def anywhere(args: Sequence[object]) -> list[str]:
    """Reasons of an implementation that runs on every device and dtype."""
    return []


def needs_device(device_type: str) -> Reasons:
    """Reasons of an implementation that runs on one type of device only."""

    def reasons(args: Sequence[object]) -> list[str]:
        elsewhere = sorted(
            {arg.device.type for arg in args if isinstance(arg, Tensor)} - {device_type}
        )
        if not elsewhere:
            return []
        return [f"it runs on {device_type} tensors, got tensors on {', '.join(elsewhere)}"]

    return reasons


def _of(op: str) -> dict[str, Implementation]:
    try:
        return _registry[op]
    except KeyError:
        raise ValueError(f"op must be one of {', '.join(_registry)}, got {op!r}") from None


def _named(op: str, impl: str) -> Implementation:
    of_op = _of(op)
    try:
        return of_op[impl]
    except KeyError:
        raise ValueError(
            f"impl must be {AUTO!r} or one of {', '.join(map(repr, of_op))} for {op}, got {impl!r}"
        ) from None


@cache
def _load(module: str, function: str) -> Callable[..., Any]:
    loaded: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return loaded
