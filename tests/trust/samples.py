"""Predictions to judge, made by seed."""

import numpy as np
import torch

from fpt_fast.records import Predictions


def make(count: int, classes: int, seed: int = 0, *, ties: bool = False) -> Predictions:
    """Random labels of every class; the logit of the right one is one higher."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    labels[:classes] = np.arange(classes)
    logits = rng.normal(size=(count, classes))
    logits[np.arange(count), labels] += 1.0
    values = torch.as_tensor(np.round(logits) if ties else logits, dtype=torch.float32)
    keys = tuple(f"{i}.png" for i in range(count))
    return Predictions(keys, torch.as_tensor(labels), values, values.softmax(dim=1))


def make_regression(count: int, classes: int) -> Predictions:
    """Grades instead of probabilities."""
    whole = make(count, classes)
    return Predictions(whole.keys, whole.labels, whole.logits[:, :1] + 1, None)


def picked(predictions: Predictions, rows: np.ndarray) -> Predictions:
    """The images of ``rows``, again and again where a row is named again, under new names."""
    at = torch.as_tensor(rows)
    probabilities = predictions.probabilities
    return Predictions(
        tuple(map(str, range(len(rows)))),
        predictions.labels[at],
        predictions.logits[at],
        None if probabilities is None else probabilities[at],
    )


def scaled(predictions: Predictions, factor: float) -> Predictions:
    """The same predictions, ``factor`` times as sure of themselves."""
    logits = predictions.logits * factor
    return Predictions(predictions.keys, predictions.labels, logits, logits.softmax(dim=1))
