"""How an op is made known to ``torch.library``: its schema, body and fake, and its gradient."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fpt_fast.ops import direct

library = torch.library.Library("fpt", "DEF")  # type: ignore[no-untyped-call]


def define(name: str, schema: str, body: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Make ``fpt::name`` known, with the body that every device runs and the fake for tracing."""
    library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    library.impl(name, body, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"fpt::{name}", fake, lib=library)
    direct.know(name, body)


def with_gradient(name: str, save: direct.Save, gradient: direct.Gradient) -> None:
    """``fpt::name`` has a gradient, of what ``save`` put into the context."""
    torch.library.register_autograd(f"fpt::{name}", gradient, setup_context=save, lib=library)
    direct.know_gradient(name, save, gradient)


def without_gradient(name: str) -> None:
    """A gradient through ``fpt::name`` is an error that says so."""

    def refuse(ctx: Any, *grads: Tensor | None) -> None:
        raise RuntimeError(f"fpt::{name} has no derivative; call it on tensors without grad")

    torch.library.register_autograd(f"fpt::{name}", refuse, lib=library)


def lse_dtype(q: Tensor) -> torch.dtype:
    """That of the sums kept for a backward pass: f64 for f64, else f32."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32
