"""Products in bfloat16 cost no more than bf16 costs, with the kernels of a CPU between them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bench_training_step import METHODS, make_batch, method_config, plain_model, spec
from fpt_fast.model import create_model
from fpt_fast.trainer.arithmetic import Arithmetic
from helpers import assert_within_budget, spread_weights


@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_within_the_budget_of_bf16(method: str) -> None:
    """Beside the plain model under the same autocast; the oracle is the plain model in f64."""
    torch.manual_seed(0)
    model = create_model(method_config(method, False), backbone=spec(False), num_classes=5).eval()
    spread_weights(model, scale=0.1)
    batch = make_batch(model, kept=9, device="cpu")
    assert batch.kv is not None
    plain, exact = plain_model(model).eval(), plain_model(model).eval().double()
    keys, values = (batch.kv[:, :, i].transpose(0, 1).float() for i in (0, 1))

    def backward(logits: Tensor) -> None:
        functional.cross_entropy(logits, batch.labels).backward()

    with Arithmetic("bfloat16", torch.device("cpu")).forward():
        ours, rounded = model(batch).float(), plain(batch.side_pixels, keys, values).float()
    oracle = exact(batch.side_pixels.double(), keys.double(), values.double())
    assert_within_budget(*(logits.detach() for logits in (ours, oracle, rounded)))
    for logits in (ours, rounded, oracle):
        backward(logits)
    assert_within_budget(*(flat_gradient(x) for x in (plain_model_of(model), exact, plain)), 3.0)


def plain_model_of(model: nn.Module) -> nn.Module:
    """The plain model with this model's gradients."""
    named = {name: weight.grad for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(named[name])
        plain = plain_model(model)  # type: ignore[arg-type]
    for weight in plain.parameters():
        weight.grad = weight.detach().clone()
    return plain


def flat_gradient(model: nn.Module) -> Tensor:
    return torch.cat(
        [weight.grad.flatten() for _, weight in sorted(model.named_parameters())]  # type: ignore[union-attr]
    )
