"""fit and predict: the published recipe, determinism, best epoch, errors, progress."""

import io
import itertools
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_training import (
    CLASSES,
    Recorder,
    ToyBatches,
    assert_equal_weights,
    toy_config,
    toy_model,
    weights_of,
    without_seconds,
)

from fpt_fast.config import ConfigError
from fpt_fast.records import UNLABELLED, FeatureBatch
from fpt_fast.trainer import TrainingError, fit, learning_rate_at, load_weights, predict
from fpt_fast.trainer import epoch as training_epoch
from fpt_fast.trainer.validation import is_better


@pytest.mark.parametrize("in_one_call", [False, True])
def test_fit_is_the_published_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_call: bool
) -> None:
    """Bit for bit by torch's optimiser, and within rounding by ``clipped_adam``."""
    if not in_one_call:
        monkeypatch.setattr("fpt_fast.trainer.optimizer.has_clipped_adam", lambda: False)
    config = toy_config(seed=11, epochs=2, clip_norm=0.05)
    trained = toy_model()
    history = fit(
        trained, ToyBatches(), None, config, run_dir=tmp_path, num_classes=CLASSES, device="cpu"
    )

    model = toy_model()
    parameters = [p for p in model.parameters() if p.requires_grad]
    recipe = {"betas": (0.9, 0.999), "weight_decay": 0.1}
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, fused=True, **recipe)
    batches = ToyBatches()
    torch.manual_seed(11)
    losses: list[list[float]] = [[], []]
    for epoch in range(2):
        batches.set_epoch(epoch)
        for step, batch in enumerate(batches):
            optimizer.param_groups[0]["lr"] = (
                1e-2 * 0.5 * (1 + math.cos(math.pi * (epoch + step / 4) / 2))
            )
            loss = nn.functional.cross_entropy(model(batch), batch.labels)
            optimizer.zero_grad()
            loss.backward()
            assert nn.utils.clip_grad_norm_(parameters, 0.05) > 0.05
            optimizer.step()
            losses[epoch].append(float(loss.detach()))
    if in_one_call:
        torch.testing.assert_close(weights_of(trained), weights_of(model))
    else:
        assert_equal_weights(weights_of(trained), weights_of(model))
    for record, expected in zip(history.epochs, losses, strict=True):
        assert record.loss == pytest.approx(sum(expected) / 4, rel=1e-6)
    assert history.epochs[-1].learning_rate == pytest.approx(
        1e-2 * 0.5 * (1 + math.cos(math.pi * 1.75 / 2))
    )


def test_learning_rate_warms_up_per_step_then_falls_to_zero() -> None:
    config = toy_config(epochs=6, warmup_epochs=2, learning_rate=2.0)
    rates = [learning_rate_at(epoch, config) for epoch in (0.0, 0.5, 1.75, 2.0, 4.0, 6.0)]
    assert rates == pytest.approx([0.0, 0.5, 1.75, 2.0, 1.0, 0.0])


def test_epoch_loss_counts_images_not_batches(tmp_path: Path) -> None:
    class Uneven(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            for step, batch in enumerate(super().__iter__()):
                count = 5 if step == 0 else 1
                yield FeatureBatch(
                    batch.side_pixels[:count], None, None, batch.labels[:count], batch.keys[:count]
                )

    model = toy_model()
    model.dropout.p = 0.0
    # So small a rate leaves the weights as they are.
    config = toy_config(epochs=1, learning_rate=1e-30)
    history = fit(model, Uneven(steps=3), None, config, run_dir=tmp_path, num_classes=CLASSES)
    predictions = predict(model, Uneven(steps=3))
    expected = nn.functional.cross_entropy(predictions.logits, predictions.labels)
    assert history.epochs[0].loss == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "sgd"])
def test_one_seed_one_result(tmp_path: Path, optimizer: str) -> None:
    results = []
    for run, seed in enumerate((3, 3, 4)):
        model = toy_model()
        torch.manual_seed(run)  # the caller's random state must not matter
        config = toy_config(seed=seed, optimizer=optimizer)
        history = fit(
            model,
            ToyBatches(),
            ToyBatches(2, 9, seed=1),
            config,
            run_dir=tmp_path / str(run),
            num_classes=CLASSES,
        )
        results.append((without_seconds(history), weights_of(model)))
    assert results[0][0] == results[1][0]
    assert_equal_weights(results[0][1], results[1][1])
    assert results[0][0] != results[2][0]


def test_fit_leaves_the_callers_random_state(tmp_path: Path) -> None:
    model = toy_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    fit(model, ToyBatches(), None, toy_config(), run_dir=tmp_path, num_classes=CLASSES)
    assert torch.equal(torch.rand(3), expected)


def test_parameters_without_gradient_stay(tmp_path: Path) -> None:
    model = toy_model()
    fit(model, ToyBatches(), None, toy_config(), run_dir=tmp_path, num_classes=CLASSES)
    assert torch.equal(model.frozen, torch.ones(2))


def test_training_learns(tmp_path: Path) -> None:
    model = toy_model()
    history = fit(
        model,
        ToyBatches(40, 16),
        ToyBatches(4, 50, seed=1),
        toy_config(epochs=6, weight_decay=0.0),
        run_dir=tmp_path,
        num_classes=CLASSES,
    )
    assert history.best_value is not None
    assert history.best_value > 0.95
    assert history.epochs[-1].val["loss"] < history.epochs[0].val["loss"]
    assert set(history.epochs[0].val) == {
        "loss", "auc", "auc_raw_logits", "accuracy", "f1", "precision", "recall", "kappa",
    }  # fmt: skip


def test_fewer_images_than_a_batch_train(tmp_path: Path) -> None:
    model = toy_model()
    before = weights_of(model)
    config = toy_config(batch_size=64)
    history = fit(model, ToyBatches(1, 2), None, config, run_dir=tmp_path, num_classes=CLASSES)
    assert all(math.isfinite(record.loss) for record in history.epochs)
    assert not torch.equal(model.head.weight, before["head.weight"])


@pytest.mark.parametrize("loss", ["mean_square_error", "mean_absolute_error", "smooth_l1"])
def test_regression(tmp_path: Path, loss: str) -> None:
    model = toy_model(outputs=1)
    history = fit(
        model,
        ToyBatches(30, 8),
        ToyBatches(2, 30, seed=1),
        toy_config(epochs=4, loss=loss, monitor="mae"),
        run_dir=tmp_path,
        num_classes=CLASSES,
    )
    values = [record.val["mae"] for record in history.epochs]
    assert history.best_value == min(values) < values[0]
    assert "auc" not in history.epochs[0].val


@pytest.mark.parametrize(
    ("values", "monitor", "best"),
    [
        ([0.2, 0.6, 0.4], "auc", 1),
        ([0.5, 0.5, 0.4], "auc", 0),
        ([-0.5, -0.9, -0.7], "kappa", 0),
        ([0.0, 0.0, 0.0], "kappa", 0),
        ([math.nan, 0.1, math.nan], "auc", 1),
        ([0.3, math.nan, 0.4], "auc", 2),
        ([0.5, 0.2, 0.3], "loss", 1),
        ([0.5, 0.5, 0.5], "loss", 0),
        ([math.inf, 0.5, 0.7], "loss", 1),
        ([math.inf, 0.5, 0.7], "auc", 2),
    ],
)
def test_best_epoch(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    values: list[float],
    monitor: str,
    best: int,
) -> None:
    script = iter(values)
    monkeypatch.setattr(training_epoch, "validate", lambda *_, **__: {monitor: next(script)})
    model = toy_model()
    recorder = Recorder(model)
    history = fit(
        model,
        ToyBatches(),
        ToyBatches(),
        toy_config(monitor=monitor),
        run_dir=tmp_path,
        num_classes=CLASSES,
        callbacks=[recorder],
    )
    assert history.best_epoch == best
    assert history.best_value == values[best]
    assert recorder.history is history
    assert [record.epoch for record in recorder.records] == [0, 1, 2]
    assert_equal_weights(load_file(tmp_path / "best/model.safetensors"), recorder.weights[best])
    load_weights(model, tmp_path / "best")
    assert_equal_weights(weights_of(model), recorder.weights[best])


def test_is_better_never_takes_nan() -> None:
    for monitor in ("auc", "loss", "mae", "mse"):
        assert not is_better(math.nan, None, monitor)
        assert not is_better(math.nan, 0.0, monitor)
        assert is_better(-1.0, None, monitor)


def test_validation_of_one_class_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = toy_model()
    val = ToyBatches(2, 4, labels=(1,))
    with caplog.at_level(logging.WARNING, "fpt_fast"):
        history = fit(model, ToyBatches(), val, toy_config(), run_dir=tmp_path, num_classes=CLASSES)
    assert history.best_epoch is None
    assert history.best_value is None
    assert_equal_weights(load_file(tmp_path / "best/model.safetensors"), weights_of(model))
    assert caplog.text.count("all images of this split are of one class") == 1
    assert "never a finite number: `best` holds the last epoch" in caplog.text

    by_loss = fit(
        toy_model(),
        ToyBatches(),
        val,
        toy_config(monitor="loss"),
        run_dir=tmp_path / "loss",
        num_classes=CLASSES,
    )
    assert by_loss.best_epoch is not None


@pytest.mark.parametrize("val", [None, ToyBatches(0)])
def test_without_validation_the_last_epoch_is_best(
    tmp_path: Path, val: ToyBatches | None, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy_model()
    history = fit(model, ToyBatches(), val, toy_config(), run_dir=tmp_path, num_classes=CLASSES)
    assert (history.best_epoch, history.best_value) == (2, None)
    assert all(record.val == {} for record in history.epochs)
    assert_equal_weights(load_file(tmp_path / "best/model.safetensors"), weights_of(model))
    assert "no validation images" in caplog.text


def test_eval_interval_skips_epochs_but_not_the_last(tmp_path: Path) -> None:
    config = toy_config(epochs=5, eval_interval=3)
    history = fit(
        toy_model(), ToyBatches(), ToyBatches(), config, run_dir=tmp_path, num_classes=CLASSES
    )
    assert [bool(record.val) for record in history.epochs] == [False, False, True, False, True]


def test_validation_loss_has_no_class_weights(tmp_path: Path) -> None:
    model = toy_model()
    val = ToyBatches(2, 9, seed=1)
    config = toy_config(epochs=1, loss_weight="balance")
    history = fit(
        model,
        ToyBatches(),
        val,
        config,
        run_dir=tmp_path,
        num_classes=CLASSES,
        class_counts=[90, 9, 1],
    )
    predictions = predict(model, val)
    expected = nn.functional.cross_entropy(predictions.logits, predictions.labels)
    assert history.epochs[0].val["loss"] == pytest.approx(float(expected))


@pytest.mark.parametrize("bad_step", [0, 2, 70])
def test_loss_not_finite_names_epoch_and_step(tmp_path: Path, bad_step: int) -> None:
    class Broken(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            for step, batch in enumerate(super().__iter__()):
                if self.epoch == 1 and step == bad_step:
                    batch.side_pixels[0, 0, 0, 0] = math.inf
                yield batch

    with pytest.raises(TrainingError, match=rf"epoch 1, step {bad_step} .*learning_rate"):
        fit(
            toy_model(),
            Broken(steps=75, size=2),
            None,
            toy_config(),
            run_dir=tmp_path,
            num_classes=CLASSES,
        )
    last = load_file(tmp_path / "last/model.safetensors")
    assert all(bool(tensor.isfinite().all()) for tensor in last.values())


def test_validation_logits_not_finite_name_the_image(tmp_path: Path) -> None:
    class Broken(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            for batch in super().__iter__():
                batch.side_pixels[2] = math.nan
                yield batch

    with pytest.raises(ValueError, match=r"'0/2\.png'"):
        fit(
            toy_model(),
            ToyBatches(),
            Broken(),
            toy_config(),
            run_dir=tmp_path,
            num_classes=CLASSES,
        )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"monitor": "acc"}, "loss, auc, auc_raw_logits, accuracy, f1.*got 'acc'"),
        ({"monitor": "auc", "loss": "smooth_l1"}, "loss, mae, mse.*got 'auc'"),
        ({"epochs": 3, "warmup_epochs": 3}, "warmup_epochs must be below epochs"),
        ({"loss_weight": "balance"}, "needs class_counts"),
        ({"loss_weight": "given", "loss_weights": (1.0, 2.0)}, "each of 3 classes, got 2"),
    ],
)
def test_settings_that_cannot_work_fail_first(
    tmp_path: Path, changes: dict[str, object], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        fit(
            toy_model(),
            ToyBatches(),
            None,
            toy_config(**changes),
            run_dir=tmp_path / "run",
            num_classes=CLASSES,
        )
    assert not (tmp_path / "run").exists()


def test_fit_checks_batches_labels_and_logits(tmp_path: Path) -> None:
    def train(model: nn.Module, batches: ToyBatches, num_classes: int = CLASSES) -> None:
        fit(model, batches, None, toy_config(), run_dir=tmp_path, num_classes=num_classes)

    class Short(ToyBatches):
        def __iter__(self) -> Iterator[FeatureBatch]:
            yield from itertools.islice(super().__iter__(), 2)

    with pytest.raises(ConfigError, match="at least one batch, got none"):
        train(toy_model(), ToyBatches(0))
    with pytest.raises(ConfigError, match="at least two classes, got 1"):
        train(toy_model(1), ToyBatches(), num_classes=1)
    with pytest.raises(ValueError, match=r"0\.\.2, got 3 for '0/1\.png'"):
        train(toy_model(), ToyBatches(labels=(0, 3)))
    with pytest.raises(ValueError, match=rf"got {UNLABELLED} for '0/0\.png'"):
        train(toy_model(), ToyBatches(labels=(UNLABELLED,)))
    with pytest.raises(ValueError, match=r"logits \(5, 3\).*got \(5, 1\)"):
        train(toy_model(1), ToyBatches())
    with pytest.raises(TrainingError, match="must yield 4 batches, its length, got 2"):
        train(toy_model(), Short())
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        train(toy_model().requires_grad_(False), ToyBatches())


@pytest.mark.parametrize("device", ["kuda", "cuda" if not torch.cuda.is_available() else "nope"])
def test_device_that_is_not_there(device: str) -> None:
    with pytest.raises(ValueError, match=f"'{device}'"):
        predict(toy_model(), ToyBatches(), device=device)


def test_predict_keeps_order_and_mode() -> None:
    model = toy_model().train()
    predictions = predict(model, ToyBatches(3, 2))
    assert predictions.keys == ("0/0.png", "0/1.png", "1/0.png", "1/1.png", "2/0.png", "2/1.png")
    assert predictions.logits.shape == (6, CLASSES)
    assert predictions.probabilities is not None
    assert torch.equal(predictions.probabilities, predictions.logits.softmax(dim=1))
    assert not predictions.logits.requires_grad
    assert model.training
    assert torch.equal(predictions.logits, predict(model, ToyBatches(3, 2)).logits)
    regression = predict(toy_model(1), ToyBatches(), regression=True)
    assert regression.probabilities is None
    with pytest.raises(ValueError, match="at least one batch"):
        predict(model, ToyBatches(0))
    with pytest.raises(ValueError, match="one output"):
        predict(model, ToyBatches(), regression=True)


def test_progress_is_log_lines_without_a_terminal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr", io.StringIO())
    with caplog.at_level(logging.INFO, "fpt_fast"):
        fit(
            toy_model(),
            ToyBatches(),
            ToyBatches(),
            toy_config(),
            run_dir=tmp_path,
            num_classes=CLASSES,
        )
    lines = [line for line in caplog.messages if line.startswith("train: epoch")]
    assert len(lines) == 3
    assert lines[0].startswith("train: epoch 1/3, loss ")
    assert "val auc" in lines[0]
    assert lines[0].endswith(" left")


@pytest.mark.parametrize("enabled", [True, False])
def test_progress_is_a_bar_on_a_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enabled: bool
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    fit(
        toy_model(),
        ToyBatches(),
        None,
        toy_config(),
        run_dir=tmp_path,
        num_classes=CLASSES,
        progress=enabled,
    )
    assert ("epoch 3/3, loss" in terminal.getvalue()) == enabled
    assert ("/12 [" in terminal.getvalue()) == enabled
