"""What several models say of the same images, from one pass over the features."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fpt_fast.model import FptModel, feature_scales
from fpt_fast.ops import prompt_attention
from fpt_fast.records import FeatureBatch, Predictions, SweepBatch
from fpt_fast.sweep.stack import ModelStack
from fpt_fast.trainer import resolve_device
from fpt_fast.trainer.batches import move_batch
from fpt_fast.trainer.prediction import in_units, probabilities_of


def attend_all(stacks: Sequence[ModelStack], batch: FeatureBatch) -> list[Tensor | None]:
    """What the prompts of every stack read: [L, B, W * P, C] each, by one pass over the features.

    None for all where they are side networks alone.  Raises ``ValueError`` where the batch has no
    features although the models fuse them.
    """
    if not stacks[0].config.fusion:
        return [None] * len(stacks)
    if batch.kv is None:
        raise ValueError("the batch must hold features for these models, got none")
    queries = [stack.queries() for stack in stacks]
    q = torch.cat(queries, dim=2)
    attended = prompt_attention(q, batch.kv, batch.rows, feature_scales(batch))
    return list(torch.split(attended, [part.shape[2] for part in queries], 2))


@torch.no_grad()
def forward_all(
    stacks: Sequence[ModelStack], batches: Iterable[SweepBatch], device: torch.device
) -> tuple[list[Tensor], tuple[str, ...], Tensor]:
    """Logits [W, images, outputs] of each stack, on the CPU, keys and labels; no dropout.

    The side input is that of the first seed.
    """
    logits: list[list[Tensor]] = [[] for _ in stacks]
    keys: list[str] = []
    labels: list[Tensor] = []
    for batch in batches:
        shared = move_batch(batch.shared, device)
        for stack, part, into in zip(stacks, attend_all(stacks, shared), logits, strict=True):
            pixels = shared.side_pixels.to(stack.weights.dtype).expand(len(stack), *(-1,) * 4)
            into.append(stack.forward(pixels, part, None).float())
        keys.extend(batch.shared.keys)
        labels.append(batch.shared.labels)
    return [torch.cat(parts, dim=1).cpu() for parts in logits], tuple(keys), torch.cat(labels).cpu()


def predict_sweep(
    models: Sequence[FptModel],
    batches: Iterable[SweepBatch],
    *,
    device: str | torch.device,
    target: tuple[float, float] | None = None,
) -> list[Predictions]:
    """Predictions of each model, in their order; those with equal configurations run as one.

    ``target`` as in ``trainer.predict``.
    """
    place = resolve_device(device)
    rows: dict[str, list[int]] = {}
    for row, model in enumerate(models):
        rows.setdefault(repr(model.config), []).append(row)
    stacks = [ModelStack([models[row] for row in of]) for of in rows.values()]
    if not stacks:
        return []
    for stack in stacks:
        stack.to(place)
    logits, keys, labels = forward_all(stacks, batches, place)
    regression = models[0].num_outputs == 1 and labels.dim() == 1
    of_row = {
        row: part[i]
        for of, part in zip(rows.values(), logits, strict=True)
        for i, row in enumerate(of)
    }
    return [
        in_units(
            Predictions(keys, labels, own, None if regression else probabilities_of(own, labels)),
            target,
        )
        for own in (of_row[row] for row in range(len(models)))
    ]
