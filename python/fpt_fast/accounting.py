"""What training a model takes: parameters, and the bytes of one step, counted on any machine.

The step runs on fake tensors, which have shapes and no values, so that a ViT-B at 512 px is counted
in seconds on a laptop.  Counted are storages, each once, by their size.
"""

import copy
import dataclasses
import math
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fpt_fast.records import FeatureBatch


@dataclass(frozen=True, slots=True)
class Account:
    """One training step of a model on one batch.

    ``trainable`` and ``total`` count parameters, those of a frozen model included where they are
    known.  Bytes: of the parameters in memory (``parameter_bytes``), of the ``gradient_bytes`` and
    the ``optimizer_bytes`` (AdamW), of the batch, and of all that the forward pass keeps for the
    backward pass beside the parameters (``saved_bytes``, of which ``saved_batch_bytes`` are tensors
    of the batch).  ``peak_bytes``: the most that is alive at once in a step that is not the first,
    all of these included, as an allocator without waste would need.  ``peak_allocated`` and
    ``peak_reserved`` are measured, on a GPU (None elsewhere).
    """

    trainable: int
    total: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    batch_bytes: int
    saved_bytes: int
    saved_batch_bytes: int
    peak_bytes: int
    peak_allocated: int | None = None
    peak_reserved: int | None = None

    @property
    def share(self) -> float:
        """Trainable share of the parameters."""
        return self.trainable / self.total

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self) | {"share": self.share}


def account(model: nn.Module, batch: FeatureBatch, *, device: str = "fake") -> Account:
    """Count one training step (cross-entropy or, of one output, squares; AdamW) of ``model``.

    ``model`` is called as ``model(batch) -> logits [B, outputs]``.  It stays as it was, and may be
    on the meta device.  ``device``: ``"fake"`` counts on fake tensors as on a CPU; ``"cpu"`` and
    ``"cuda"`` run the steps on a copy there, ``"cuda"`` also with the allocator's peaks.  What
    attention keeps beside its output differs a little between devices.
    """
    if device == "fake":
        # A model may hold tensors that are neither parameters nor buffers.
        fake = FakeTensorMode(allow_non_fake_inputs=True)
        own = _faked(model, fake)
        with fake:
            return _count(own, _faked_batch(batch))
    placed = torch.device(device)
    with torch.random.fork_rng(devices=[placed] if placed.type == "cuda" else []):
        own = copy.deepcopy(model).to(placed)
        moved = _map_batch(batch, lambda tensor: tensor.to(placed))
        counted = _count(own, moved)
        return counted if placed.type != "cuda" else _measure(own, moved, counted, placed)


def parameter_efficiency(score: float, trainable: int, total: int) -> float:
    """PPE as published: ``score * exp(-log10(r + 1))``, r = trainable / all parameters."""
    return score * math.exp(-math.log10(trainable / total + 1))


def memory_efficiency(score: float, memory: float, full_fine_tuning: float) -> float:
    """PME as published: ``score * exp(-log10(m + 1))``, m = memory / that of full fine-tuning."""
    return score * math.exp(-math.log10(memory / full_fine_tuning + 1))


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Follows every storage that an operation makes, from its birth to its end."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count the storages of ``tensors`` from here on."""
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self.now -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run ``func`` and count what it returns."""
        out = func(*args, **(kwargs or {}))
        self.hold(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))
        return out


@dataclass(slots=True)
class _Saved:
    """Storages that were packed for the backward pass, kept alive so that each counts once."""

    aside: set[int]
    storages: dict[int, Any] = field(default_factory=dict)

    def pack(self, tensor: Tensor) -> Tensor:
        """Note the storage of ``tensor``."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.aside:
            self.storages[storage._cdata] = storage
        # Not the tensor itself: it may be the operation's own output, and would never be freed.
        return tensor.detach()


def _count(model: nn.Module, batch: FeatureBatch) -> Account:
    """Two steps: the first makes the optimiser's state, and the second is followed."""
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    held = [*model.parameters(), *model.buffers()]
    optimizer = torch.optim.AdamW(trained, lr=1e-9, foreach=False)
    saved = _Saved(_storages(held))
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        loss = _loss(model, batch)
    kept = list(saved.storages.values())
    of_batch = _storages(_tensors(batch))
    saved_bytes = sum(storage.nbytes() for storage in kept)
    batch_part = sum(storage.nbytes() for storage in kept if storage._cdata in of_batch)
    del kept, saved
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    gradients = [p.grad for p in trained if p.grad is not None]
    states = [
        value
        for values in optimizer.state.values()
        for value in values.values()
        if isinstance(value, Tensor)
    ]
    sizes = {
        "parameter_bytes": _bytes(held),
        "gradient_bytes": _bytes(gradients),
        "optimizer_bytes": _bytes(states),
        "batch_bytes": _bytes(_tensors(batch)),
        "saved_bytes": saved_bytes,
        "saved_batch_bytes": batch_part,
    }
    del gradients, loss
    optimizer.zero_grad()
    with _Alive() as alive:
        alive.hold([*held, *states, *_tensors(batch)])
        _loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    trainable, total = _parameters(model)
    return Account(trainable=trainable, total=total, peak_bytes=alive.peak, **sizes)


def _measure(
    model: nn.Module, batch: FeatureBatch, counted: Account, device: torch.device
) -> Account:
    """``counted`` with the allocator's peaks of two more steps on a GPU."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-9)
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    for _ in range(2):
        optimizer.zero_grad()
        _loss(model, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    torch.cuda.synchronize(device)
    return dataclasses.replace(
        counted,
        peak_allocated=torch.cuda.max_memory_allocated(device),
        peak_reserved=torch.cuda.max_memory_reserved(device),
    )


def _loss(model: nn.Module, batch: FeatureBatch) -> Tensor:
    logits: Tensor = model(batch)
    if logits.shape[1] == 1:
        return F.mse_loss(logits[:, 0], batch.labels.to(logits.dtype))
    return F.cross_entropy(logits, batch.labels)


def _parameters(model: nn.Module) -> tuple[int, int]:
    count = getattr(model, "trainable_parameters", None)
    if count is not None:
        trainable, total = count()
        return int(trainable), int(total)
    sizes = [(p.numel(), p.requires_grad) for p in model.parameters()]
    return sum(n for n, trained in sizes if trained), sum(n for n, _ in sizes)


def _faked(model: nn.Module, fake: FakeTensorMode) -> nn.Module:
    """A copy of ``model`` without values, as if on the CPU; ``model`` may be on the meta device."""
    memo: dict[int, Any] = {}
    with fake:
        for parameter in model.parameters():
            values = torch.empty(parameter.shape, dtype=parameter.dtype, device="cpu")
            memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
        for buffer in model.buffers():
            memo[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")
    return copy.deepcopy(model, memo)


def _faked_batch(batch: FeatureBatch) -> FeatureBatch:
    return _map_batch(batch, lambda t: torch.empty(t.shape, dtype=t.dtype, device="cpu"))


def _map_batch(batch: FeatureBatch, change: Callable[[Tensor], Tensor]) -> FeatureBatch:
    changed: dict[str, Any] = {
        item.name: change(value)
        for item in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, item.name), Tensor)
    }
    return dataclasses.replace(batch, **changed)


def _tensors(batch: FeatureBatch) -> list[Tensor]:
    values = [getattr(batch, item.name) for item in dataclasses.fields(batch)]
    return [value for value in values if isinstance(value, Tensor)]


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {tensor.untyped_storage()._cdata for tensor in tensors}


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
