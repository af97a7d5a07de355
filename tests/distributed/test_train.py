"""Ranks that train one model together end with that of one process, whatever befalls them."""

import csv
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from children import FAILED, STOPPED
from distributed.rank_work import RECIPES, fit_together, precise_fit, train_and_evaluate, train_rank
from distributed.ranks import run_ranks
from safetensors import safe_open
from safetensors.torch import load_file
from small_run import files_of
from toy_training import ToyBatches, assert_equal_weights, toy_config

from fpt_fast.config import AugmentConfig, ConfigError
from fpt_fast.distributed import World
from fpt_fast.images import DecodedStore, load_image_set
from fpt_fast.loader import FeatureLoader, NoFeatures
from fpt_fast.pipeline import PreloadSettings, TrainSettings, preload, train
from fpt_fast.records import FeatureBatch, Preprocessing
from fpt_fast.trainer import fit
from fpt_fast.trainer.checkpoint import WEIGHTS_NAME
from fpt_fast.trainer.ranks import shares_from

MakePreload = Callable[..., PreloadSettings]
MakeTrain = Callable[..., TrainSettings]
NEVER = (0, 0, 0)


def test_three_ranks_train_what_one_process_does(tmp_path: Path) -> None:
    """Batches of 5 and of 1 image: shares of 1 and 2, and two ranks with none.

    Losses that are no mean over images, dropout, weight decay, clipping; in f64, where only the
    loss itself is f32.
    """
    ended = run_ranks(fit_together, tmp_path, size=3)
    for rank in ended:
        assert rank.status == 0, rank.output
    for number, recipe in enumerate(RECIPES):
        model, history, said = precise_fit(tmp_path / f"alone {number}", recipe)
        expected = {**model.state_dict(), "logits": said.logits, "labels": said.labels}
        files = [tmp_path / f"{number} of {rank}" for rank in range(3)]
        assert_close_weights(load_file(files[0]), expected)
        for file in files[1:]:
            assert_equal_weights(load_file(file), load_file(files[0]))
        for file in files:
            with safe_open(file, framework="pt") as opened:
                told = opened.metadata()
            assert told["keys"] == repr(said.keys)
            assert_close_history(told["history"], repr(history))
        best = [tmp_path / f"{name} {number}" / "best" / WEIGHTS_NAME for name in ("run", "alone")]
        assert_close_weights(load_file(best[0]), load_file(best[1]))


def assert_close_weights(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-6, atol=1e-9)


def assert_close_history(left: str, right: str) -> None:
    """The same words, and numbers equal within f32's rounding."""
    split = [
        text.replace("(", " ").replace(")", " ").replace(",", " ").split() for text in (left, right)
    ]
    for ours, theirs in zip(*split, strict=True):
        try:
            numbers = [float(word.strip("'")) for word in (ours, theirs)]
        except ValueError:
            assert ours == theirs
        else:
            assert numbers[0] == pytest.approx(numbers[1], rel=1e-5, abs=1e-7, nan_ok=True)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def assert_close_tables(left: Path, right: Path, *, but: tuple[str, ...] = ()) -> None:
    ours, theirs = rows_of(left), rows_of(right)
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for name in a.keys() - set(but):
            try:
                assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-3), name
            except ValueError:
                assert a[name] == b[name], name


def test_train_and_evaluate_as_one_process(
    preload_settings: MakePreload,
    train_settings: MakeTrain,
    tmp_path: Path,
) -> None:
    """From a cache; steps of 5, 5 and 2 images, validation of 5 and 1."""
    preload(preload_settings())
    changes: dict[str, Any] = {"side_cache": tmp_path / "side", "loss_weight": "balance"}
    together = train_settings(run=tmp_path / "together", **changes)
    for rank in run_ranks(train_and_evaluate, together):
        assert rank.status == 0, rank.output
    alone = train_settings(run=tmp_path / "alone", **changes)
    train_and_evaluate(alone)
    ours, theirs = files_of(together.run), files_of(alone.run)
    assert ours.keys() == theirs.keys()
    assert_close_tables(together.run / "history.csv", alone.run / "history.csv", but=("seconds",))
    for name in ("predictions.csv", "predictions-test.csv"):
        assert_close_tables(together.run / name, alone.run / name)


def test_stopped_and_killed_ranks_go_on_to_the_same_bits(
    preload_settings: MakePreload, train_settings: MakeTrain, tmp_path: Path
) -> None:
    preload(preload_settings())
    changes = {"epochs": 3, "checkpoint_steps": 2, "side_images": "exact"}
    whole = train_settings(run=tmp_path / "whole", **changes)
    for rank in run_ranks(train_rank, whole, *NEVER):
        assert rank.status == 0, rank.output
    # Three steps an epoch.  A signal to one rank stops both after the same step.
    parts = tmp_path / "parts"
    first, second = run_ranks(
        train_rank, train_settings(run=parts, **changes), 1, 2, signal.SIGTERM
    )
    assert (first.status, second.status) == (STOPPED, STOPPED), first.output
    assert "stopped by a signal to another rank; 0 of 3 epochs and 2 of 3 steps" in first.output
    shutil.copytree(parts, tmp_path / "alone")
    # The kill falls after the checkpoint of step 4, two steps later.
    again = train_settings(run=parts, resume=True, **changes)
    first, second = run_ranks(train_rank, again, 1, 4, signal.SIGKILL)
    assert (first.status, second.status) == (FAILED, -signal.SIGKILL)
    assert "LostRank: rank 1 was lost training, of 2" in first.output and first.seconds < 20
    for rank in run_ranks(train_rank, again, *NEVER):
        assert rank.status == 0, rank.output
    for folder in ("best", "last"):
        ours, theirs = files_of(parts / folder), files_of(whole.run / folder)
        assert ours.keys() == theirs.keys()
        for name in ours.keys() - {"state.json"}:
            assert ours[name] == theirs[name], name
    assert (parts / "predictions.csv").read_bytes() == (whole.run / "predictions.csv").read_bytes()
    # One process goes on as well as two.
    train(train_settings(run=tmp_path / "alone", resume=True, **changes))
    assert_close_tables(
        tmp_path / "alone" / "history.csv", whole.run / "history.csv", but=("seconds",)
    )


def test_a_run_that_exists_is_refused_by_every_rank(
    preload_settings: MakePreload, train_settings: MakeTrain
) -> None:
    preload(preload_settings())
    settings = train_settings(epochs=1)
    train(settings)
    before = files_of(settings.run)
    first, second = run_ranks(train_rank, settings, *NEVER)
    assert (first.status, second.status) == (FAILED, FAILED)
    assert "RunExists" in first.output
    assert "rank 0 of 2 ended with:" in second.output and "holds an earlier run" in second.output
    assert files_of(settings.run) == before


@pytest.mark.parametrize("augmented", [False, True])
def test_a_loader_makes_the_rows_of_a_share_alone(data: Path, augmented: bool) -> None:
    items = load_image_set(data).of_split("train")
    loader = FeatureLoader(
        items,
        NoFeatures(),
        Preprocessing((16, 16), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        batch_size=5,
        store=DecodedStore(),
        augmentation=AugmentConfig() if augmented else None,
        shuffle=True,
    )
    loader.set_epoch(3)
    whole = list(loader.iterate_from(1))
    for rank in range(3):
        shares = list(shares_from(loader, 1, World(rank, 3)))
        assert [share.total for share in shares] == [len(batch.keys) for batch in whole] == [5, 2]
        for share, batch in zip(shares, whole, strict=True):
            assert share.rows == (World(rank, 3).share(share.total) or range(1))
            assert_rows(share.batch, batch, share.rows)


def assert_rows(part: FeatureBatch, whole: FeatureBatch, rows: range) -> None:
    assert part.keys == tuple(whole.keys[row] for row in rows)
    assert torch.equal(part.side_pixels, whole.side_pixels[rows.start : rows.stop])
    assert torch.equal(part.labels, whole.labels[rows.start : rows.stop])


@pytest.mark.parametrize("stored", [False, True])
def test_shares_of_batches_with_features(stored: bool) -> None:
    """Rows of the batch's own features, or rows of a store that stays as it is."""
    kv = torch.arange(6.0).view(6, 1).expand(6, 4)
    batch = FeatureBatch(
        torch.randn(6, 3, 2, 2),
        kv,
        torch.tensor([5, 3, 1, 0, 2, 4]) if stored else None,
        torch.arange(6),
        tuple("abcdef"),
        kv + 10,
        kv + 20,
    )
    (share,) = shares_from([batch], 0, World(1, 4))
    assert (share.rows, share.total, share.counted) == (range(1, 3), 6, 2)
    assert_rows(share.batch, batch, share.rows)
    if stored:
        assert share.batch.kv is kv
        assert share.batch.rows is not None and share.batch.rows.tolist() == [3, 1]
    else:
        assert share.batch.rows is None
        for part, first in (
            (share.batch.kv, 1),
            (share.batch.k_scales, 11),
            (share.batch.v_scales, 21),
        ):
            assert part is not None and part[:, 0].tolist() == [first, first + 1]


def test_models_whose_images_see_each_other_are_refused(tmp_path: Path) -> None:
    class Normalised(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = torch.nn.BatchNorm1d(12)
            self.head = torch.nn.Linear(12, 3)

    class Silent(World):
        def require_same(self, text: str, what: str) -> None:
            """There is no other rank to compare with."""

    with pytest.raises(ConfigError, match="norm is a BatchNorm1d: train it in one process"):
        fit(
            Normalised(),
            ToyBatches(),
            None,
            toy_config(),
            run_dir=tmp_path,
            num_classes=3,
            world=Silent(0, 2),
        )
