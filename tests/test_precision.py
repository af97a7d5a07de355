"""Products in bfloat16 cost no more than bf16 costs, with the kernels of a CPU between them."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.bench_training_step import METHODS, make_batch, method_config, plain_model, spec
from fpt_fast import side_network
from fpt_fast.model import create_model
from fpt_fast.side_network import SideNetwork
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


@pytest.mark.parametrize("is_hooked", [False, True])
def test_patch_embedding_is_one_op_unless_it_is_hooked(
    monkeypatch: pytest.MonkeyPatch, is_hooked: bool
) -> None:
    """In bf16 alone, and with the result of the module within the budget of bf16."""
    side = SideNetwork(16, 2, 1, (16, 16), (32, 48), 3)
    calls, seen = [], []
    own = side_network.trained_linear

    def spy(*args: Tensor) -> Tensor:
        calls.append(args[0].shape)
        return own(*args)

    monkeypatch.setattr(side_network, "trained_linear", spy)
    if is_hooked:
        side.patch_embed.register_forward_hook(lambda *_: seen.append(1))
    pixels = torch.randn(2, 3, 32, 48)
    exact = side.embed(pixels)
    assert calls == [] and len(seen) == is_hooked
    with Arithmetic("bfloat16", torch.device("cpu")).forward():
        narrow = side.embed(pixels)
    assert calls == ([] if is_hooked else [(2, 2, 3, 3, 16, 16)]) and len(seen) == 2 * is_hooked
    torch.testing.assert_close(narrow, exact, rtol=2**-6, atol=2**-7)
