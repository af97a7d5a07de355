"""Arithmetic of a training step: f32, or bf16 or f16 under autocast with weights in f32.

f16 reaches no further than 65,504 and loses what is below 6e-8, so that its loss is scaled before
the backward pass and gradients are scaled back; a step whose gradients overflowed changes nothing
and halves the scale (``torch.amp.GradScaler``).
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fpt_fast.config import Precision
from fpt_fast.profiling import span
from fpt_fast.trainer.optimizer import ClippedStep

# The default of torch, written here because a run that is resumed must begin with it.
_FIRST_SCALE = 2.0**16


class Arithmetic:
    """``precision`` on ``device``; nothing here waits for the device, but ``state``."""

    def __init__(self, precision: Precision, device: torch.device) -> None:
        self._device = device
        self._dtype = None if precision == "float32" else getattr(torch, precision)
        self._clipped_step = ClippedStep()
        self._scaler = None
        if precision == "float16":
            self._scaler = torch.amp.GradScaler(device.type, init_scale=_FIRST_SCALE)
            # The scale is made by its first use, which must not be within a captured step.
            self._scaler.scale(torch.zeros((), device=device))

    def forward(self) -> AbstractContextManager[Any]:
        """A context for the model's forward pass; its logits and the loss are computed in f32."""
        if self._dtype is None:
            return nullcontext()
        return torch.autocast(self._device.type, self._dtype)

    def backward(self, loss: Tensor) -> None:
        """The gradients of ``loss``, still scaled."""
        with span("backward"):
            scaled = loss if self._scaler is None else self._scaler.scale(loss)
            scaled.backward()  # type: ignore[no-untyped-call]

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        clip_norm: float,
    ) -> None:
        """Scale the gradients back, clip them, and make one step of the optimiser."""
        with span("optimiser"):
            if self._scaler is None:
                self._clipped_step(optimizer, parameters, clip_norm)
                return
            self._scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            self._scaler.step(optimizer)
            self._scaler.update()

    def state(self) -> dict[str, Any]:
        """What a resumed run must take up, as JSON values."""
        return {} if self._scaler is None else dict(self._scaler.state_dict())

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``, in place."""
        if self._scaler is not None and state:
            self._scaler.load_state_dict(dict(state))
