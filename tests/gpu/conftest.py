"""The device of the tests in this folder.  A test that takes it also runs where there is no GPU."""

import pytest
import torch

from on_device import DEVICE


@pytest.fixture
def device() -> torch.device:
    """CUDA, or the CPU with kernels in Triton's interpreter: sizes follow ``on_device.ON_GPU``."""
    return DEVICE
