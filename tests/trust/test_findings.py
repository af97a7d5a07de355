"""Several findings per image: temperatures, comparison, and the words of notes."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from sklearn.metrics import log_loss

from fpt_fast.doctor import find_in_run
from fpt_fast.metrics import compute_metrics
from fpt_fast.records import Predictions
from fpt_fast.report.findings_table import ranked_findings
from fpt_fast.report.predictions_table import predictions_table
from fpt_fast.trust import (
    assess,
    bootstrap_intervals,
    compare_areas,
    compare_predictions,
    finding_temperatures,
    why_no_temperatures,
)

NAMES = ("mass", "nodule & cyst", "fluid")


def make(seed: int, count: int = 400, *, sure: float = 3.0) -> Predictions:
    """Three findings of which one label in eight is unknown; logits are ``sure`` times too far."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, 2, (count, 3))
    labels[rng.random((count, 3)) < 1 / 8] = -1
    labels[:2] = [[0, 0, 0], [1, 1, 1]]
    rng = np.random.default_rng(seed)
    logits = sure * (rng.normal(size=(count, 3)) + (labels == 1) - 0.5)
    values = torch.as_tensor(logits, dtype=torch.float32)
    keys = tuple(f"{i}.png" for i in range(count))
    return Predictions(keys, torch.as_tensor(labels), values, values.sigmoid())


def test_each_finding_has_the_temperature_that_scipy_finds() -> None:
    predictions = make(0)
    for finding, found in enumerate(finding_temperatures(predictions)):
        known = predictions.labels[:, finding] >= 0
        labels = predictions.labels[known, finding].numpy()
        logits = predictions.logits[known, finding].double().numpy()

        def loss(inverse: float, labels: np.ndarray = labels, logits: np.ndarray = logits) -> float:
            return float(log_loss(labels, 1 / (1 + np.exp(-logits * inverse))))

        best = minimize_scalar(loss, bounds=(0.01, 10), method="bounded", options={"xatol": 1e-10})
        assert found is not None and 1 / found == pytest.approx(best.x, abs=1e-6)


def test_calibration_leaves_out_what_is_unknown() -> None:
    predictions = make(1)
    assessment = assess(predictions, 3, validation=make(0), resamples=50, names=NAMES)
    temperatures = finding_temperatures(make(0))
    assert [found and found.temperature for found in assessment.by_finding] == list(temperatures)
    for finding, found in enumerate(assessment.by_finding):
        known = predictions.labels[:, finding] >= 0
        labels = predictions.labels[known, finding].numpy()
        probabilities = predictions.probabilities[known, finding].double().numpy()  # type: ignore[index]
        assert found is not None and found.scaled is not None
        assert found.plain.nll.estimate == pytest.approx(log_loss(labels, probabilities), abs=1e-6)
        assert found.plain.ece.low <= found.plain.ece.high
        assert found.scaled.nll.estimate < found.plain.nll.estimate
    assert len(assessment.to_json()["calibration_by_finding"]) == 3
    assert "each at its own temperature" in str(assessment)


def test_a_finding_of_one_kind_has_no_temperature() -> None:
    validation = make(0)
    labels = validation.labels.clone()
    labels[:, 1] = torch.where(labels[:, 1] >= 0, 0, -1)
    one_kind = Predictions(validation.keys, labels, validation.logits, validation.probabilities)
    assert finding_temperatures(one_kind)[1] is None
    assessment = assess(make(1), 3, validation=one_kind, resamples=0)
    assert assessment.by_finding[1] is not None and assessment.by_finding[1].scaled is None
    assert "; of the 2 with a temperature 0." in str(assessment)
    named = assess(make(1), 3, validation=one_kind, resamples=0, names=NAMES)
    assert "; of the 2 with a temperature (mass, fluid) 0." in str(named)


def test_why_a_finding_has_no_temperature() -> None:
    validation = make(0)
    known, logits = validation.labels >= 0, validation.logits.clone()
    lacking, having, unknown = (torch.where(known[:, 0], label, -1) for label in (0, 1, -1))
    labels = torch.stack([lacking, having, unknown], dim=1)
    one_kind = Predictions(validation.keys, labels, logits, logits.sigmoid())
    assert why_no_temperatures(one_kind) == (
        "no validation image is known to have it",
        "no validation image is known to be without it",
        "of no validation image is it known",
    )
    logits[:, 0] = torch.where(validation.labels[:, 0] == 1, 0.5, -0.5)
    logits[:, 1] *= -1
    ends = Predictions(validation.keys, validation.labels, logits, logits.sigmoid())
    right, chance, none = why_no_temperatures(ends)
    assert right == "every validation image is right" and none is None
    assert chance == "on the validation images they are no better than chance"
    # A reason is there where a temperature is not.
    assert [found is None for found in finding_temperatures(ends)] == [True, True, False]
    assert finding_temperatures(one_kind) == (None, None, None)


def test_an_average_is_over_the_same_findings_in_every_resample() -> None:
    """One finding in two images of thirty, never called; the others are always right."""
    labels = torch.zeros(30, 3, dtype=torch.int64)
    labels[::2, :2] = 1
    labels[:2, 2] = 1
    logits = torch.where(labels == 1, 3.0, -3.0)
    logits[:, 2] = -3.0
    predictions = Predictions(tuple(map(str, range(30))), labels, logits, logits.sigmoid())
    intervals = bootstrap_intervals(predictions, 3, resamples=500)
    recall = intervals["recall"]
    assert (recall.estimate, recall.low, recall.high) == pytest.approx((2 / 3,) * 3)
    # (28 / 30)^30 of the resamples have neither image.
    assert intervals.undefined["recall"] == pytest.approx(500 * (28 / 30) ** 30, abs=35)
    assert "accuracy" not in intervals.undefined


def test_a_finding_no_better_than_chance_has_no_temperature() -> None:
    validation = make(0)
    logits = validation.logits.clone()
    logits[:, 2] = -logits[:, 2]
    turned = Predictions(validation.keys, validation.labels, logits, logits.sigmoid())
    assert finding_temperatures(turned)[2] is None
    assert finding_temperatures(turned)[:2] == finding_temperatures(validation)[:2]


def test_two_runs_are_compared_by_finding() -> None:
    first, second = make(0), make(1)
    comparison = compare_predictions(first, second, NAMES, resamples=200)
    for finding, row in enumerate(comparison.per_class):
        known = first.labels[:, finding] >= 0
        expected = compare_areas(
            first.labels[known, finding].numpy() == 1,
            first.logits[known, finding].numpy(),
            second.logits[known, finding].numpy(),
        )
        assert row is not None and row.p == pytest.approx(expected.p, abs=1e-6)
    difference = comparison.differences["auc"]
    expected_auc = compute_metrics(first, 3)["auc"] - compute_metrics(second, 3)["auc"]
    assert difference.estimate == pytest.approx(expected_auc, abs=1e-9)
    assert "AUC of fluid" in str(comparison) and comparison.auc is None
    with pytest.raises(ValueError, match=r"disagree on the label of '0\.png'"):
        changed = second.labels.clone()
        changed[0, 2] = 1
        compare_predictions(
            first, Predictions(second.keys, changed, second.logits, second.probabilities), NAMES
        )


def test_notes_name_findings_and_classes() -> None:
    predictions = make(0)
    labels = predictions.labels.clone()
    labels[:, 2] = 0
    lacking = Predictions(predictions.keys, labels, predictions.logits, predictions.probabilities)
    assert "no image with fluid in this split" in compute_metrics(lacking, 3, NAMES).notes[0]
    assert "no image with finding 2 in" in compute_metrics(lacking, 3).notes[0]
    logits = torch.zeros(2, 3)
    one = Predictions(("a", "b"), torch.tensor([0, 1]), logits, logits.softmax(dim=1))
    assert "no image of class fluid" in compute_metrics(one, 3, NAMES).notes[0]


def test_the_table_has_the_worst_image_first_and_every_probability() -> None:
    labels = torch.tensor([[1, 0, -1], [0, 1, 1], [-1, -1, -1]])
    probabilities = torch.tensor([[0.9, 0.2, 0.7], [0.1, 0.3, 0.9], [0.5, 0.1, 0.2]])
    predictions = Predictions(("a", "b", "c"), labels, probabilities.logit(), probabilities)
    rows = ranked_findings(predictions)
    assert [(row.key, row.verdict) for row in rows] == [("b", "wrong"), ("a", "right"), ("c", "")]
    assert math.isclose(rows[0].least, 0.3, abs_tol=1e-6) and rows[2].least == 1.0
    page = predictions_table(predictions, NAMES, {})
    assert page.index(">b<") < page.index(">a<") < page.index(">c<")
    assert "<span>nodule &amp; cyst</span>, <span>fluid</span>" in page
    assert page.count("<button") == 5 + 3 and '<td class="wrong">0.300</td>' in page
    assert "<option>none</option>" in page and "<span>none</span>" not in page.split(">c<")[0]


@pytest.mark.parametrize(
    ("value", "said"),
    [(1, "1 finding is called on nearly every"), (0, "1 finding is never called")],
)
def test_the_doctor_sees_findings_that_are_always_or_never_called(
    tmp_path: object, value: int, said: str
) -> None:
    from pathlib import Path

    run = Path(str(tmp_path))
    (run / "history.csv").write_text("epoch,loss\n0,1.0\n1,0.5\n")
    (run / "metrics.json").write_text("{}")
    lines = ["key,label_mass,label_fluid,predicted_mass,predicted_fluid"]
    lines += [f"{i}.png,{i % 3 // 2},{'' if i % 2 else 1},{value},1" for i in range(30)]
    (run / "predictions.csv").write_text("\n".join(lines))
    [found] = find_in_run(run)
    assert said in found.what and "--loss-weight balance" in found.advice
    assert "metrics.json" not in found.advice and "operating points" in found.advice
    (run / "metrics.json").write_text('{"operating_points": [{"threshold": 0.2}]}')
    [weighted] = find_in_run(run, balanced=True)
    assert weighted.what == found.what and "--loss-weight" not in weighted.advice
    assert "at least the threshold in operating_points of metrics.json" in weighted.advice
    [where] = found.where  # fluid is there on all images that tell it
    assert where.startswith(f"mass: called on {30 * value} of 30 images, there on 10")
