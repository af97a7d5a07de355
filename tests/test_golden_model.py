"""The native model against the authors' numbers: states, logits, losses, gradients, three steps."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fpt_fast.compat.checkpoints import to_native, to_reference
from fpt_fast.config import FptConfig
from fpt_fast.model import FptModel
from fpt_fast.records import BackboneSpec, FeatureBatch
from helpers import Golden, relative_error


def spec_of(golden: Golden) -> BackboneSpec:
    config = golden.config
    patch, image = config["patch_size"], config["image_size"]
    return BackboneSpec(
        name=golden.name,
        weights_hash="",
        hidden_size=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        depth=config["num_hidden_layers"],
        patch_size=(patch, patch),
        prefix_tokens=1,
        has_class_token=True,
        image_size=(image, image),
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def config_of(golden: Golden) -> FptConfig:
    config = golden.config
    side = config["side_input_size"]
    return FptConfig(
        method=config["method"],
        layers=tuple(config["layers_to_extract"]),
        token_ratio=config["token_ratio"],
        importance=config["token_importance"],
        num_prompts=config["num_prompts"],
        prompt_dim="frozen" if config["prompt_dim"] == config["hidden_size"] else "side",
        prompt_norm=config["prompt_norm"],
        prompt_proj=config["prompt_proj"],
        side_reduction=config["side_reduction"],
        side_size=(side, side),
    )


def is_key_bias(name: str) -> bool:
    """Softmax does not see it, so its gradient is rounding: see the vectors' README."""
    return name.endswith("attention.key.bias")


# "triton" runs in the interpreter, on the CPU.
@pytest.fixture(params=["auto", "triton"])
def model(golden: Golden, request: pytest.FixtureRequest) -> FptModel:
    model = FptModel(config_of(golden), spec_of(golden), golden.config["num_classes"])
    model.load_state_dict(to_native(golden.group("model"), model))
    assert model.fusion is not None
    model.fusion.impl = request.param
    return model.eval()


@pytest.fixture
def batch(golden: Golden) -> FeatureBatch:
    kv = torch.stack((golden["key_states"], golden["value_states"]), dim=2).transpose(0, 1)
    keys = tuple(str(i) for i in range(len(kv)))
    return FeatureBatch(golden["x_coarse"], kv.contiguous(), None, golden["labels"], keys)


def gradients(model: FptModel) -> dict[str, Tensor]:
    """The model's gradients under the authors' names."""
    with_gradients = FptModel(model.config, model.spec, model.num_outputs)
    with_gradients.load_state_dict(
        {name: parameter.grad for name, parameter in model.named_parameters()}
    )
    return to_reference(with_gradients)


def test_fused_states(golden: Golden, model: FptModel, batch: FeatureBatch) -> None:
    assert model.fusion is not None and batch.kv is not None
    states = model.fusion(batch.kv)
    assert relative_error(states, golden["fine_grained_states"]) < 1e-5


def test_states_of_picked_rows(golden: Golden, model: FptModel, batch: FeatureBatch) -> None:
    assert model.fusion is not None
    rows = torch.tensor([1, 0, 1])
    states = model.fusion(batch.kv, rows)
    assert relative_error(states, golden["fine_grained_states"][:, rows]) < 1e-5


def test_logits(golden: Golden, model: FptModel, batch: FeatureBatch) -> None:
    assert relative_error(model(batch), golden["logits"]) < 1e-5


def test_gradients(golden: Golden, model: FptModel, batch: FeatureBatch) -> None:
    functional.cross_entropy(model(batch), batch.labels).backward()
    got, expected = gradients(model), golden.group("grad")
    assert got.keys() == expected.keys()
    errors = {
        name: relative_error(got[name], expected[name])
        for name in expected
        if not is_key_bias(name)
    }
    assert max(errors.values()) < 1e-4, errors


def test_three_steps(golden: Golden, model: FptModel, batch: FeatureBatch) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, betas=(0.9, 0.999))
    losses, norms = [], []
    for _ in range(3):
        loss = functional.cross_entropy(model(batch), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        losses.append(loss.detach())
    assert relative_error(torch.stack(losses), golden["losses"]) < 1e-5
    assert relative_error(torch.stack(norms), golden["grad_norms"]) < 1e-4
    got, expected = to_reference(model), golden.group("stepped")
    assert got.keys() == expected.keys()
    errors = {
        name: relative_error(got[name], expected[name])
        for name in expected
        if not is_key_bias(name)
    }
    assert max(errors.values()) < 1e-3, errors


def test_order_of_tokens_does_not_matter(
    golden: Golden, model: FptModel, batch: FeatureBatch
) -> None:
    assert batch.kv is not None
    shuffled = batch.kv[..., torch.randperm(batch.kv.shape[4]), :]
    other = FeatureBatch(batch.side_pixels, shuffled, None, batch.labels, batch.keys)
    assert relative_error(model(other), golden["logits"]) < 1e-5
