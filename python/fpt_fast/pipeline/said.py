"""What a model says of images, as cells of a table: the same in every table of it."""

from collections.abc import Sequence

from fpt_fast.metrics import predicted_classes
from fpt_fast.records import Predictions

# Of several findings, where none is called: an empty cell could mean that nobody looked.
NO_FINDING = "(none)"


def said_columns(predictions: Predictions, classes: Sequence[str]) -> list[str]:
    """Predicted class and one probability per class; a grade for a regression of grades; the number
    alone where labels are numbers."""
    if predictions.labels.is_floating_point():
        return [f"value_{classes[0]}"]
    if predictions.probabilities is None:
        return ["predicted", "grade"]
    return ["predicted", *(f"probability_{name}" for name in classes)]


def said_cells(predictions: Predictions, classes: Sequence[str]) -> list[list[str]]:
    """A row an image; of several findings those called, with semicolons between them."""
    if predictions.labels.is_floating_point():
        return [[f"{value:.9g}"] for value in predictions.logits.squeeze(1).tolist()]
    best = predicted_classes(predictions, len(classes)).tolist()
    if predictions.probabilities is None:
        grades = predictions.logits.squeeze(1).tolist()
        return [[classes[c], f"{grade:.9g}"] for c, grade in zip(best, grades, strict=True)]
    rows = []
    for winner, values in zip(best, predictions.probabilities.tolist(), strict=True):
        if isinstance(winner, int):
            called = classes[winner]
        else:
            names = [name for name, is_so in zip(classes, winner, strict=True) if is_so]
            called = ";".join(names) or NO_FINDING
        rows.append([called, *(f"{value:.6f}" for value in values)])
    return rows
