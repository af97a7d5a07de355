"""What the report says of the metrics' certainty: cards with intervals, and the table by class."""

import math
from collections.abc import Sequence
from html import escape

from fpt_fast.metrics import Metrics
from fpt_fast.trust import Calibration, Grading, Interval, Intervals, OperatingPoint

TITLES = {
    "auc": "AUC",
    "auc_raw_logits": "AUC (raw logits)",
    "ap": "Average precision",
    "exact_match": "All findings right",
    "accuracy": "Accuracy",
    "f1": "Macro F1",
    "precision": "Macro precision",
    "recall": "Macro recall",
    "kappa": "Quadratic kappa",
    "mae": "Mean absolute error",
    "mse": "Mean square error",
    "rmse": "Root mean square error",
    "r2": "R²",
    "pearson": "Pearson correlation",
    "spearman": "Spearman correlation",
}
_COLUMNS = {
    "auc": "AUC",
    "precision": "precision",
    "recall": "recall (sensitivity)",
    "specificity": "specificity",
    "f1": "F1",
}


def metric_cards(metrics: Metrics, intervals: Intervals | None) -> str:
    """The metrics as large figures, each with its interval below it."""
    cards = "".join(
        f"<div><dt>{escape(TITLES.get(name, name))}</dt><dd>{number(value)}"
        f"{_below(None if intervals is None else intervals[name])}</dd></div>"
        for name, value in metrics.items()
        if name != "auc_raw_logits"
    )
    page = f'<dl class="cards">{cards}</dl>'
    if intervals is not None:
        page += f'<p class="soft">In brackets: {escape(intervals.describe())}.</p>'
    if "auc_raw_logits" in metrics:
        page += (
            '<p class="soft">AUC on raw logits, as in the published tables: '
            f"{number(metrics['auc_raw_logits'])}</p>"
        )
    return page


def class_table(metrics: Metrics, intervals: Intervals | None, classes: Sequence[str]) -> str:
    """Each class against the rest: images, AUC, precision, recall, specificity, F1."""
    if not metrics.per_class:
        return ""
    kind, counted = (
        ("finding", "images with it") if metrics.confusion.dim() == 3 else ("class", "images")
    )
    head = "".join(f'<th scope="col">{title}</th>' for title in (counted, *_COLUMNS.values()))
    rows = []
    for label, (name, row) in enumerate(zip(classes, metrics.per_class, strict=True)):
        cells = [f"<td>{row.support}</td>"]
        for column in _COLUMNS:
            value = getattr(row, column)
            # Without an image of the class, the others' zeros would say nothing.
            known = row.support or column == "specificity"
            shown = number(value if known else math.nan)
            interval = None
            if intervals is not None and known:
                interval = intervals.per_class[column][label]
            cells.append(f"<td>{shown}{_below(interval)}</td>")
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{"".join(cells)}</tr>')
    return (
        f'<h2>By {kind}</h2><div class="scroll"><table><thead><tr><th class="left">{kind}</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def grading_table(grading: Grading | None, metrics: Metrics, classes: Sequence[str]) -> str:
    """Learned cuts between grades, and the metrics by them and by the halves; empty without."""
    if grading is None:
        return ""
    cuts = "".join(
        f'<tr><th scope="row">{escape(low)} | {escape(high)}</th><td>{number(cut)}</td>'
        f"<td>{place + 0.5:g}</td></tr>"
        for place, (low, high, cut) in enumerate(
            zip(classes, classes[1:], grading.cuts, strict=False)
        )
    )
    values = "".join(
        f'<tr><th scope="row">{escape(TITLES.get(name, name))}</th><td>{number(metrics[name])}</td>'
        f"<td>{number(value)}</td></tr>"
        for name, value in grading.at_halves.items()
    )
    head = '<th scope="col">learned</th><th scope="col">halves</th></tr></thead>'
    return (
        '<h2>Cut points between grades</h2><div class="scroll"><table><thead><tr>'
        f'<th class="left">grades</th>{head}<tbody>{cuts}</tbody></table></div>'
        '<div class="scroll"><table><thead><tr><th class="left">these images graded by</th>'
        f'{head}<tbody>{values}</tbody></table></div><p class="soft">The model predicts a number; '
        "an image has the grade above each cut that it reaches. The learned cuts were chosen on "
        "the validation images.</p>"
    )


def calibration_table(calibration: Calibration) -> str:
    """Calibration errors of the probabilities as they are, and at the fitted temperature."""
    shown = [("as they are", calibration.plain)]
    if calibration.scaled is not None and calibration.temperature is not None:
        shown.append((f"at temperature {calibration.temperature:.3f}", calibration.scaled))
    rows = "".join(
        f'<tr><th scope="row">{name}</th>'
        + "".join(
            f"<td>{number(value.estimate)}{_below(value)}</td>"
            for value in (errors.ece, errors.nll, errors.brier)
        )
        + "</tr>"
        for name, errors in shown
    )
    origin = (
        "The temperature was fitted on the validation images."
        if calibration.scaled is not None
        else "Without validation images no temperature was fitted."
    )
    if calibration.warning is not None:
        warned = f"{calibration.warning[0].upper()}{calibration.warning[1:]}."
        origin = f"{origin} But {calibration.warning}." if calibration.scaled else warned
    return (
        '<div class="scroll"><table><thead><tr><th class="left">probabilities</th>'
        '<th scope="col">expected calibration error</th><th scope="col">log loss</th>'
        f'<th scope="col">Brier score</th></tr></thead><tbody>{rows}</tbody></table></div>'
        f'<p class="soft">{origin}</p>'
    )


def finding_calibration_table(findings: Sequence[Calibration | None], names: Sequence[str]) -> str:
    """Temperature of each finding, and calibration errors without and with it; empty without."""
    if not findings:
        return ""
    rows = []
    for name, found in zip(names, findings, strict=True):
        cells = ["–"] * 4
        if found is not None:
            cells[0] = f"{number(found.plain.ece.estimate)}{_below(found.plain.ece)}"
            cells[1] = number(found.plain.nll.estimate)
        if found is not None and found.scaled is not None and found.temperature is not None:
            cells[2] = f"{found.temperature:.3f}"
            cells[3] = f"{number(found.scaled.ece.estimate)}{_below(found.scaled.ece)}"
        filled = "".join(f"<td>{cell}</td>" for cell in cells)
        rows.append(f'<tr><th scope="row">{escape(name)}</th>{filled}</tr>')
    titles = ("expected calibration error", "log loss", "temperature", "error at it")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        '<h2>Calibration</h2><div class="scroll"><table><thead><tr><th class="left">finding</th>'
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">Each finding has its own temperature, fitted on the validation images '
        "that it is known of; none (–) where those do not show it both ways, or are all right or "
        "no better than chance: its calibrated probabilities are the plain ones.</p>"
    )


def operating_table(points: Sequence[OperatingPoint], classes: Sequence[str]) -> str:
    """What the thresholds of the validation images give on these images; empty without any."""
    if not points:
        return ""
    titles = ("threshold", "sensitivity", "specificity", "PPV", "NPV")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    rows = []
    for point in points:
        chosen = point.chosen
        wanted = f"{escape(classes[chosen.label])}, {chosen.given} {chosen.wanted:.0%}"
        cells = "".join(
            f"<td>{number(rate.estimate)}{_below(rate)}</td>"
            for rate in (point.sensitivity, point.specificity, point.ppv, point.npv)
        )
        rows.append(
            f'<tr><th scope="row">{wanted}</th><td>{number(chosen.threshold)}</td>{cells}</tr>'
        )
    return (
        '<h2>Operating points</h2><div class="scroll"><table><thead><tr>'
        f'<th class="left">class, aim on validation</th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
        '<p class="soft">An image is called where the probability of the class is at least the '
        "threshold, which was chosen on the validation images to reach the aim there; the rates "
        "are those of the images of this page.</p>"
    )


def number(value: float) -> str:
    """Three digits, or a dash where there is no number."""
    return f"{value:.3f}" if math.isfinite(value) else "–"


def _below(interval: Interval | None) -> str:
    if interval is None or not math.isfinite(interval.low):
        return ""
    return f'<small class="interval">[{interval.low:.3f}, {interval.high:.3f}]</small>'
