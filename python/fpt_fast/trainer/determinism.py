"""Bit-equal reruns: what must be asked of PyTorch for them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Only operations that give the same bits every time; one that cannot raises ``RuntimeError``.

    On a CPU training is bit-equal without it.  On a GPU cuBLAS wants a fixed workspace too, which
    must be set before its first use in the process.  The state before comes back afterwards.
    """
    if not enabled:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)
        torch.backends.cudnn.benchmark = benchmark
