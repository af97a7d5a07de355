"""The end of a training step: gradients clipped by their norm, and a step of the optimiser.

On a CPU both are one call, ``clipped_adam``, over the state of torch's own optimiser; where that
cannot run, they are torch's.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer

from fpt_fast.ops.native_optimizer import clipped_adam, has_clipped_adam

_ELSEWHERE = ("amsgrad", "maximize", "differentiable", "capturable")
_MOMENTS = ("exp_avg", "exp_avg_sq")


class ClippedStep:
    """``clip_grad_norm_`` and ``optimizer.step()``; gradients may stay as they were.

    The one call gives the same within rounding.  It lays the optimiser's state side by side, so
    that each entry becomes a view; its state dict is what it was.
    """

    def __init__(self) -> None:
        self._parameters: list[nn.Parameter] = []
        self._state: object = None
        self._moments: tuple[Tensor, Tensor]
        self._steps: Tensor

    def __call__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Sequence[nn.Parameter],
        clip_norm: float,
    ) -> None:
        """Clip the gradients of ``parameters`` to a norm of ``clip_norm``, and step."""
        gradients = _plain_gradients(parameters)
        if gradients is None or not _is_plain_adam(optimizer, parameters):
            nn.utils.clip_grad_norm_(parameters, clip_norm)
            optimizer.step()
            return
        if optimizer.state is not self._state or not _are_same(parameters, self._parameters):
            self._lay_out(optimizer, parameters)
        group = optimizer.param_groups[0]
        clipped_adam(
            self._parameters,
            gradients,
            self._moments,
            self._steps,
            rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            decay=group["weight_decay"],
            decoupled=isinstance(optimizer, torch.optim.AdamW),
            clip_norm=clip_norm,
        )

    @torch.no_grad()
    def _lay_out(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        """Move the optimiser's state into tensors that hold it of all parameters."""
        states = [optimizer.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state.update(empty_adam_state(parameter))
        first, second = (
            torch.cat([state[name].float().reshape(-1) for state in states]) for name in _MOMENTS
        )
        self._moments = first, second
        self._steps = torch.stack([state["step"].float() for state in states])
        counts = [parameter.numel() for parameter in parameters]
        for name, moment in zip(_MOMENTS, self._moments, strict=True):
            for parameter, state, part in zip(
                parameters, states, torch.split(moment, counts), strict=True
            ):
                state[name] = part.view(parameter.shape)
        for state, step in zip(states, self._steps, strict=True):
            state["step"] = step
        self._parameters, self._state = list(parameters), optimizer.state


def drop_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """``zero_grad(set_to_none=True)`` of an optimiser of ``parameters``, without its ceremony."""
    for parameter in parameters:
        parameter.grad = None


def empty_adam_state(parameter: Tensor) -> dict[str, Any]:
    """What torch's fused Adam has of ``parameter`` before its first step."""
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
        "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
    }


def _plain_gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor] | None:
    """The gradients; None where one is missing, or is no contiguous f32 on a CPU."""
    f32, strided = torch.float32, torch.strided  # looked up once: this is asked of each, every step
    gradients = []
    for parameter in parameters:
        gradient = parameter.grad
        if (
            gradient is None
            or gradient.dtype is not f32
            or gradient.layout is not strided
            or not gradient.is_cpu
            or not gradient.is_contiguous()
        ):
            return None
        gradients.append(gradient)
    return gradients


def _is_plain_adam(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> bool:
    """Whether ``optimizer`` is Adam or AdamW of just ``parameters``, with a plain rate and nobody's
    hooks, and the extension can make its step."""
    if type(optimizer) not in (torch.optim.AdamW, torch.optim.Adam) or not has_clipped_adam():
        return False
    group = optimizer.param_groups[0]
    return (
        len(optimizer.param_groups) == 1
        and isinstance(group["lr"], float)
        and not any(group[name] for name in _ELSEWHERE)
        and not (type(optimizer) is torch.optim.Adam and group.get("decoupled_weight_decay"))
        and "step" not in vars(optimizer)  # a scheduler counts its calls
        and not optimizer._optimizer_step_pre_hooks
        and not optimizer._optimizer_step_post_hooks
        and not torch_optimizer._global_optimizer_pre_hooks
        and not torch_optimizer._global_optimizer_post_hooks
        and _are_same(parameters, group["params"])
        and all(parameter.is_contiguous() for parameter in parameters)
    )


def _are_same(some: Sequence[nn.Parameter], others: Sequence[nn.Parameter]) -> bool:
    return len(some) == len(others) and all(map(is_, some, others))
