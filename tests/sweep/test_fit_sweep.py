"""A sweep trains each model as if it trained alone, from start, resume, failure to the end."""

import dataclasses
import json
import logging
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fpt_fast.config import ConfigError, TrainConfig
from fpt_fast.interrupts import Stopped
from fpt_fast.model import FptModel, create_model
from fpt_fast.records import FeatureBatch, SweepBatch
from fpt_fast.sweep import Trial, TrialOutcome, distinct_seeds, fit_sweep, make_trials
from fpt_fast.trainer import CheckpointError, fit
from helpers import TINY_SPEC, spread_weights

CLASSES, STEPS, IMAGES = 3, 3, 5
CHANGES = {"side_size": (16, 24), "side_reduction": 4, "num_prompts": 3}
RECIPE = TrainConfig(epochs=4, batch_size=IMAGES, learning_rate=3e-3)


class Batches:
    """The same features for all, and a side input for each seed; alone or for a sweep."""

    def __init__(self, seeds: tuple[int, ...], steps: int = STEPS) -> None:
        self.seeds, self.steps, self.epoch = seeds, steps, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def shared(self) -> Iterator[FeatureBatch]:
        generator = torch.Generator().manual_seed(self.epoch)
        for step in range(self.steps):
            images = IMAGES - (step == self.steps - 1)  # the last batch is smaller
            kv = torch.randn(images, 2, 2, 3, 5, 16, generator=generator, dtype=torch.float64)
            labels = torch.randint(CLASSES, (images,), generator=generator)
            keys = tuple(f"{step}/{i}" for i in range(images))
            yield FeatureBatch(self.pixels(self.seeds[0], step, images), kv, None, labels, keys)

    def pixels(self, seed: int, step: int, images: int) -> Tensor:
        generator = torch.Generator().manual_seed(1 + 97 * seed + 31 * self.epoch + step)
        return torch.randn(images, 3, 16, 24, generator=generator, dtype=torch.float64)


class LoneBatches(Batches):
    def __iter__(self) -> Iterator[FeatureBatch]:
        return self.shared()


class ManyBatches(Batches):
    def __iter__(self) -> Iterator[SweepBatch]:
        for step, batch in enumerate(self.shared()):
            images = len(batch.keys)
            pixels = [self.pixels(seed, step, images) for seed in self.seeds]
            yield SweepBatch(torch.stack(pixels), batch)


class FloatBatches(ManyBatches):
    """The same in f32, with features in f16 as a cache holds them."""

    def shared(self) -> Iterator[FeatureBatch]:
        for batch in super().shared():
            assert batch.kv is not None
            yield dataclasses.replace(
                batch, side_pixels=batch.side_pixels.float(), kv=batch.kv.half()
            )

    def pixels(self, seed: int, step: int, images: int) -> Tensor:
        return super().pixels(seed, step, images).float()


class LoneFloatBatches(FloatBatches):
    def __iter__(self) -> Iterator[FeatureBatch]:  # type: ignore[override]
        return self.shared()


class Interrupted(ManyBatches):
    """Stops, as after a signal, in the middle of an epoch."""

    def __iter__(self) -> Iterator[SweepBatch]:
        for step, batch in enumerate(super().__iter__()):
            if self.epoch == 2 and step == 1:
                raise Stopped("stopped by SIGTERM")
            yield batch


def model_of(trial: Trial) -> FptModel:
    model = create_model(
        trial.method, backbone=TINY_SPEC, num_classes=CLASSES, seed=trial.recipe.seed
    )
    return spread_weights(model.double(), trial.recipe.seed, scale=0.1)  # type: ignore[return-value]


def float_model(trial: Trial) -> FptModel:
    return model_of(trial).float()  # type: ignore[return-value]


def trials_of(**axes: tuple[float, ...]) -> tuple[Trial, ...]:
    method = create_model("fpt_plus", backbone=TINY_SPEC, num_classes=CLASSES, **CHANGES).config
    return make_trials(method, RECIPE, axes or {"learning_rate": (1e-3, 1e-2), "seed": (0, 4)})


def run(
    trials: tuple[Trial, ...],
    path: Path,
    train: type[Batches] = ManyBatches,
    model: Callable[[Trial], FptModel] = model_of,
    **settings: object,
) -> tuple[TrialOutcome, ...]:
    seeds = tuple(distinct_seeds(trials))
    val = FloatBatches if issubclass(train, FloatBatches) else ManyBatches
    return fit_sweep(
        [model(trial) for trial in trials],
        trials,
        train(seeds),  # type: ignore[arg-type]
        val(seeds[:1], 2),
        path=path / "sweep.safetensors",
        num_classes=CLASSES,
        device="cpu",
        progress=False,
        **settings,  # type: ignore[arg-type]
    )


def assert_same_outcomes(left: tuple[TrialOutcome, ...], right: tuple[TrialOutcome, ...]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.trial == b.trial and a.ended == b.ended
        assert a.best is not None and b.best is not None
        assert all(torch.equal(a.best[name], b.best[name]) for name in a.best)
        losses = [[record.loss for record in c.history.epochs] for c in (a, b)]
        assert losses[0] == losses[1] and len(losses[0]) == RECIPE.epochs


@pytest.mark.parametrize(
    "axes",
    [
        {"learning_rate": (1e-3, 1e-2), "seed": (0, 4)},
        {"num_prompts": (3, 5), "weight_decay": (0.0, 0.3)},
    ],
    ids=["rates and seeds", "prompts and decays"],
)
def test_each_model_equals_its_lone_twin(
    axes: dict[str, tuple[float, ...]], tmp_path: Path
) -> None:
    trials = trials_of(**axes)
    for outcome in run(trials, tmp_path):
        twin = model_of(outcome.trial)
        seed = outcome.trial.recipe.seed
        folder = tmp_path / outcome.trial.name
        history = fit(
            twin,
            LoneBatches((seed,)),
            LoneBatches(tuple(distinct_seeds(trials))[:1], 2),
            outcome.trial.recipe,
            run_dir=folder,
            num_classes=CLASSES,
            device="cpu",
            progress=False,
        )
        assert outcome.history.best_epoch == history.best_epoch
        for ours, theirs in zip(outcome.history.epochs, history.epochs, strict=True):
            assert ours.loss == pytest.approx(theirs.loss, rel=1e-6)
            assert ours.learning_rate == theirs.learning_rate
            assert ours.val == pytest.approx(theirs.val, rel=1e-6)
        best = FptModel.from_pretrained(folder / "best").eval()
        ours_best = model_of(outcome.trial).eval()
        assert outcome.best is not None
        ours_best.load_state_dict(outcome.best)
        for batch in LoneBatches((9,)):
            torch.testing.assert_close(ours_best(batch), best(batch), rtol=1e-6, atol=1e-7)


def test_products_in_bfloat16_are_those_of_the_lone_twin(tmp_path: Path) -> None:
    """Apart by no more than bf16 is from f32; the lone twins' own tests hold bf16 to its budget."""
    losses: dict[str, list[float]] = {}
    for precision in ("float32", "bfloat16"):
        recipe = dataclasses.replace(RECIPE, precision=precision, epochs=2)
        trials = make_trials(trials_of()[0].method, recipe, {"seed": (0, 4)})
        outcomes = run(trials, tmp_path / precision, FloatBatches, model=float_model)
        losses[precision] = [record.loss for o in outcomes for record in o.history.epochs]
        twins = []
        for outcome in outcomes:
            history = fit(
                float_model(outcome.trial),
                LoneFloatBatches((outcome.trial.recipe.seed,)),
                LoneFloatBatches(tuple(distinct_seeds(trials))[:1], 2),
                outcome.trial.recipe,
                run_dir=tmp_path / precision / outcome.trial.name,
                num_classes=CLASSES,
                device="cpu",
                progress=False,
            )
            twins += [record.loss for record in history.epochs]
        losses[f"{precision} alone"] = twins
    plain, rounded = torch.tensor(losses["float32"]), torch.tensor(losses["bfloat16"])
    rounding = (rounded - plain).abs().max()
    assert rounding > 1e-5  # the setting arrives
    apart = (rounded - torch.tensor(losses["bfloat16 alone"])).abs().max()
    assert apart <= 2 * rounding + 1e-5
    torch.testing.assert_close(plain, torch.tensor(losses["float32 alone"]), rtol=1e-5, atol=1e-6)


def test_float16_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    recipe = dataclasses.replace(RECIPE, precision="float16")
    trials = make_trials(trials_of()[0].method, recipe, {"seed": (0, 4)})
    with pytest.raises(ConfigError, match="float32 or bfloat16, got float16.*use bfloat16"):
        run(trials, tmp_path)


def test_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    trials = trials_of()
    expected = run(trials, tmp_path / "a")
    with pytest.raises(Stopped):
        run(trials, tmp_path / "b", Interrupted)
    assert_same_outcomes(run(trials, tmp_path / "b", resume=True), expected)


def test_a_sweep_of_an_earlier_version_is_resumed(tmp_path: Path) -> None:
    trials = trials_of()
    expected = run(trials, tmp_path / "a")
    with pytest.raises(Stopped):
        run(trials, tmp_path / "b", Interrupted)
    path = tmp_path / "b" / "sweep.safetensors"
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()["sweep"])
    for _, _, recipe in described["identity"]["trials"]:
        assert recipe.pop("target", "missing") is None  # a setting that it did not know
    save_file(load_file(path), path, metadata={"sweep": json.dumps(described)})
    assert_same_outcomes(run(trials, tmp_path / "b", resume=True), expected)


def test_another_sweep_is_not_resumed(tmp_path: Path) -> None:
    run(trials_of(), tmp_path)
    with pytest.raises(CheckpointError, match=r"trials\.\d\.2\.learning_rate: 0.01 -> 0\.02"):
        run(trials_of(learning_rate=(1e-3, 2e-2), seed=(0, 4)), tmp_path, resume=True)
    (tmp_path / "sweep.safetensors").write_bytes(b"x" * 40)
    with pytest.raises(CheckpointError, match="cannot read"):
        run(trials_of(), tmp_path, resume=True)


def test_a_trial_that_diverges_ends_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trials = trials_of(learning_rate=(1e-3, 1e300))
    with caplog.at_level(logging.WARNING):
        kept, lost = run(trials, tmp_path)
    assert lost.ended is not None and "learning rate below 1e+300" in lost.ended
    assert len(lost.history.epochs) < RECIPE.epochs == len(kept.history.epochs)
    assert "lr1e300 ended" in caplog.text and kept.ended is None
    (alone,) = run(trials[:1], tmp_path / "alone")
    for ours, theirs in zip(kept.history.epochs, alone.history.epochs, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-9)
    assert_same_outcomes(run(trials, tmp_path, resume=True)[:1], (kept,))


def test_halving_keeps_the_better_half(tmp_path: Path) -> None:
    trials = trials_of(learning_rate=(1e-5, 1e-3, 1e-2), seed=(0, 1))
    outcomes = run(trials, tmp_path, halve_every=1)
    lengths = sorted(len(outcome.history.epochs) for outcome in outcomes)
    assert lengths == [1, 1, 1, 2, 3, 4]
    after_one = {o.trial.name: o.history.epochs[0].val["auc"] for o in outcomes}
    dropped = {o.trial.name for o in outcomes if len(o.history.epochs) == 1}
    assert max(after_one[n] for n in dropped) <= min(
        value for name, value in after_one.items() if name not in dropped
    )
    assert all("worse half after epoch" in str(o.ended) for o in outcomes if o.ended)
    assert sum(outcome.ended is None for outcome in outcomes) == 1
    again = run(trials, tmp_path, halve_every=1, resume=True)
    assert [o.ended for o in again] == [o.ended for o in outcomes]


@pytest.mark.parametrize("loss", ["cross_entropy", "focal", "kappa"])
def test_losses(loss: str, tmp_path: Path) -> None:
    trials = tuple(
        dataclasses.replace(trial, recipe=dataclasses.replace(trial.recipe, loss=loss, epochs=1))
        for trial in trials_of()
    )
    for outcome in run(trials, tmp_path):
        history = fit(
            model_of(outcome.trial),
            LoneBatches((outcome.trial.recipe.seed,)),
            None,
            outcome.trial.recipe,
            run_dir=tmp_path / outcome.trial.name,
            num_classes=CLASSES,
            device="cpu",
            progress=False,
        )
        assert outcome.history.epochs[0].loss == pytest.approx(history.epochs[0].loss, rel=1e-6)
        assert math.isfinite(history.epochs[0].loss)


def test_recipes_must_agree(tmp_path: Path) -> None:
    first, second, *_ = trials_of()
    other = dataclasses.replace(second, recipe=dataclasses.replace(second.recipe, epochs=9))
    with pytest.raises(ConfigError, match="may differ in learning_rate"):
        run((first, other), tmp_path)
    with pytest.raises(ConfigError, match="each with its own name"):
        run((first, first), tmp_path)
    with pytest.raises(ConfigError, match="between halvings"):
        run((first, second), tmp_path, halve_every=0)
    bad = tuple(
        dataclasses.replace(t, recipe=dataclasses.replace(t.recipe, monitor="luck"))
        for t in (first, second)
    )
    with pytest.raises(ConfigError, match="monitor must be one of"):
        run(bad, tmp_path)


def test_the_checkpoint_is_json_and_tensors(tmp_path: Path) -> None:
    from safetensors import safe_open

    run(trials_of(), tmp_path)
    with safe_open(tmp_path / "sweep.safetensors", framework="pt") as file:
        described = json.loads(file.metadata()["sweep"])
    assert described["epoch"] == RECIPE.epochs and len(described["trials"]) == 4
