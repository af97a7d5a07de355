"""Steps of several models side by side, against one step of one model alone.

``--full``: FPT+ on ViT-B, batch 16, 4 and 8 models that differ in their seed; ``times_one`` is what
a step of all of them takes, in steps of one model by the trainer's own path.  Features, labels and
optimiser included, decoding and augmentation not.  The plain twin trains as many plain models, one
after another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.bench_training_step import (
    OUTPUTS,
    PRECISIONS,
    make_batch,
    method_config,
    plain_model,
    published_step,
    spec,
    step_flops,
    trainer_step,
)
from benchmarks.beside import alternate
from benchmarks.counts import Count
from fpt_fast.config import Precision, TrainConfig
from fpt_fast.model import FptModel, create_model
from fpt_fast.sweep.optimizer import StackOptimizer
from fpt_fast.sweep.prediction import attend_all
from fpt_fast.sweep.stack import ModelStack
from fpt_fast.trainer.arithmetic import Arithmetic


@dataclass(frozen=True)
class Steps:
    """A step of all models together, of the first alone, of as many plain models; feature bytes."""

    together: Callable[[], Tensor]
    alone: Callable[[], Tensor]
    plain: Callable[[], list[Tensor]]
    feature_bytes: int


def sweep_steps(models: int, full: bool, precision: Precision = "float32") -> Steps:
    """``models`` that differ in their seed, on one batch; they agree with the plain ones, which
    are f32."""
    built = [
        create_model(
            method_config("fpt_plus", full), backbone=spec(full), num_classes=OUTPUTS, seed=seed
        ).eval()
        for seed in range(models)
    ]
    batch = make_batch(built[0], kept=205 if full else 9, device="cpu")
    assert batch.kv is not None
    keys, values = (batch.kv[:, :, i].transpose(0, 1).float().contiguous() for i in (0, 1))

    def plain_step(model: FptModel) -> Callable[[], Tensor]:
        twin = plain_model(model).eval()
        return published_step(twin, lambda: twin(batch.side_pixels, keys, values), batch.labels)

    plain = [plain_step(model) for model in built]
    stack = ModelStack(built)
    optimizer = StackOptimizer(stack, [TrainConfig()] * models)
    pixels = batch.side_pixels.expand(models, *(-1,) * 4).contiguous()
    rates = torch.full((models,), 1e-4)
    arithmetic = Arithmetic(precision, batch.labels.device)

    def together() -> Tensor:
        with arithmetic.forward():
            (attended,) = attend_all([stack], batch)
            logits = stack.forward(pixels, attended, None).float()
        losses = torch.stack([functional.cross_entropy(own, batch.labels) for own in logits])
        stack.take_gradients(torch.autograd.grad(losses.sum(), stack.leaves))
        optimizer.step(rates)
        return losses.detach()

    alone = trainer_step(built[0], lambda: built[0](batch), batch.labels, precision)
    return Steps(together, alone, lambda: [step() for step in plain], batch.kv.nbytes)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("models", [4, 8])
def bench_sweep(benchmark: Any, models: int, precision: Precision, full: bool) -> None:
    torch.manual_seed(0)
    steps = sweep_steps(models, full, precision)
    rtol = 1e-4 if precision == "float32" else 1e-2
    for _ in range(3):  # the first model learns the same in both
        torch.testing.assert_close(steps.together()[0], steps.alone(), rtol=rtol, atol=1e-5)
    losses = alternate(
        benchmark,
        steps.together,
        steps.plain,
        dtype=precision,
        count=Count(models * 3 * step_flops("fpt_plus", full), steps.feature_bytes),
        rounds=9 if full else 5,
        others={"one": steps.alone},
    )
    assert bool(losses.isfinite().all())
    benchmark.group = "sweep"
    benchmark.extra_info |= {"models": models, "precision": precision}
    if benchmark.enabled:
        benchmark.extra_info["times_one"] = 1 / benchmark.extra_info["one_over_ours"]
