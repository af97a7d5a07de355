"""The training step over memory that stays where it is, so that it can be captured whole.

Learning rates of all steps lie on the device, and a counter there says which one is next; losses
are written beside it.  Inputs are copied into buffers of their own, but for the features: a store
in GPU memory, or a slot that batches are staged in, is read where it is.  Each size of batch and
each place of the features is captured once; the last, smaller batch of an epoch so has a step of
its own, and is exact.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fpt_fast.profiling import span
from fpt_fast.records import FeatureBatch
from fpt_fast.trainer.arithmetic import Arithmetic
from fpt_fast.trainer.batches import is_on, pick_rows
from fpt_fast.trainer.capture import Capture, Replay
from fpt_fast.trainer.checkpoint import random_state, restore_random_state
from fpt_fast.trainer.optimizer import empty_adam_state
from fpt_fast.trainer.schedule import learning_rate_at
from fpt_fast.trainer.step import check_step_labels, step_once

if TYPE_CHECKING:
    from fpt_fast.trainer.run import Run

LOGGER = logging.getLogger("fpt_fast")

# Two slots take turns.  Features that come at ever new addresses are copied to one.
_MOST_PLACES = 2
# A loader has two sizes of batches; what else comes is not worth the memory of a graph.
_MOST_SIZES = 4
# A capture near the end of the run makes steps that go beyond it, and are undone.
_SPARE_STEPS = 16
_FEATURES = ("kv", "k_scales", "v_scales")


@dataclass(slots=True)
class _Captured:
    """A captured step; the tensors that it reads are kept, or their memory would be another's."""

    replay: Replay
    inputs: FeatureBatch


class StaticStep:
    """``run``'s steps, captured by ``capture``; without one, or where it fails and ``required`` is
    not set, the same operations one by one.

    The optimiser must be ``build_optimizer(..., static=True)``, with its state restored.
    """

    looks: int | None = None

    def __init__(self, run: "Run", capture: Capture | None, *, required: bool = False) -> None:
        self._run = run
        self._capture = capture
        self._required = required
        self._arithmetic = Arithmetic(run.config.precision, run.device)
        self._steps = len(run.train_batches)
        total = self._steps * run.config.epochs
        rates = [learning_rate_at(step / self._steps, run.config) for step in range(total)]
        rates += [0.0] * _SPARE_STEPS
        self._rates = torch.tensor(rates, dtype=torch.float32, device=run.device)
        self._losses = torch.zeros(total + _SPARE_STEPS, device=run.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=run.device)
        self._rate = torch.zeros((), device=run.device)
        for group in run.optimizer.param_groups:
            group["lr"] = self._rate
        _complete_state(run.optimizer)
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._places: set[int] = set()
        self._captured: dict[tuple[object, ...], _Captured] = {}
        self._epoch = self._made = 0

    def begin(self, epoch: int, losses: Sequence[float]) -> None:
        """The next steps are those of ``epoch``, behind those that gave ``losses``."""
        self._epoch, self._made = epoch, len(losses)
        start = epoch * self._steps
        self._losses[start : start + len(losses)] = torch.tensor(losses)
        self._next.fill_(start + len(losses))

    def __call__(self, batch: FeatureBatch) -> None:
        """Copy what the step reads, and launch it."""
        check_step_labels(self._run, batch)
        with span("copy"):
            inputs = self._place(batch)
        key = _key(inputs)
        captured = self._captured.get(key)
        if captured is None and self._capture is not None and len(self._captured) < self._most():
            captured = self._try_to_capture(self._capture, key, inputs)
        if captured is None:
            self._step(inputs)
        else:
            captured.replay()
        self._made += 1

    def losses(self, first: int = 0) -> list[float]:
        """Losses of this epoch's steps so far, from step ``first`` on."""
        start = self._epoch * self._steps
        values: list[float] = self._losses[start + first : start + self._made].tolist()
        return values

    def state(self) -> dict[str, Any]:
        """The scale of f16 losses."""
        return self._arithmetic.state()

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state``."""
        self._arithmetic.restore(state)

    def _step(self, inputs: FeatureBatch) -> None:
        """One step: everything that a replay does again."""
        self._rate.copy_(self._rates.index_select(0, self._next).squeeze(0))
        loss = step_once(self._run, self._arithmetic, inputs)
        self._losses.index_copy_(0, self._next, loss.reshape(1))
        self._next.add_(1)

    def _most(self) -> int:
        return _MOST_SIZES * (_MOST_PLACES + 1)

    def _try_to_capture(
        self, capture: Capture, key: tuple[object, ...], inputs: FeatureBatch
    ) -> _Captured | None:
        put_back = self._remember()
        try:
            self._captured[key] = _Captured(capture(lambda: self._step(inputs)), inputs)
        except RuntimeError as error:
            if self._required:
                raise RuntimeError(
                    f"step='graph': this step cannot be captured ({error}); use step='eager'"
                ) from error
            LOGGER.warning("the step is not captured, its operations run one by one: %s", error)
            self._capture = None
            self._captured.clear()
        finally:
            put_back()
        return self._captured.get(key)

    def _remember(self) -> Callable[[], None]:
        """What puts everything that a step changes back as it is now, where it is now."""
        run = self._run
        own = (self._losses, self._next, self._rate)
        state = (v for values in run.optimizer.state.values() for v in values.values())
        changed = [*run.parameters, *run.model.buffers(), *own]
        changed += [value for value in state if isinstance(value, Tensor)]
        before = [tensor.detach().clone() for tensor in changed]
        generators, arithmetic = random_state(run.device), self.state()

        def put_back() -> None:
            with torch.no_grad():
                for tensor, value in zip(changed, before, strict=True):
                    tensor.copy_(value)
            restore_random_state(generators, run.device)
            self.restore(arithmetic)

        return put_back

    def _place(self, batch: FeatureBatch) -> FeatureBatch:
        """The batch in memory whose addresses come again."""
        if batch.kv is not None and not self._is_in_place(batch.kv):
            batch = pick_rows(batch)
            features = {
                name: None if (t := getattr(batch, name)) is None else self._copy(name, t)
                for name in _FEATURES
            }
        else:
            features = {name: getattr(batch, name) for name in _FEATURES}
        return FeatureBatch(
            side_pixels=self._copy("side_pixels", batch.side_pixels),
            kv=features["kv"],
            rows=None if batch.rows is None else self._copy("rows", batch.rows),
            labels=self._copy("labels", batch.labels),
            keys=batch.keys,
            k_scales=features["k_scales"],
            v_scales=features["v_scales"],
        )

    def _is_in_place(self, kv: Tensor) -> bool:
        """Whether features can be read where they are: on the device, at one of few addresses."""
        if not is_on(kv, self._run.device):
            return False
        if len(self._places) < _MOST_PLACES:
            self._places.add(kv.data_ptr())
        return kv.data_ptr() in self._places

    def _copy(self, name: str, source: Tensor) -> Tensor:
        """The values of ``source`` in the buffer of that name, whose address changes only where
        it must grow."""
        key = (name, source.dtype)
        flat = self._buffers.get(key)
        if flat is None or flat.numel() < source.numel():
            flat = torch.empty(source.numel(), dtype=source.dtype, device=self._run.device)
            self._buffers[key] = flat
        buffer = flat[: source.numel()].view(source.shape)
        if buffer.is_cuda and source.device.type == "cpu" and not source.is_pinned():
            # From other memory a copy may wait for the device.
            source = source.pin_memory()
        buffer.copy_(source, non_blocking=True)
        return buffer


def _key(inputs: FeatureBatch) -> tuple[object, ...]:
    """What must be the same for a captured step to be right: sizes, dtypes, and every address."""
    tensors = (inputs.side_pixels, inputs.rows, inputs.labels, inputs.kv, inputs.k_scales)
    return tuple(
        None if tensor is None else (tensor.data_ptr(), tensor.shape, tensor.dtype)
        for tensor in (*tensors, inputs.v_scales)
    )


def _complete_state(optimizer: torch.optim.Optimizer) -> None:
    """Make the state that an optimiser would make in its first step, as zeros: the same step.

    A captured step must find it; a momentum of 0 takes the first gradient as it is.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if state:
                continue
            if isinstance(optimizer, torch.optim.SGD):
                if group["momentum"]:
                    state["momentum_buffer"] = torch.zeros_like(parameter)
                continue
            state.update(empty_adam_state(parameter))
