"""Attention that others wrote for CUDA, with its log-sum-exp: torch's kernels and xformers.

Why one cannot run is in ``ops/cuda_reasons.py``, asked before anything here is called.
"""

import importlib

import torch
import torch.nn.functional as F
from torch import Tensor

# Elements: the kernels load 16 bytes of f16 at once, and f32 rows of 32 bytes suit them too.
_ALIGNMENT = 8


def flash(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's FlashAttention."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
        *_aligned(q, k, v), scale=q.shape[-1] ** -0.5
    )
    return _trimmed(out, lse, q)


def efficient(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """torch's memory-efficient attention, the one that takes f32."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        *_aligned(q, k, v), None, True, scale=q.shape[-1] ** -0.5
    )
    return _trimmed(out, lse, q)


def cudnn(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """cuDNN's attention, through torch."""
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *_aligned(q, k, v), None, True, scale=q.shape[-1] ** -0.5
    )
    return _trimmed(out, lse, q)


def xformers(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """xformers' memory-efficient attention, by whichever of its operators it prefers."""
    attend = importlib.import_module(
        "xformers.ops"
    ).memory_efficient_attention_forward_requires_grad
    rows = (tensor.transpose(1, 2) for tensor in _aligned(q, k, v))  # [B, N, H, D]
    out, lse = attend(*rows, scale=q.shape[-1] ** -0.5)
    return _trimmed(out.transpose(1, 2), lse, q)


def _aligned(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with zeros up to a width that all kernels take, and strides that they can load.

    Zeros in q and k add nothing to a logit, and those in v are columns that are cut off again;
    the scale stays that of the given width.
    """
    missing = -tensors[0].shape[-1] % _ALIGNMENT
    if missing:
        tensors = tuple(F.pad(tensor, (0, missing)) for tensor in tensors)
    return tuple(
        # Not contiguous(), which copies nothing where only the offset is odd.
        tensor if _is_aligned(tensor) else tensor.clone(memory_format=torch.contiguous_format)
        for tensor in tensors
    )


def _is_aligned(tensor: Tensor) -> bool:
    *steps, last = tensor.stride()
    used = [step for step, size in zip(steps, tensor.shape, strict=False) if size > 1]
    return last == 1 and all(step % _ALIGNMENT == 0 for step in (*used, tensor.storage_offset()))


def _trimmed(out: Tensor, lse: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp without padding.

    The log-sum-exp comes as [B, H, N] (flash), [B, H, N, 1] (cuDNN) or with N rounded up
    (efficient); all are of natural logarithms.
    """
    batch, heads, tokens, width = q.shape
    rows = lse.reshape(batch, heads, -1)[..., :tokens]
    return out[..., :width], rows.contiguous()
