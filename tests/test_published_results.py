"""What can be computed of the published tables without their data sets and their GPU."""

import json

import pytest
import torch

from fpt_fast.config import preset
from fpt_fast.model import FptModel
from helpers import ROOT, VIT_B

PUBLISHED = json.loads((ROOT / "tests" / "facts" / "published_results.json").read_text())
# With the head of 1000 ImageNet classes, which the authors' loader keeps.
VIT_BASE_PARAMETERS = 86_859_496


@pytest.mark.parametrize("method", ["fpt", "fpt_plus"])
def test_share_of_trainable_parameters(method: str) -> None:
    table = PUBLISHED["fpt_plus_table"]
    expected = table[method][table["columns"].index("params_percent")]
    with torch.device("meta"):
        model = FptModel(preset(method), VIT_B, 5)
    trainable = sum(parameter.numel() for parameter in model.parameters())
    assert round(100 * trainable / (VIT_BASE_PARAMETERS + trainable), 2) == expected
