"""clipped_adam: clipping and AdamW over all parameters of a model, as a training step ends.

Plain is ``clip_grad_norm_`` and ``torch.optim.AdamW``, as published; ``fused`` is the same with
torch's fused AdamW.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from benchmarks.bench_training_step import METHODS, OUTPUTS, method_config, spec
from benchmarks.beside import alternate
from benchmarks.counts import clipped_adam as count_of
from fpt_fast.model import create_model
from fpt_fast.trainer.optimizer import ClippedStep

CLIP_NORM = 1.0
Step = Callable[[], Tensor]


def steps_of(method: str, full: bool) -> tuple[Step, Step, Step, int]:
    """Ours, plain and fused steps over the same gradients, each of its own parameters, the first
    of which it returns; and how many values there are."""
    model = create_model(method_config(method, full), backbone=spec(full), num_classes=OUTPUTS)
    values = [parameter.detach() for parameter in model.parameters()]
    gradients = [torch.randn(value.shape) for value in values]

    def step_of(fused: bool, ours: bool) -> Step:
        parameters = [nn.Parameter(value.clone()) for value in values]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            # Clipped in place: to the same norm by every step after the first.
            parameter.grad = gradient.clone()
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.1, fused=fused)
        clipped_step = ClippedStep()

        def step() -> Tensor:
            if ours:
                clipped_step(optimizer, parameters, CLIP_NORM)
            else:
                nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
                optimizer.step()
            return parameters[0].detach()

        return step

    count = sum(value.numel() for value in values)
    return step_of(True, True), step_of(False, False), step_of(True, False), count


@pytest.mark.parametrize("method", METHODS)
def bench_clipped_adam(benchmark: Any, method: str, full: bool) -> None:
    torch.manual_seed(0)
    ours, plain, fused, values = steps_of(method, full)
    for _ in range(3):
        torch.testing.assert_close(ours(), plain(), rtol=1e-5, atol=1e-7)
    alternate(
        benchmark,
        ours,
        plain,
        dtype="float32",
        count=count_of(values),
        rounds=50,
        others={"fused": fused},
    )
    benchmark.group = "clipped_adam"
    benchmark.extra_info["case"] = method
