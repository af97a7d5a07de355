"""Metrics of several findings per image: by finding, and the macro averages over them.

A finding that an image's label does not tell (``UNLABELLED``) is left out of that finding's
metrics.  An image is called positive where the probability is at least 0.5.  Averages are over
the findings that a metric is defined for: AUC and average precision need images with and without
the finding; precision, recall and F1 at least one with it.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from fpt_fast.metrics import ClassMetrics, Metrics, named
from fpt_fast.records import Predictions

FINDING_METRICS = ("auc", "ap", "accuracy", "f1", "precision", "recall", "exact_match")


def compute_finding_metrics(
    predictions: Predictions, num_findings: int, names: Sequence[str] | None = None
) -> Metrics:
    """Metrics of ``predictions`` with labels [images, findings] (1, 0 or ``UNLABELLED``).

    ``auc`` and ``ap`` are scikit-learn's ``roc_auc_score`` and ``average_precision_score``,
    averaged over findings; ``accuracy`` is averaged over findings; ``exact_match`` is the share
    of images of which every finding is known and right.  ``confusion`` is [findings, 2, 2]:
    ``[without, with]`` by ``[not called, called]``.  Raises ``ValueError`` for shapes that do not
    fit, logits that are not finite, or where no finding of any image is known.
    """
    labels, probabilities = _checked(predictions, num_findings)
    known, positive, called = labels >= 0, labels == 1, probabilities >= 0.5
    rows = [
        _one(known[:, f], positive[:, f], called[:, f], probabilities[:, f])
        for f in range(num_findings)
    ]
    support = np.array([row.support for row in rows])
    whole = known.all(axis=1)
    right = np.where(known, positive == called, False)
    told = known.sum(axis=0)
    values = {
        "auc": mean_known([row.auc for row in rows]),
        "ap": mean_known([row.ap for row in rows]),
        "accuracy": mean_known([float(right[:, f].sum() / told[f]) for f in np.flatnonzero(told)]),
    }
    for name in ("f1", "precision", "recall"):
        values[name] = mean_known([getattr(row, name) for row in rows if row.support])
    values["exact_match"] = float(right[whole].all(axis=1).mean()) if whole.any() else math.nan
    missing = tuple(int(f) for f in np.flatnonzero(support == 0))
    notes = []
    numbers = [f"finding {f}" for f in range(num_findings)]
    if missing:
        notes.append(
            f"no image with {', '.join(named(missing, names or numbers))} in this split; averages "
            "are over the findings present"
        )
    if math.isnan(values["auc"]):
        notes.append("auc is not defined: no finding has images with and without it")
    if not whole.all():
        notes.append(f"{int((~known).sum())} of {known.size} labels are unknown and left out")
    confusion = np.stack(
        [[(~positive & known & ~called), (~positive & known & called)],
         [(positive & ~called), (positive & called)]]
    ).sum(axis=2).transpose(2, 0, 1)  # fmt: skip
    return Metrics(
        values=values,
        confusion=torch.from_numpy(confusion.astype(np.int64)),
        per_class=tuple(rows),
        missing_classes=missing,
        notes=tuple(notes),
    )


def mean_known(values: list[float]) -> float:
    """Mean of the values that are numbers; NaN where none is."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _one(
    known: NDArray[np.bool_],
    positive: NDArray[np.bool_],
    called: NDArray[np.bool_],
    scores: NDArray[np.float32],
) -> ClassMetrics:
    from sklearn.metrics import average_precision_score, roc_auc_score

    positive, called, scores = positive[known], called[known], scores[known]
    hits, rest = int((positive & called).sum()), int((~positive).sum())
    support = int(positive.sum())
    both = 0 < support < len(positive)
    return ClassMetrics(
        support=support,
        precision=hits / max(int(called.sum()), 1),
        recall=hits / max(support, 1),
        specificity=int((~positive & ~called).sum()) / max(rest, 1),
        f1=2 * hits / max(int(called.sum()) + support, 1),
        auc=float(roc_auc_score(positive, scores)) if both else math.nan,
        ap=float(average_precision_score(positive, scores)) if both else math.nan,
    )


def _checked(
    predictions: Predictions, num_findings: int
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    expected = (len(predictions.keys), num_findings)
    probabilities = predictions.probabilities
    for name, value in (
        ("labels", predictions.labels),
        ("logits", predictions.logits),
        ("probabilities", probabilities),
    ):
        if value is None or tuple(value.shape) != expected:
            raise ValueError(
                f"predictions.{name} must be {expected} for {expected[0]} images and "
                f"{num_findings} findings, got {None if value is None else tuple(value.shape)}"
            )
    if not bool(predictions.logits.isfinite().all()):
        bad = int((~predictions.logits.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(
            f"logits must be finite, got NaN or infinity, first for {predictions.keys[bad]!r}: "
            "check its features (`fpt-fast cache verify`) and the training loss"
        )
    labels = predictions.labels.numpy()
    if not ((labels >= -1) & (labels <= 1)).all():
        raise ValueError(f"findings must be 1, 0 or -1, got {sorted(set(labels.ravel().tolist()))}")
    if not (labels >= 0).any():
        raise ValueError(
            f"metrics need labelled images, got {expected[0]} without any finding told"
        )
    assert probabilities is not None
    return labels, probabilities.numpy()
