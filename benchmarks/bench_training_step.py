"""One training step: forward, loss, backward, clipping and AdamW, against the plain baseline.

``pytest --benchmark-only benchmarks/bench_training_step.py`` measures tiny models, ``--full``
ViT-B at batch 16.  Ours reads f16 features as the cache holds them, the baseline f32 keys and
values as the published code does.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.beside import alternate
from benchmarks.counts import Count
from benchmarks.plain.model import PlainFpt, PlainSizes
from fpt_fast.compat.checkpoints import to_reference
from fpt_fast.config import FptConfig, Precision, TrainConfig, preset
from fpt_fast.model import FptModel, create_model
from fpt_fast.records import BackboneSpec, FeatureBatch
from fpt_fast.trainer.arithmetic import Arithmetic
from fpt_fast.trainer.memory import keep_freed_memory
from fpt_fast.trainer.optimizer import drop_gradients
from fpt_fast.trainer.schedule import build_optimizer

METHODS = ("fpt_plus", "fpt")
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")  # that a CPU multiplies
BATCH, OUTPUTS = 16, 5


def spec(full: bool) -> BackboneSpec:
    return BackboneSpec(
        name="vit_base_patch16_384" if full else "tiny",
        weights_hash="",
        hidden_size=768 if full else 96,
        num_heads=12,
        depth=12 if full else 4,
        patch_size=(16, 16) if full else (8, 8),
        prefix_tokens=1,
        has_class_token=True,
        image_size=(384, 384) if full else (32, 32),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def method_config(method: str, full: bool) -> FptConfig:
    if full:
        return preset(method)
    # The side width must stay a multiple of 12 heads.
    return preset(method, side_size=(32, 32), num_prompts=4)


def optimizer_of(module: torch.nn.Module) -> torch.optim.AdamW:
    """As published."""
    return torch.optim.AdamW(module.parameters(), lr=1e-4, weight_decay=0.1)


def published_step(
    module: torch.nn.Module, logits: Callable[[], Tensor], labels: Tensor
) -> Callable[[], Tensor]:
    """One step as the published recipe does it; returns the loss before it."""
    optimizer = optimizer_of(module)

    def step() -> Tensor:
        loss = functional.cross_entropy(logits(), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return step


def trainer_step(
    module: torch.nn.Module,
    logits: Callable[[], Tensor],
    labels: Tensor,
    precision: Precision = "float32",
) -> Callable[[], Tensor]:
    """The same as our trainer does it; what it asks of the allocator serves the plain step, too."""
    keep_freed_memory(labels.device)
    config = TrainConfig(learning_rate=1e-4, weight_decay=0.1, clip_norm=1.0, precision=precision)
    parameters = list(module.parameters())
    optimizer = build_optimizer(parameters, config, labels.device)
    arithmetic = Arithmetic(precision, labels.device)

    def step() -> Tensor:
        drop_gradients(parameters)
        with arithmetic.forward():
            out = logits()
        loss = functional.cross_entropy(out.float(), labels)
        arithmetic.backward(loss)
        arithmetic.step(optimizer, parameters, config.clip_norm)
        return loss.detach()

    return step


def make_batch(model: FptModel, kept: int, device: str, count: int = BATCH) -> FeatureBatch:
    width = model.spec.head_width
    kv = torch.randn(count, len(model.layers), 2, model.spec.num_heads, kept, width).half()
    pixels = torch.randn(count, 3, *model.config.side_size).to(device)
    labels = torch.randint(OUTPUTS, (count,)).to(device)
    kv = kv.to(device)
    return FeatureBatch(pixels, kv, None, labels, tuple(str(i) for i in range(count)))


def plain_model(model: FptModel) -> PlainFpt:
    """The baseline with ``model``'s weights."""
    spec, config = model.spec, model.config
    side_width = spec.hidden_size // config.side_reduction
    plain = PlainFpt(
        PlainSizes(
            layers=len(model.layers),
            frozen_width=spec.hidden_size,
            side_width=side_width,
            heads=spec.num_heads,
            prompts=config.num_prompts,
            prompt_dim=spec.hidden_size if config.prompt_dim == "frozen" else side_width,
            patch=spec.patch_size[0],
            side_size=config.side_size[0],
            outputs=model.num_outputs,
        )
    )
    plain.load_state_dict(to_reference(model))
    return plain


def steps_of(
    method: str,
    full: bool,
    device: str = "cpu",
    kept: int | None = None,
    count: int = BATCH,
    precision: Precision = "float32",
) -> tuple[Callable[[], Tensor], Callable[[], Tensor], int]:
    """Our step, the plain step on the same data and weights, and the bytes of features read, with
    ``kept`` tokens (205, or 9 of the tiny model) of ``count`` images."""
    model = create_model(
        method_config(method, full), backbone=spec(full), num_classes=OUTPUTS
    ).eval()  # dropout would keep the two from agreeing
    model.to(device)
    batch = make_batch(model, kept or (205 if full else 9), device, count)
    assert batch.kv is not None
    plain = plain_model(model).eval().to(device)
    keys, values = (batch.kv[:, :, i].transpose(0, 1).float().contiguous() for i in (0, 1))
    ours = trainer_step(model, lambda: model(batch), batch.labels, precision)
    theirs = published_step(plain, lambda: plain(batch.side_pixels, keys, values), batch.labels)
    return ours, theirs, batch.kv.nbytes


def step_flops(method: str, full: bool) -> int:
    """Operations of the forward of a batch, fusion and side network, linear layers and attention;
    the backward takes about twice as many."""
    model = create_model(method_config(method, full), backbone=spec(full), num_classes=OUTPUTS)
    layers, width, prompts = len(model.layers), model.spec.hidden_size, model.config.num_prompts
    side = width // model.config.side_reduction
    (height, breadth), (down, across) = model.config.side_size, model.spec.patch_size
    tokens = (height // down) * (breadth // across) + 1 + prompts
    kept = 205 if full else 9
    per_layer = 24 * tokens * side * side + 4 * tokens * tokens * side
    fusion = 4 * prompts * kept * width + 2 * prompts * width * side
    embedding = 2 * 3 * height * breadth * side
    return BATCH * (layers * (per_layer + fusion) + embedding)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", METHODS)
def bench_training_step(benchmark: Any, method: str, precision: Precision, full: bool) -> None:
    torch.manual_seed(0)
    ours, theirs, feature_bytes = steps_of(method, full, precision=precision)
    rtol = 1e-4 if precision == "float32" else 1e-2
    for _ in range(3):  # they agree as they learn
        torch.testing.assert_close(ours(), theirs(), rtol=rtol, atol=1e-5)

    loss = alternate(
        benchmark,
        ours,
        theirs,
        dtype=precision,
        count=Count(3 * step_flops(method, full), feature_bytes),
        rounds=9 if full else 5,
    )
    assert bool(loss.isfinite())
    benchmark.group = "training step"
    benchmark.extra_info |= {"method": method, "precision": precision}
    benchmark.extra_info["feature_bytes"] = feature_bytes
