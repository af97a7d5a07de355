"""Prediction: the model over all batches of a split, in their order."""

import math
from collections.abc import Callable, Iterable, Sequence, Sized
from itertools import accumulate

import torch
from torch import Tensor, nn

from fpt_fast.distributed import ALONE, World
from fpt_fast.records import FeatureBatch, Predictions
from fpt_fast.trainer.batches import move_batch, resolve_device
from fpt_fast.trainer.progress import open_progress
from fpt_fast.trainer.ranks import Share, shares_from


def predict(
    model: nn.Module,
    batches: Iterable[FeatureBatch],
    *,
    device: str | torch.device = "auto",
    regression: bool = False,
    target: tuple[float, float] | None = None,
    progress: bool = False,
    world: World = ALONE,
    after_batch: Callable[[], None] | None = None,
) -> Predictions:
    """Run ``model`` in evaluation mode over ``batches`` and collect what it says, on the CPU.

    ``probabilities`` are the softmax of the logits (of several findings per image their sigmoid),
    or None with ``regression``; ``target`` (of ``TrainConfig``) brings what the model says to the
    unit of the labels.  Keys stand in the order of the batches.  The model moves to
    ``device`` and keeps its training mode.  The ranks of ``world`` share the images, and each
    returns all of them.  ``after_batch`` is called after each batch.  Raises ``ValueError`` where
    there is no batch, or logits are not [B, outputs].
    """
    place = resolve_device(device)
    was_training = model.training
    model.to(place).eval()
    parts: list[tuple[Share, Tensor]] = []
    total = len(batches) if isinstance(batches, Sized) else 0
    shows = progress and world.is_first
    try:
        with torch.no_grad(), open_progress("predict", total, enabled=shows) as bar:
            for share in shares_from(batches, 0, world):
                if share.counted:
                    # They stay on the device until the end: copying each would wait for each.
                    parts.append((share, _logits(model, move_batch(share.batch, place))))
                else:
                    parts.append((share, torch.zeros(0)))
                bar.advance()
                if after_batch is not None:
                    after_batch()
    finally:
        model.train(was_training)
    if not parts:
        raise ValueError("predict needs at least one batch, got none: is the split empty?")
    return in_units(_collect(parts, regression, world), target)


def _logits(model: nn.Module, batch: FeatureBatch) -> Tensor:
    output: Tensor = model(batch).float()
    if output.dim() != 2 or len(output) != len(batch.keys):
        raise ValueError(
            f"the model must return logits [B, outputs] for {len(batch.keys)} images, "
            f"got {tuple(output.shape)}"
        )
    return output


def _collect(parts: Sequence[tuple[Share, Tensor]], regression: bool, world: World) -> Predictions:
    """The predictions of all ranks, in the order of the batches."""
    own = [(share, output) for share, output in parts if share.counted]
    what = "collecting predictions"
    width = own[0][1].shape[1] if own else 0
    widths = world.gather(torch.tensor([width]), what)
    outputs = max(int(width) for width in widths)
    logits = torch.cat([output for _, output in own]).cpu() if own else torch.zeros(0, outputs)
    labels = torch.cat([share.batch.labels[: share.counted].cpu() for share, _ in parts])
    keys = [key for share, _ in own for key in share.batch.keys]
    if world.size > 1:
        logits = torch.cat(world.gather(logits, what))
        labels = torch.cat(world.gather(labels, what))
        keys = [
            key
            for text in world.gather_text("\0".join(keys), what)
            for key in (text.split("\0") if text else [])
        ]
        order = _order([share.total for share, _ in parts], world)
        logits, labels = logits[order], labels[order]
        keys = [keys[at] for at in order.tolist()]
    if regression and logits.shape[1] != 1:
        raise ValueError(f"a regression has one output, got logits {tuple(logits.shape)}")
    return Predictions(
        keys=tuple(keys),
        labels=labels,
        logits=logits,
        probabilities=None if regression else probabilities_of(logits, labels),
    )


def _order(totals: Sequence[int], world: World) -> Tensor:
    """Where each image, in the order of batches of ``totals`` images, stands among those of rank 0,
    then those of rank 1, and so on."""
    firsts = list(accumulate(totals, initial=0))
    places = [
        first + row
        for rank in range(world.size)
        for first, total in zip(firsts, totals, strict=False)
        for row in world.share(total, rank)
    ]
    return torch.tensor(places).argsort()


def in_units(predictions: Predictions, target: tuple[float, float] | None) -> Predictions:
    """``predictions`` of a model that learned (label - mean) / deviation, in the label's unit."""
    if target is None:
        return predictions
    mean, deviation = target
    labels = predictions.labels
    if not labels.is_floating_point():  # of images that nobody labelled
        labels = torch.full(labels.shape, math.nan, dtype=torch.float64)
    logits = predictions.logits.double() * deviation + mean
    return Predictions(predictions.keys, labels, logits, None)


def probabilities_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax over classes; with ``labels`` [images, findings], each finding's own sigmoid."""
    return logits.sigmoid() if labels.dim() == 2 else logits.softmax(dim=1)
