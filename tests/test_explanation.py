"""The prompts' weights are those of the attention that the model computes."""

import dataclasses

import pytest
import torch

from fpt_fast.explanation import prompt_weights
from fpt_fast.model import create_model
from fpt_fast.ops import quantise_kv
from helpers import TINY_SPEC, spread_weights


@pytest.mark.parametrize("method", ["fpt_plus", "fpt"])
@pytest.mark.parametrize("features", [torch.float16, torch.int8])
def test_weights_times_values_are_the_attention(method: str, features: torch.dtype) -> None:
    spec = dataclasses.replace(TINY_SPEC, hidden_size=48)
    model = create_model(method, backbone=spec, num_classes=3, num_prompts=5, side_size=(16, 16))
    spread_weights(model)
    fusion = model.eval().fusion
    assert fusion is not None
    layers = fusion.num_layers
    generator = torch.Generator().manual_seed(0)
    kv = torch.randn(2, layers, 2, 3, 7, 16, generator=generator).half()
    scales = None
    if features == torch.int8:
        kv, k_scales, v_scales = quantise_kv(kv, torch.int8)
        scales = (k_scales, v_scales)
    weights = prompt_weights(fusion, kv, scales)
    assert weights.shape == (2, layers, 3, 5, 7)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, layers, 3, 5))
    values = kv[:, :, 1].float()
    if scales is not None:
        values = values * scales[1].unsqueeze(-1)
    attended = (weights @ values).permute(1, 0, 3, 2, 4).flatten(-2)  # [L, B, P, C]
    expected = fusion(kv, None, scales)
    torch.testing.assert_close(fusion.project(attended), expected, rtol=1e-4, atol=1e-4)


def test_features_of_another_model_are_refused() -> None:
    model = create_model("fpt_plus", backbone=TINY_SPEC, num_classes=2, side_size=(16, 16))
    assert model.fusion is not None
    with pytest.raises(ValueError, match="other layers"):
        prompt_weights(model.fusion, torch.zeros(1, 1, 2, 3, 7, 16))
