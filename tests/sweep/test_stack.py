"""A model in a stack computes, learns and saves what it does alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fpt_fast.config import TrainConfig
from fpt_fast.fusion import dropout_factors
from fpt_fast.model import FptModel, create_model
from fpt_fast.ops import prompt_attention
from fpt_fast.records import FeatureBatch
from fpt_fast.sweep.optimizer import StackOptimizer
from fpt_fast.sweep.stack import ModelStack
from fpt_fast.trainer.schedule import build_optimizer
from helpers import TINY_SPEC, spread_weights

MODELS, IMAGES = 3, 4


def lone_models(method: str, **changes: object) -> list[FptModel]:
    settings = {"side_size": (16, 24), "side_reduction": 4, "num_prompts": 3, **changes}
    return [
        spread_weights(
            create_model(method, backbone=TINY_SPEC, num_classes=3, **settings).double(), seed
        )
        for seed in range(MODELS)
    ]


def batches(model: FptModel) -> list[FeatureBatch]:
    """One batch for each model: the same features, other pixels."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kv = normal(IMAGES, len(model.layers), 2, 3, 5, 16)
    labels = torch.tensor([0, 2, 1, 2])
    keys = tuple(str(i) for i in range(IMAGES))
    shape = (IMAGES, 3, *model.config.side_size)
    return [FeatureBatch(normal(*shape), kv, None, labels, keys) for _ in range(MODELS)]


def stacked_logits(
    stack: ModelStack, batches: list[FeatureBatch], keep: Tensor | None = None
) -> Tensor:
    pixels = torch.stack([batch.side_pixels for batch in batches])
    if not stack.config.fusion:
        return stack.forward(pixels, None, None)
    return stack.forward(pixels, prompt_attention(stack.queries(), batches[0].kv), keep)


def backward(stack: ModelStack, loss: Tensor) -> None:
    stack.take_gradients(torch.autograd.grad(loss, stack.leaves))


FORMS = [
    pytest.param("fpt_plus", {}, id="fpt_plus"),
    pytest.param("fpt", {}, id="fpt"),
    pytest.param("fpt_plus", {"fusion": False}, id="side alone"),
    pytest.param("fpt", {"prompt_norm": True}, id="norm and projection"),
]


@pytest.mark.parametrize(("method", "changes"), FORMS)
def test_logits_and_gradients_are_those_of_each_model_alone(
    method: str, changes: dict[str, object]
) -> None:
    models = lone_models(method, **changes)
    inputs = batches(models[0])
    stack = ModelStack(models)
    logits = stacked_logits(stack, inputs)
    weights = torch.randn(logits.shape, dtype=logits.dtype)
    backward(stack, (logits * weights).sum())
    for w, (model, batch) in enumerate(zip(models, inputs, strict=True)):
        alone = model.eval()(batch)
        torch.testing.assert_close(logits[w], alone, rtol=1e-10, atol=1e-12)
        (alone * weights[w]).sum().backward()
        gradients = stack.state_dict(stack.gradients[w])
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-8, atol=1e-11)


def test_dropout_factors_are_those_of_a_model_alone() -> None:
    models = lone_models("fpt_plus")
    inputs = batches(models[0])
    shape = (len(models[0].layers), IMAGES, 3, models[0].side.norm.normalized_shape[0])
    keep = []
    for seed in range(MODELS):
        generator = torch.Generator().manual_seed(seed)
        keep.append(dropout_factors(torch.empty(shape, dtype=torch.float64), 0.5, generator))
    logits = stacked_logits(ModelStack(models), inputs, torch.stack(keep))
    for seed, (model, batch) in enumerate(zip(models, inputs, strict=True)):
        torch.manual_seed(seed)
        torch.testing.assert_close(logits[seed], model.train()(batch), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_steps_are_those_of_torch(optimizer: str) -> None:
    recipes = [
        TrainConfig(optimizer=optimizer, weight_decay=decay, clip_norm=0.3)  # type: ignore[arg-type]
        for decay in (0.0, 0.1, 0.5)
    ]
    rates = (1e-3, 3e-3, 1e-2)
    models = lone_models("fpt_plus")
    inputs = batches(models[0])
    stack = ModelStack(models)
    together = StackOptimizer(stack, recipes)
    alone = [
        build_optimizer(model.eval().parameters(), recipe, torch.device("cpu"))
        for model, recipe in zip(models, recipes, strict=True)
    ]
    for step in range(6):
        factor = 1 - step / 10
        backward(stack, stacked_logits(stack, inputs).square().sum())
        together.step(torch.tensor([rate * factor for rate in rates]).double())
        for model, batch, lone, rate in zip(models, inputs, alone, rates, strict=True):
            lone.zero_grad()
            lone.param_groups[0]["lr"] = rate * factor
            model(batch).square().sum().backward()
            nn.utils.clip_grad_norm_(list(model.parameters()), 0.3)
            lone.step()
    for w, model in enumerate(models):
        for name, weight in stack.state_dict(stack.weights[w]).items():
            # The gradient to a bias of keys is rounding alone, which Adam divides by its epsilon.
            torch.testing.assert_close(weight, model.state_dict()[name], rtol=1e-9, atol=1e-8)


@pytest.mark.parametrize("optimizer", ["adamw", "adam"])
def test_steps_in_f32_are_those_in_f64(optimizer: str) -> None:
    recipes = [
        TrainConfig(optimizer=optimizer, weight_decay=decay, clip_norm=0.3)  # type: ignore[arg-type]
        for decay in (0.0, 0.1, 0.5)
    ]
    narrow, wide = (ModelStack(lone_models("fpt_plus")) for _ in range(2))
    narrow.weights, narrow.gradients = narrow.weights.float(), narrow.gradients.float()
    optimizers = [StackOptimizer(stack, recipes) for stack in (narrow, wide)]
    generator = torch.Generator().manual_seed(0)
    # Above the norm that is clipped, below it, and far below.
    scale = torch.tensor([1.0, 1e-3, 1e-6]).unsqueeze(1)
    for step in range(4):
        gradients = torch.randn(narrow.weights.shape, generator=generator) * scale
        rows = [0, 2] if step == 3 else [0, 1, 2]
        if step == 3:
            for stack, own in zip((narrow, wide), optimizers, strict=True):
                stack.keep(rows)
                own.keep(rows)
        for stack, own in zip((narrow, wide), optimizers, strict=True):
            stack.gradients.copy_(gradients[rows])
            own.step(torch.tensor([1e-3, 3e-3, 1e-2])[rows])
    torch.testing.assert_close(narrow.weights.double(), wide.weights, rtol=1e-6, atol=1e-7)
    for mine, exact in zip(optimizers[0].moments, optimizers[1].moments, strict=True):
        errors = (mine.double() - exact).norm(dim=1) / exact.norm(dim=1)
        assert errors.max() < 1e-6


def test_a_dropped_model_leaves_the_others_as_they_are() -> None:
    models = lone_models("fpt_plus")
    inputs = batches(models[0])
    stack = ModelStack(models)
    optimizer = StackOptimizer(stack, [TrainConfig()] * MODELS)

    def step(rows: list[int]) -> None:
        backward(stack, stacked_logits(stack, [inputs[row] for row in rows]).square().sum())
        optimizer.step(torch.full((len(rows),), 1e-2))

    step([0, 1, 2])
    expected = stack.weights.clone()
    stack.keep([0, 2])
    optimizer.keep([0, 2])
    assert torch.equal(stack.weights, expected[[0, 2]])
    step([0, 2])
    alone = ModelStack(models[2:])
    alone_optimizer = StackOptimizer(alone, [TrainConfig()])
    for _ in range(2):
        backward(alone, stacked_logits(alone, inputs[2:]).square().sum())
        alone_optimizer.step(torch.full((1,), 1e-2))
    torch.testing.assert_close(stack.weights[1], alone.weights[0], rtol=1e-9, atol=1e-10)


def test_a_row_that_is_not_finite_touches_no_other() -> None:
    models = lone_models("fpt_plus")
    inputs = batches(models[0])
    stack = ModelStack(models)
    expected = stacked_logits(stack, inputs).detach()
    stack.weights[1] = torch.nan
    logits = stacked_logits(stack, inputs)
    assert bool(logits[1].isnan().all())
    torch.testing.assert_close(logits[[0, 2]], expected[[0, 2]], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (lambda: lone_models("fpt_plus", num_prompts=4)[0], "same config"),
        (lambda: lone_models("fpt")[0], "same config"),
    ],
)
def test_models_that_do_not_stack_are_refused(other: Callable[[], FptModel], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelStack([lone_models("fpt_plus")[0], other()])


def test_frozen_parameters_and_empty_stacks_are_refused() -> None:
    model = lone_models("fpt_plus")[0]
    model.side.head.requires_grad_(False)
    with pytest.raises(ValueError, match=r"frozen side\.head\.weight"):
        ModelStack([model])
    with pytest.raises(ValueError, match="at least one model"):
        ModelStack([])
