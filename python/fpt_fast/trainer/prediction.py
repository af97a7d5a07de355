"""Prediction: the model over all batches of a split, in their order."""

from collections.abc import Iterable, Sized

import torch
from torch import Tensor, nn

from fpt_fast.records import FeatureBatch, Predictions
from fpt_fast.trainer.batches import move_batch, resolve_device
from fpt_fast.trainer.progress import open_progress


def predict(
    model: nn.Module,
    batches: Iterable[FeatureBatch],
    *,
    device: str | torch.device = "auto",
    regression: bool = False,
    progress: bool = False,
) -> Predictions:
    """Run ``model`` in evaluation mode over ``batches`` and collect what it says, on the CPU.

    ``probabilities`` are the softmax of the logits (of several findings per image their sigmoid),
    or None with ``regression``.  Keys stand in
    the order of the batches.  The model moves to ``device`` and keeps its training mode.
    Raises ``ValueError`` where there is no batch, or logits are not [B, outputs].
    """
    target = resolve_device(device)
    was_training = model.training
    model.to(target).eval()
    keys: list[str] = []
    labels: list[Tensor] = []
    logits: list[Tensor] = []
    total = len(batches) if isinstance(batches, Sized) else 0
    try:
        with torch.no_grad(), open_progress("predict", total, enabled=progress) as bar:
            for batch in batches:
                output = model(move_batch(batch, target)).float()
                if output.dim() != 2 or len(output) != len(batch.keys):
                    raise ValueError(
                        f"the model must return logits [B, outputs] for {len(batch.keys)} images, "
                        f"got {tuple(output.shape)}"
                    )
                # They stay on the device until the end: copying each would wait for each.
                logits.append(output)
                labels.append(batch.labels)
                keys.extend(batch.keys)
                bar.advance()
    finally:
        model.train(was_training)
    if not logits:
        raise ValueError("predict needs at least one batch, got none: is the split empty?")
    all_logits = torch.cat(logits).cpu()
    if regression and all_logits.shape[1] != 1:
        raise ValueError(f"a regression has one output, got logits {tuple(all_logits.shape)}")
    all_labels = torch.cat([part.cpu() for part in labels])
    return Predictions(
        keys=tuple(keys),
        labels=all_labels,
        logits=all_logits,
        probabilities=None if regression else probabilities_of(all_logits, all_labels),
    )


def probabilities_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax over classes; with ``labels`` [images, findings], each finding's own sigmoid."""
    return logits.sigmoid() if labels.dim() == 2 else logits.softmax(dim=1)
