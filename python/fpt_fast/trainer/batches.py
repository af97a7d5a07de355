"""What the trainer asks of a source of batches, and the one place where they change device."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from fpt_fast.profiling import span
from fpt_fast.records import FeatureBatch


class EpochBatches(Protocol):
    """Batches of one split: iterable any number of times, of known length.

    ``set_epoch(e)`` makes the next iteration that of epoch ``e``: order and augmentation must
    depend on nothing else but the source's own seed, or a resumed run cannot equal an
    uninterrupted one.  A source with ``iterate_from(step)``, which yields the batches from that
    step on, spares a resumed run making the ones before; one with ``iterate_shares`` spares each of
    several ranks making what the others train on (``ranks.shares_from``).  A source with a
    ``side_input`` that is not None brings something smaller in the place of ``side_pixels``, of
    which that makes them on the device, within the training step.
    """

    def __iter__(self) -> Iterator[FeatureBatch]: ...

    def __len__(self) -> int: ...

    def set_epoch(self, epoch: int) -> None: ...


def resolve_device(device: str | torch.device) -> torch.device:
    """Read a device name; ``"auto"`` is the first CUDA device, or else the CPU.

    Raises ``ValueError`` for a name that torch does not know, or CUDA where there is none.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'auto' or a torch device, got {device!r}") from error
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device {device!r} needs a CUDA device, and torch {torch.__version__} sees none; "
            "use device='cpu' or 'auto'"
        )
    return resolved


def move_batch(batch: FeatureBatch, device: torch.device) -> FeatureBatch:
    """Return the batch with every tensor on ``device``; itself where they are there already.

    A batch that points into a larger store elsewhere brings only its own rows along.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=True)

    with span("copy"):
        if batch.kv is not None and not is_on(batch.kv, device):
            batch = pick_rows(batch)
        return FeatureBatch(
            side_pixels=move(batch.side_pixels),
            kv=None if batch.kv is None else move(batch.kv),
            rows=None if batch.rows is None else move(batch.rows),
            labels=move(batch.labels),
            keys=batch.keys,
            k_scales=None if batch.k_scales is None else move(batch.k_scales),
            v_scales=None if batch.v_scales is None else move(batch.v_scales),
        )


def is_on(tensor: Tensor, device: torch.device) -> bool:
    """True where moving changes nothing; ``cuda`` without a number is the current device."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def pick_rows(batch: FeatureBatch) -> FeatureBatch:
    """The batch with its own records alone, where it points into a larger store."""
    if batch.kv is None or batch.rows is None:
        return batch
    return replace(
        batch,
        kv=batch.kv[batch.rows],
        rows=None,
        k_scales=None if batch.k_scales is None else batch.k_scales[batch.rows],
        v_scales=None if batch.v_scales is None else batch.v_scales[batch.rows],
    )


def check_labels(batch: FeatureBatch, num_classes: int) -> None:
    """Raise ``ValueError`` naming the first image whose label is not in 0..num_classes - 1, or no
    finite number where labels are numbers.

    Of several findings per image: unless there are ``num_classes`` of them, each 1, 0 or -1.
    """
    if batch.labels.dim() == 2:
        wrong = (batch.labels < -1) | (batch.labels > 1)
        if batch.labels.shape[1] != num_classes or bool(wrong.any()):
            raise ValueError(
                f"labels must be [B, {num_classes}] of 1, 0 or -1 (unknown), got "
                f"{tuple(batch.labels.shape)} from {int(batch.labels.min())} to "
                f"{int(batch.labels.max())}"
            )
        return
    if batch.labels.is_floating_point():
        if not bool(batch.labels.isfinite().all()):
            first = int((~batch.labels.isfinite()).nonzero()[0, 0])
            raise ValueError(f"training images need a value, {batch.keys[first]!r} has none")
        return
    bad = (batch.labels < 0) | (batch.labels >= num_classes)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"labels of training images must be in 0..{num_classes - 1}, got "
            f"{int(batch.labels[first])} for {batch.keys[first]!r}; label it or leave it out"
        )


def check_logits(logits: Tensor, batch_size: int, outputs: int) -> None:
    """Raise ``ValueError`` unless logits are [batch_size, outputs]."""
    if tuple(logits.shape) != (batch_size, outputs):
        raise ValueError(
            f"the model must return logits {(batch_size, outputs)} ([B, outputs]), got "
            f"{tuple(logits.shape)}; a regression loss needs one output, the others one a class"
        )
