"""The online path: images in, probabilities out, by one frozen pass for one model or for many."""

import dataclasses
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fpt_fast.config import ConfigError
from fpt_fast.images import DecodedStore, to_network_input
from fpt_fast.loader import LiveFeatures
from fpt_fast.metrics import halves
from fpt_fast.model import FptModel
from fpt_fast.pipeline.features import load_recorded_backbone
from fpt_fast.pipeline.recorded import RecordedRun, read_recorded_run
from fpt_fast.pipeline.run_folder import members_of
from fpt_fast.pipeline.temperatures import require_temperatures
from fpt_fast.profiling import span
from fpt_fast.records import (
    UNLABELLED,
    Attention,
    FeatureBatch,
    ImageItem,
    KeptFeatures,
    Predictions,
    Preprocessing,
    Views,
)
from fpt_fast.trainer import open_progress, resolve_device

Image = str | Path | Tensor


@dataclass(frozen=True, slots=True)
class _Prepared:
    """One image for the networks, once for each view: ``frozen`` [F, 3, h, w] (None for side
    networks alone), and ``side`` [V, 3, h, w] for each side size."""

    frozen: Tensor | None
    side: tuple[Tensor, ...]


class Predictor:
    """Trained runs, ready for images: ``Predictor("runs/a")(["x.png", "y.dcm"])``.

    ``runs`` is a run's folder, several, or a sweep's folder, whose models are all taken.  Several
    models see the same features, made once; their probabilities are averaged (a regression's
    grades and their cut points too; where an image may have several findings, each finding's own).
    ``views`` averages over mirrored images as well: ``"side"`` mirrors the side input alone, as
    training does, and costs no frozen pass; ``"both"`` mirrors the whole image.  ``calibrated``
    scales each model's logits by the temperature of its validation images, each finding's by its
    own.

    Raises ``ConfigError`` for runs that do not go together, and ``CacheMismatch`` where the
    frozen model found has other weights than that of the runs.
    """

    def __init__(
        self,
        runs: str | Path | Sequence[str | Path],
        *,
        backbone: str | None = None,
        checkpoint_path: Path | None = None,
        dtype: str = "auto",
        attention: Attention = "auto",
        device: str = "auto",
        views: Views = "one",
        calibrated: bool = False,
    ) -> None:
        named = [runs] if isinstance(runs, str | Path) else list(runs)
        folders = [folder for run in named for folder in members_of(Path(run))]
        if not folders:
            raise ConfigError("a predictor needs at least one run, got none")
        members = [read_recorded_run(folder) for folder in folders]
        _require_alike(folders, members)
        self._device = resolve_device(device)
        self._plan = members[0].plan
        self._models = [member.model.to(self._device).eval() for member in members]
        self._views = views
        self.runs = tuple(folders)
        self.classes = members[0].classes
        self.reading = self._plan.reading
        self.regression = members[0].regression
        self.several = members[0].several
        self.cuts = _mean_cuts(members)
        self.valued = members[0].target is not None
        self._targets = [member.target for member in members]
        sizes = dict.fromkeys(model.config.side_size for model in self._models)
        self._sides = {size: number for number, size in enumerate(sizes)}
        self._temperatures = [
            (require_temperatures(folder, member.model.extra) if calibrated else torch.ones(())).to(
                self._device
            )
            for folder, member in zip(folders, members, strict=True)
        ]
        self._features: LiveFeatures | None = None
        if any(model.config.fusion for model in self._models):
            frozen = load_recorded_backbone(
                self._plan,
                backbone=backbone,
                checkpoint_path=checkpoint_path,
                dtype=dtype,
                device=device,
                attention=attention,
            )
            self._features = LiveFeatures(self._plan.frozen_pass(frozen))

    def __call__(
        self,
        images: Sequence[Image],
        *,
        batch_size: int = 8,
        workers: int = 2,
        progress: bool = False,
    ) -> Predictions:
        """Predict ``images``: paths, or decoded [3, h, w] u8 (or u16) tensors, in their order.

        ``probabilities`` [images, classes] f32 are the mean over models and views; ``logits`` are
        their logarithms, or a regression's mean grades or numbers [images, 1].  ``workers`` threads
        decode and prepare images ahead of the networks; ``progress`` shows a bar, or lines.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        parts: list[Tensor] = []
        batches = -(-len(images) // batch_size)
        with open_progress("predict", batches, enabled=progress) as bar:
            for part in self._batches(images, batch_size=batch_size, workers=workers):
                parts.append(part)
                bar.advance()
        if not parts:
            raise ValueError("there must be at least one image to predict, got none")
        values = torch.cat(parts)
        keys = tuple(_key(image, number) for number, image in enumerate(images))
        shape = (len(values), len(self.classes)) if self.several else (len(values),)
        labels = torch.full(shape, UNLABELLED)
        if self.valued:
            unknown = torch.full(shape, torch.nan, dtype=torch.float64)
            return Predictions(keys, unknown, values, None)
        if self.regression:
            return Predictions(keys, labels, values, None, self.cuts)
        if self.several:
            return Predictions(keys, labels, torch.logit(values.double(), 1e-9).float(), values)
        smallest = torch.finfo(torch.float32).tiny
        return Predictions(keys, labels, values.clamp(min=smallest).log(), values)

    def _batches(
        self, images: Sequence[Image], *, batch_size: int, workers: int
    ) -> Iterator[Tensor]:
        """Batch by batch: probabilities [B, classes], or grades [B, 1], on the CPU."""
        prepared = self._prepare_ahead(images, workers, 2 * batch_size)
        keys = [_key(image, number) for number, image in enumerate(images)]
        for first in range(0, len(images), batch_size):
            names = keys[first : first + batch_size]
            yield self._predict(names, [next(prepared) for _ in names]).cpu()

    def _prepare_ahead(
        self, images: Sequence[Image], workers: int, ahead: int
    ) -> Iterator[_Prepared]:
        """Prepared images in order, at most ``ahead`` of them waiting."""
        waiting = deque(enumerate(images))
        running: deque[Future[_Prepared]] = deque()
        pool = ThreadPoolExecutor(max(1, workers), thread_name_prefix="fpt-predict")
        try:
            while waiting or running:
                while waiting and len(running) < ahead:
                    number, image = waiting.popleft()
                    running.append(pool.submit(self._prepare, image, number))
                yield running.popleft().result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _prepare(self, image: Image, number: int) -> _Prepared:
        decoded = image if isinstance(image, Tensor) else self._decode(Path(image))
        plan, views = self._plan.preprocessing, self._views
        frozen = None
        if self._features is not None:
            frozen = _inputs(decoded, plan, mirrored=views == "both")
        sides = tuple(
            _inputs(decoded, dataclasses.replace(plan, size=size), mirrored=views != "one")
            for size in self._sides
        )
        return _Prepared(frozen, sides)

    def _decode(self, path: Path) -> Tensor:
        item = ImageItem(path.as_posix(), path, UNLABELLED, "test", self._plan.reading)
        return DecodedStore(limit_bytes=0).get(item)

    @torch.no_grad()
    def _predict(self, keys: Sequence[str], prepared: Sequence[_Prepared]) -> Tensor:
        """Mean over models and views: [B, classes] or [B, 1] f32."""
        kept: list[KeptFeatures | None] = [None]
        if self._features is not None:
            pixels = torch.stack([p.frozen for p in prepared if p.frozen is not None])
            kept = [self._features.of_pixels(keys, view) for view in pixels.unbind(dim=1)]
        with span("copy"):
            sides = [
                torch.stack([p.side[number] for p in prepared]).to(self._device).unbind(dim=1)
                for number in range(len(self._sides))
            ]
        total: Tensor | None = None
        for number_of_model, model in enumerate(self._models):
            temperature, target = (
                self._temperatures[number_of_model],
                self._targets[number_of_model],
            )
            views = sides[self._sides[model.config.side_size]]
            for number, side in enumerate(views):
                features = kept[number] if number < len(kept) else kept[0]
                values = self._one(model, side, features, keys, temperature)
                if target is not None:
                    values = values.double() * target[1] + target[0]
                total = values if total is None else total + values
        assert total is not None
        return total / (len(self._models) * len(sides[0]))

    def _one(
        self,
        model: FptModel,
        side: Tensor,
        kept: KeptFeatures | None,
        keys: Sequence[str],
        temperature: Tensor,
    ) -> Tensor:
        used = kept if model.config.fusion else None
        batch = FeatureBatch(
            side_pixels=side,
            kv=None if used is None else used.kv.to(self._device),
            rows=None,
            labels=torch.full((len(keys),), UNLABELLED, device=self._device),
            keys=tuple(keys),
            k_scales=None if used is None else _on(used.k_scales, self._device),
            v_scales=None if used is None else _on(used.v_scales, self._device),
        )
        logits: Tensor = model(batch).float()
        if self.regression:
            return logits
        logits = logits / temperature
        return logits.sigmoid() if self.several else logits.softmax(dim=1)


def _inputs(image: Tensor, preprocessing: Preprocessing, *, mirrored: bool) -> Tensor:
    """The image, and its mirror image: [1 or 2, 3, h, w] f32."""
    views = [image, image.flip(-1)] if mirrored else [image]
    return torch.stack([to_network_input(view, preprocessing) for view in views])


def _on(scales: Tensor | None, device: torch.device) -> Tensor | None:
    return None if scales is None else scales.to(device)


def _key(image: Image, number: int) -> str:
    return f"image {number}" if isinstance(image, Tensor) else Path(image).as_posix()


def _require_alike(folders: Sequence[Path], members: Sequence[RecordedRun]) -> None:
    first, start = members[0], folders[0]
    for folder, member in zip(folders[1:], members[1:], strict=True):
        if _kind_of(member) != _kind_of(first):
            raise ConfigError(
                f"{folder} knows the classes {', '.join(member.classes)}, {start} "
                f"{', '.join(first.classes)}: their predictions cannot be averaged"
            )
        first.plan.require_equal(member.plan, str(folder))


def _kind_of(run: RecordedRun) -> tuple[object, ...]:
    """What runs must have in common for their predictions to be averaged."""
    return (run.classes, run.regression, run.several, run.target is None)


def _mean_cuts(members: Sequence[RecordedRun]) -> tuple[float, ...] | None:
    """The members' cuts averaged, as their grades are; None where none has learned any."""
    if all(member.cuts is None for member in members):
        return None
    own = [member.cuts or halves(len(member.classes)) for member in members]
    return tuple(statistics.fmean(cuts) for cuts in zip(*own, strict=True))
