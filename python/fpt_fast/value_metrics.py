"""Metrics of a number per image: errors in the label's own unit, and how far the two agree."""

import math

import numpy as np
import torch
from numpy.typing import NDArray

from fpt_fast.metrics import Metrics, is_labelled
from fpt_fast.records import Predictions

VALUE_METRICS = ("mae", "rmse", "r2", "pearson", "spearman")

Floats = NDArray[np.float64]


def compute_value_metrics(predictions: Predictions) -> Metrics:
    """Metrics of ``predictions`` with labels [images] f64, NaN where unknown.

    ``mae``, ``rmse`` and ``r2`` are scikit-learn's ``mean_absolute_error``,
    ``root_mean_squared_error`` and ``r2_score``; ``pearson`` and ``spearman`` scipy's ``pearsonr``
    and ``spearmanr``.  NaN where labels (for the last two, or predictions) are all alike.  Raises
    ``ValueError`` for shapes that do not fit, predictions that are not finite, or no known label.
    """
    labels, values = known_values(predictions)
    values_of = value_metrics(labels, values, np.ones((1, len(labels))))
    found = {name: float(column[0]) for name, column in values_of.items()}
    notes = []
    if math.isnan(found["r2"]):
        notes.append("r2 and correlations are not defined: all labels of this split are alike")
    elif math.isnan(found["pearson"]):
        notes.append("correlations are not defined: all predictions are alike")
    if len(labels) < len(predictions.keys):
        unknown = len(predictions.keys) - len(labels)
        notes.append(f"{unknown} of {len(predictions.keys)} labels are unknown and left out")
    return Metrics(found, torch.zeros(0, 0, dtype=torch.int64), (), (), tuple(notes))


def known_values(predictions: Predictions) -> tuple[Floats, Floats]:
    """Labels and predictions of the labelled images, or a ``ValueError``."""
    count = len(predictions.keys)
    if tuple(predictions.labels.shape) != (count,) or tuple(predictions.logits.shape) != (count, 1):
        raise ValueError(
            f"predictions of {count} values must have labels ({count},) and logits ({count}, 1), "
            f"got {tuple(predictions.labels.shape)} and {tuple(predictions.logits.shape)}"
        )
    if not bool(predictions.logits.isfinite().all()):
        bad = int((~predictions.logits.isfinite())[:, 0].nonzero()[0, 0])
        raise ValueError(
            f"predictions must be finite, got NaN or infinity, first for {predictions.keys[bad]!r}:"
            " check its features (`fpt-fast cache verify`) and the training loss"
        )
    known = is_labelled(predictions.labels)
    if not bool(known.any()):
        raise ValueError(f"metrics need labelled images, got {count} images without a label")
    return predictions.labels[known].double().numpy(), predictions.logits[known, 0].double().numpy()


def value_metrics(labels: Floats, values: Floats, weights: Floats) -> dict[str, Floats]:
    """The metrics [R] by name of R resamples; ``weights`` [R, images] counts how often each is in
    one."""
    total = weights.sum(axis=1)
    error = values - labels
    squares = weights @ np.square(error)
    # Centred first, so that a large offset costs no digits.
    labels = labels - labels.mean()
    about = labels - (weights @ labels / total)[:, None]  # [R, images]
    spread = (weights * np.square(about)).sum(axis=1)
    r2 = np.full(len(weights), np.nan)
    # Of equal labels rounding may leave a spread.
    np.divide(squares, spread, out=r2, where=spread > 1e-12 * np.square(labels).max() * total)
    return {
        "mae": weights @ np.abs(error) / total,
        "rmse": np.sqrt(squares / total),
        "r2": 1.0 - r2,
        "pearson": _correlation(_broadcast(labels, weights), _broadcast(values, weights), weights),
        "spearman": _correlation(_ranks(labels, weights), _ranks(values, weights), weights),
    }


def _broadcast(values: Floats, weights: Floats) -> Floats:
    return np.broadcast_to(values - values.mean(), weights.shape)


def _correlation(first: Floats, second: Floats, weights: Floats) -> Floats:
    """Weighted Pearson correlation of rows [R, images]; NaN where one has no spread."""
    total = weights.sum(axis=1, keepdims=True)
    ours = first - (weights * first).sum(axis=1, keepdims=True) / total
    theirs = second - (weights * second).sum(axis=1, keepdims=True) / total
    both = (weights * ours * theirs).sum(axis=1)
    spreads = [(weights * np.square(part)).sum(axis=1) for part in (ours, theirs)]
    sizes = [(weights * np.square(part)).sum(axis=1) for part in (first, second)]
    known = (spreads[0] > 1e-12 * sizes[0]) & (spreads[1] > 1e-12 * sizes[1])
    found = np.full(len(weights), np.nan)
    np.divide(both, np.sqrt(spreads[0] * spreads[1]), out=found, where=known)
    correlation: Floats = np.clip(found, -1.0, 1.0)
    return correlation


def _ranks(values: Floats, weights: Floats) -> Floats:
    """Ranks [R, images] of each image in each resample, equal values sharing their mean."""
    _, group = np.unique(values, return_inverse=True)
    groups = int(group.max()) + 1
    counts = np.zeros((len(weights), groups))
    for image, place in enumerate(group.tolist()):
        counts[:, place] += weights[:, image]
    below = np.cumsum(counts, axis=1) - counts
    ranks: Floats = (below + (counts + 1) / 2)[:, group]
    return ranks
