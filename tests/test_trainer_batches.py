"""Batches on their way to a device."""

import dataclasses

import torch

from fpt_fast.ops import quantise_kv
from fpt_fast.records import FeatureBatch
from fpt_fast.trainer.batches import move_batch


def test_every_tensor_moves_and_what_is_none_stays() -> None:
    kv8, k_scales, v_scales = quantise_kv(torch.randn(3, 2, 2, 2, 5, 4))
    labels = torch.tensor([0, 1])
    batch = FeatureBatch(torch.zeros(2, 3, 8, 8), kv8, None, labels, ("a", "b"), k_scales, v_scales)
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


def test_a_batch_that_points_into_a_store_brings_its_own_rows() -> None:
    kv8, k_scales, v_scales = quantise_kv(torch.randn(3, 2, 2, 2, 5, 4))
    rows, labels = torch.tensor([2, 0]), torch.tensor([0, 1])
    batch = FeatureBatch(torch.zeros(2, 3, 8, 8), kv8, rows, labels, ("a", "b"), k_scales, v_scales)
    here = move_batch(batch, torch.device("cpu"))
    assert here.kv is kv8 and here.rows is rows and here.k_scales is k_scales
    moved = move_batch(batch, torch.device("meta"))
    assert moved.rows is None
    for tensor in (moved.kv, moved.k_scales, moved.v_scales):
        assert tensor is not None and tensor.is_meta and tensor.shape[0] == 2
