"""Several ranks train one model: each its rows of every batch, with the whole batch's result.

The ranks go through the same batches in the same order.  Each computes the logits of its own rows;
all logits and labels are gathered, so that the loss is that of the whole batch, whatever it is;
each rank's gradient is the part that its own logits contribute, and the parts add up.  Weights,
optimiser and random numbers are the same on all ranks at every step: dropout is drawn for the whole
batch, then each rank takes its rows of it.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fpt_fast.config import ConfigError
from fpt_fast.distributed import World
from fpt_fast.records import FeatureBatch
from fpt_fast.trainer.checkpoint import Checkpoint, cpu_state


@dataclass(frozen=True, slots=True)
class Share:
    """A rank's ``batch``: ``rows`` of a whole one of ``total`` images, the first ``counted`` of
    which count (0 where there are fewer images than ranks: then it holds one for the shapes)."""

    batch: FeatureBatch
    rows: range
    total: int
    counted: int


def shares_from(batches: Iterable[FeatureBatch], first: int, world: World) -> Iterator[Share]:
    """This rank's shares of the current epoch's batches from step ``first`` on.

    A source with ``iterate_shares(rows_of, step)``, which yields (images of the whole batch, those
    of its rows that ``rows_of`` of this number picks), spares each rank making the others' rows;
    one with ``iterate_from(step)`` those before ``first``.
    """

    def rows_of(total: int) -> range:
        return world.share(total) or range(1)

    iterate: Callable[..., Iterator[Any]] | None
    iterate = getattr(batches, "iterate_shares", None)
    if iterate is not None and world.size > 1:
        for total, batch in iterate(rows_of, first):
            yield Share(batch, rows_of(total), total, len(world.share(total)))
        return
    iterate = getattr(batches, "iterate_from", None)
    for batch in islice(batches, first, None) if iterate is None else iterate(first):
        total = len(batch.keys)
        rows = rows_of(total)
        part = batch if len(rows) == total else _rows_of_batch(batch, rows)
        yield Share(part, rows, total, len(world.share(total)))


def whole_loss(
    loss: Callable[[Tensor, Tensor], Tensor],
    logits: Tensor,
    labels: Tensor,
    share: Share | None,
    world: World,
) -> Tensor:
    """The loss of the whole batch, with the gradient of this rank's ``logits`` [rows, outputs]."""
    if world.size == 1 or share is None:
        return loss(logits, labels)
    own = logits[: share.counted]
    whole = world.gather_shares(own.detach(), share.total, "training")
    all_labels = world.gather_shares(labels[: share.counted], share.total, "training")
    if not share.counted:
        # No part of the loss, but of the graph, so that every rank has the same gradients.
        return loss(whole, all_labels) + 0.0 * logits.sum()
    before, after = whole[: share.rows.start], whole[share.rows.stop :]
    return loss(torch.cat((before, own, after)), all_labels)


def sum_gradients(parameters: Sequence[nn.Parameter], world: World) -> None:
    """Replace each gradient by its sum over the ranks, the same bits on each."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if world.size == 1 or not gradients:
        return
    flat = world.sum(torch.cat([gradient.reshape(-1) for gradient in gradients]), "training")
    parts = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, part in zip(gradients, parts, strict=True):
        gradient.copy_(part.view_as(gradient))


class WholeDropout:
    """Draws the dropout of whole batches; ``share`` is the one under way."""

    def __init__(self) -> None:
        self.share: Share | None = None

    @contextmanager
    def taken_by(self, model: nn.Module, world: World) -> Iterator[None]:
        """While open, every ``nn.Dropout`` of ``model`` takes its rows of the whole batch's.

        The images are along its ``batch_dim``, where it has one, else along the first axis; its
        ``factors(like, rate)``, where it has that, draws what its values are multiplied by.
        Raises ``ConfigError`` for modules that look at the whole batch in other ways.
        """
        modules = [] if world.size == 1 else _dropouts(model)
        rates = [module.p for module in modules]
        hooks = []
        for module, rate in zip(modules, rates, strict=True):
            hooks.append(module.register_forward_pre_hook(self._hook(rate)))
            module.p = 0.0
        try:
            yield
        finally:
            for module, rate, hook in zip(modules, rates, hooks, strict=True):
                hook.remove()
                module.p = rate

    def _hook(self, rate: float) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor | None]:
        def drop(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor | None:
            if not module.training or self.share is None:
                return None
            own, axis = inputs[0], int(getattr(module, "batch_dim", 0))
            shape = list(own.shape)
            shape[axis] = self.share.total
            factors = getattr(module, "factors", _factors)
            whole: Tensor = factors(own.new_empty(shape), rate)
            rows = self.share.rows
            return own * whole.narrow(axis, rows.start, len(rows))

        return drop


def require_same_weights(model: nn.Module, when: str, world: World) -> None:
    """Raise ``ValueError`` where the ranks' weights have parted."""
    if world.size == 1:
        return
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in cpu_state(model).items():
        state.update(name.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    world.require_same(state.hexdigest(), f"weights {when}")


def checkpoint_of_first(checkpoint: Checkpoint | None, world: World) -> Checkpoint | None:
    """The checkpoint of rank 0, the one that reads it; the others give None."""
    if world.size == 1:
        return checkpoint
    parts: list[bytes | None] = [None, None, None]
    if checkpoint is not None:
        state = json.dumps(checkpoint.state).encode()
        parts = [state, save(checkpoint.model), save(checkpoint.optimizer)]
    sent = [world.bytes_of_first(part, "resuming") for part in parts]
    if sent[0] is None or sent[1] is None or sent[2] is None:
        return None
    return Checkpoint(load(sent[1]), load(sent[2]), json.loads(sent[0]))


def _factors(like: Tensor, rate: float) -> Tensor:
    """What torch's dropout multiplies by."""
    return functional.dropout(torch.ones_like(like), rate, training=True)


def _dropouts(model: nn.Module) -> list[nn.Dropout]:
    found: list[nn.Dropout] = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            found.append(module)
        elif isinstance(module, _BatchNorm | _DropoutNd):
            raise ConfigError(
                "several ranks train models whose images do not see each other, and of random "
                f"modules only nn.Dropout; {name} is a {type(module).__name__}: train it in one "
                "process"
            )
    return found


def _rows_of_batch(batch: FeatureBatch, rows: range) -> FeatureBatch:
    """Those rows of a whole batch; a store that it points into stays as it is."""
    part = slice(rows.start, rows.stop)
    cut = replace(
        batch,
        side_pixels=batch.side_pixels[part],
        labels=batch.labels[part],
        keys=batch.keys[part],
    )
    if batch.rows is not None:
        return replace(cut, rows=batch.rows[part])
    return replace(
        cut,
        kv=None if batch.kv is None else batch.kv[part],
        k_scales=None if batch.k_scales is None else batch.k_scales[part],
        v_scales=None if batch.v_scales is None else batch.v_scales[part],
    )
