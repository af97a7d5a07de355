"""Several findings per image: metrics against scikit-learn, intervals, losses, files."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch.nn import functional as F

from fpt_fast.config import ConfigError, TrainConfig
from fpt_fast.images import labels_of, sampling_weights
from fpt_fast.losses import FindingLoss, build_loss
from fpt_fast.metrics import compute_metrics
from fpt_fast.records import ImageItem, Predictions
from fpt_fast.report import read_predictions, write_report, write_run_files
from fpt_fast.sweep.group import losses_of
from fpt_fast.trust import assess, choose_thresholds, operating_points
from fpt_fast.trust.resampled import make_resampler

NAMES = ("effusion", "mass", "fibrosis")


def sample(images: int = 60, unknown: float = 0.2, seed: int = 0, ties: bool = True) -> Predictions:
    rng = np.random.default_rng(seed)
    labels = (rng.random((images, 3)) < [0.5, 0.2, 0.1]).astype(int)
    logits = (1.5 * labels + rng.normal(size=labels.shape)).round(1 if ties else 9)
    labels[rng.random(labels.shape) < unknown] = -1
    scores = torch.tensor(logits, dtype=torch.float32)
    keys = tuple(f"{number}.png" for number in range(images))
    return Predictions(keys, torch.tensor(labels), scores, scores.sigmoid())


@pytest.mark.parametrize("unknown", [0.0, 0.3])
def test_metrics_are_those_of_scikit_learn(unknown: float) -> None:
    predictions = sample(unknown=unknown)
    metrics = compute_metrics(predictions, 3)
    labels, scores = predictions.labels.numpy(), predictions.probabilities.numpy()
    areas, precisions, scored = [], [], []
    for f, row in enumerate(metrics.per_class):
        known = labels[:, f] >= 0
        truth, score = labels[known, f], scores[known, f]
        areas.append(roc_auc_score(truth, score))
        precisions.append(average_precision_score(truth, score))
        scored.append(f1_score(truth, score >= 0.5))
        assert (row.auc, row.ap) == pytest.approx((areas[-1], precisions[-1]), abs=1e-12)
        assert row.f1 == pytest.approx(scored[-1], abs=1e-12) and row.support == truth.sum()
        (calm, alarms), (missed, hits) = metrics.confusion[f].tolist()
        assert calm + alarms + missed + hits == known.sum() and hits + missed == truth.sum()
        assert row.specificity == pytest.approx(calm / (calm + alarms))
    assert metrics["auc"] == pytest.approx(np.mean(areas), abs=1e-12)
    assert metrics["ap"] == pytest.approx(np.mean(precisions), abs=1e-12)
    assert metrics["f1"] == pytest.approx(np.mean(scored), abs=1e-12)
    whole = (labels >= 0).all(axis=1)
    exact = ((scores >= 0.5) == labels)[whole].all(axis=1).mean()
    assert metrics["exact_match"] == pytest.approx(exact)
    assert any("unknown" in note for note in metrics.notes) == (unknown > 0)


def test_a_finding_that_no_image_has_is_said_and_left_out() -> None:
    predictions = sample(unknown=0.0)
    predictions.labels[:, 2] = 0
    metrics = compute_metrics(predictions, 3)
    assert metrics.missing_classes == (2,) and math.isnan(metrics.per_class[2].auc)
    assert metrics["auc"] == pytest.approx(np.mean([row.auc for row in metrics.per_class[:2]]))
    assert metrics.to_json()["per_class"][2]["ap"] is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.labels.fill_(-1), "without any finding told"),
        (lambda p: p.labels.fill_(2), "findings must be 1, 0 or -1"),
        (lambda p: p.logits.fill_(math.nan), "logits must be finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(change: Any, message: str) -> None:
    predictions = sample()
    change(predictions)
    with pytest.raises(ValueError, match=message):
        compute_metrics(predictions, 3)
    with pytest.raises(ValueError, match="must be \\(60, 4\\)"):
        compute_metrics(predictions, 4)


def test_resampled_metrics_are_those_of_the_images_repeated() -> None:
    predictions = sample(40, seed=3)
    counts = np.random.default_rng(1).multinomial(40, np.full(40, 1 / 40), size=12)
    found = make_resampler(predictions, 3)(counts)
    for row, count in enumerate(counts):
        again = torch.repeat_interleave(torch.arange(40), torch.tensor(count))
        assert predictions.probabilities is not None
        drawn = Predictions(
            tuple(map(str, again.tolist())),
            predictions.labels[again],
            predictions.logits[again],
            predictions.probabilities[again],
        )
        expected = compute_metrics(drawn, 3)
        ones, zeros = (bool(((drawn.labels == kind).any(dim=0)).all()) for kind in (1, 0))
        complete = {"auc": ones and zeros, "ap": ones and zeros, "accuracy": True}
        for name, value in expected.items():
            # The average of fewer findings is that of something else.
            if not complete.get(name, ones or name == "exact_match"):
                value = math.nan
            assert found.values[name][row] == pytest.approx(value, abs=1e-12, nan_ok=True), name
        for f, one in enumerate(expected.per_class):
            absent = not bool((drawn.labels[:, f] == 0).any())
            for name in ("auc", "ap", "recall", "specificity", "f1", "precision"):
                # What no image tells anything about is no 0 to be counted in an interval.
                unknown = absent if name == "specificity" else not one.support
                value = math.nan if unknown else getattr(one, name)
                mine = found.per_class[name][row, f]
                assert mine == pytest.approx(value, abs=1e-12, nan_ok=True), name


def test_a_finding_that_every_call_finds_has_a_recall_of_one_without_doubt() -> None:
    labels = torch.zeros(8, 1, dtype=torch.int64)
    labels[0] = 1
    always = torch.full((8, 1), 0.9)
    predictions = Predictions(tuple("abcdefgh"), labels, torch.logit(always), always)
    intervals = assess(predictions, 1, resamples=200).intervals
    assert intervals is not None
    recall = intervals.per_class["recall"][0]
    assert (recall.low, recall.high) == (1.0, 1.0)


def test_intervals_and_operating_points_of_every_finding() -> None:
    validation, predictions = sample(300, seed=1), sample(200, seed=2)
    assessment = assess(predictions, 3, validation=validation, resamples=50)
    assert assessment.intervals is not None and not assessment.intervals.stratified
    for name, interval in assessment.intervals.values.items():
        assert interval.low <= assessment[name] <= interval.high
    assert len(assessment.intervals.per_class["ap"]) == 3
    assert {point.chosen.label for point in assessment.points} == {0, 1, 2}
    for point in operating_points(predictions, choose_thresholds(validation)):
        chosen = point.chosen
        labels = predictions.labels[:, chosen.label].numpy()
        called = predictions.probabilities[:, chosen.label].numpy() >= chosen.threshold
        assert point.sensitivity.estimate == pytest.approx(called[labels == 1].mean())
        assert point.specificity.estimate == pytest.approx((~called)[labels == 0].mean())
        assert point.ppv.estimate == pytest.approx((labels[called & (labels >= 0)] == 1).mean())


def test_the_loss_is_of_what_is_known() -> None:
    predictions = sample(unknown=0.4)
    known = predictions.labels >= 0
    expected = F.binary_cross_entropy_with_logits(
        predictions.logits[known], predictions.labels[known].float()
    )
    loss = build_loss(TrainConfig(loss="binary_cross_entropy"))
    assert float(loss(predictions.logits, predictions.labels)) == pytest.approx(float(expected))
    gone = torch.full_like(predictions.labels, -1)
    assert float(loss(predictions.logits, gone)) == 0.0
    logits = predictions.logits.clone().requires_grad_()
    loss(logits, predictions.labels).backward()
    assert bool((logits.grad[~known] == 0).all())
    side_by_side = losses_of(loss, torch.stack([predictions.logits, -predictions.logits]),
                             predictions.labels)  # fmt: skip
    assert float(side_by_side[0]) == pytest.approx(float(expected))


def test_focal_and_weights_of_findings() -> None:
    logits, labels = torch.tensor([[2.0, -1.0]]), torch.tensor([[1, 1]])
    p = torch.sigmoid(logits)
    focal = float(FindingLoss(gamma=2.0)(logits, labels))
    assert focal == pytest.approx(float((-((1 - p) ** 2) * p.log()).mean()))
    config = TrainConfig(loss="binary_cross_entropy", loss_weight="balance")
    weighted = build_loss(config, [10, 40, 90, 60], num_classes=2)
    expected = (-p.log() * torch.tensor([9.0, 1.5])).mean()
    assert float(weighted(logits, labels)) == pytest.approx(float(expected))
    moving = build_loss(
        TrainConfig(loss="binary_cross_entropy", loss_weight="dynamic", loss_weight_decay=0.5),
        [10, 40, 90, 60],
        num_classes=2,
    )
    moving.set_epoch(1)
    assert moving.current.tolist() == [5.0, 1.25]
    with pytest.raises(ConfigError, match="at least one training image with every finding"):
        build_loss(config, [0, 4, 9, 6], num_classes=2)
    with pytest.raises(ConfigError, match="with each finding, then those without"):
        build_loss(config, [1, 4], num_classes=2)
    with pytest.raises(ConfigError, match="one weight for each of 2"):
        given = TrainConfig(loss="binary_cross_entropy", loss_weight="given", loss_weights=(1.0,))
        build_loss(given, num_classes=2)


def test_balanced_sampling_draws_each_class_alike_often() -> None:
    items = [ImageItem(str(i), Path(str(i)), 0 if i < 90 else 1, "train") for i in range(100)]
    weights = sampling_weights(labels_of(items))
    assert float(weights[:90].sum()) == pytest.approx(float(weights[90:].sum()))
    findings = [(1, 0)] * 4 + [(1, 1)] * 2 + [(0, 0)] * 20 + [(0, -1)] * 4
    several = [ImageItem("k", Path("k"), -1, "train", findings=row) for row in findings]
    weights = sampling_weights(labels_of(several))
    assert weights.tolist() == pytest.approx([1 / 6] * 4 + [1 / 2] * 2 + [1 / 24] * 24)


def test_files_of_findings_read_back(tmp_path: Path) -> None:
    predictions = sample(12)
    assessment = assess(predictions, 3, resamples=20)
    write_run_files(tmp_path, predictions=predictions, classes=NAMES, assessment=assessment)
    again, names = read_predictions(tmp_path / "predictions.csv")
    assert names == NAMES and again.keys == predictions.keys
    assert torch.equal(again.labels, predictions.labels)
    assert torch.equal(again.probabilities, predictions.probabilities)
    torch.testing.assert_close(again.logits, predictions.logits, rtol=0, atol=1e-4)
    page = write_report(
        tmp_path, history=None, predictions=predictions, classes=NAMES, assessment=assessment
    ).read_text()
    assert "Calls at a probability of 0.5" in page and "Average precision" in page
    assert "ROC and precision-recall of each finding" in page and "Calibration" in page
