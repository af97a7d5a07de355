"""Batches on their way to a device."""

import dataclasses

import torch

from fpt_fast.ops import quantise_kv
from fpt_fast.records import FeatureBatch
from fpt_fast.trainer.batches import move_batch


def test_every_tensor_moves_and_what_is_none_stays() -> None:
    kv8, k_scales, v_scales = quantise_kv(torch.randn(3, 2, 2, 2, 5, 4))
    rows, labels = torch.tensor([1, 0]), torch.tensor([0, 1])
    batch = FeatureBatch(torch.zeros(2, 3, 8, 8), kv8, rows, labels, ("a", "b"), k_scales, v_scales)
    moved = move_batch(batch, torch.device("meta"))
    for field in dataclasses.fields(FeatureBatch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        if isinstance(before, torch.Tensor):
            assert after.is_meta and after.shape == before.shape and after.dtype == before.dtype
        else:
            assert after == before
    alone = FeatureBatch(torch.zeros(2, 3, 8, 8), None, None, labels, ("a", "b"))
    moved = move_batch(alone, torch.device("cpu"))
    assert moved.kv is moved.rows is moved.k_scales is moved.v_scales is None
