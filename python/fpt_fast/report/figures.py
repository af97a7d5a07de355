"""Learning curves and ROC curves as SVG."""

import io
import math
import warnings
from collections.abc import Sequence
from typing import Any

from fpt_fast.metrics import Metrics, is_labelled, spoken
from fpt_fast.records import Predictions, TrainingHistory
from fpt_fast.trust import Calibration

# Okabe and Ito's colours, which colour-blind readers tell apart; dashes help in print.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#5c5c5c")
DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p")
_GREY = "#6b7280"
# Any: newer matplotlib types its keys, older does not.
_STYLE: Any = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#9ca3af",
    "axes.grid": True,
    "axes.labelcolor": "#374151",
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e5e7eb",
    "legend.fontsize": 9,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    # Text stays text: names in any script show in the reader's own fonts.
    "svg.fonttype": "none",
    # Equal runs give equal pages.
    "svg.hashsalt": "fpt-fast",
    # A class may be called "$5".
    "text.parse_math": False,
    "xtick.color": _GREY,
    "ytick.color": _GREY,
}


def learning_curves(history: TrainingHistory) -> bytes:
    """Loss (training, validation) and validation metrics by epoch, the best one marked: SVG."""
    validated = [record for record in history.epochs if record.val]
    panels = 2 if validated else 1

    def draw(figure: Any) -> None:
        axes = figure.subplots(1, panels, squeeze=False)[0]
        epochs = [record.epoch + 1 for record in history.epochs]
        axes[0].set_title("Loss")
        line(axes[0], epochs, [record.loss for record in history.epochs], 0, "training")
        if validated:
            at = [record.epoch + 1 for record in validated]
            line(axes[0], at, [record.val["loss"] for record in validated], 1, "validation")
            axes[1].set_title("Validation")
            others = ("auc", "accuracy", "f1", "kappa", "mae", "r2")
            shown = dict.fromkeys((history.monitor, *others))
            for number, name in enumerate(
                n for n in shown if n in validated[0].val and n != "loss"
            ):
                line(axes[1], at, [record.val[name] for record in validated], number, spoken(name))
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.xaxis.get_major_locator().set_params(integer=True)
            if history.best_epoch is not None:
                axis.axvline(
                    history.best_epoch + 1, color=_GREY, linewidth=1, linestyle=":", label="best"
                )
            axis.legend(loc="best")

    return render(draw, (4.6 * panels, 3.2))


def threshold_curves(predictions: Predictions, classes: Sequence[str], metrics: Metrics) -> bytes:
    """ROC and precision-recall curves, one against the rest, of every class that has one (of two
    classes, of the second): SVG.  Dotted: what guessing would reach."""
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_curve

    if predictions.probabilities is None:
        raise ValueError("curves over thresholds need probabilities; a regression has none")
    labels, scores = predictions.labels.numpy(), predictions.probabilities.numpy()
    several = labels.ndim == 2
    columns = (1,) if len(classes) == 2 and not several else tuple(range(len(classes)))

    def draw(figure: Any) -> None:
        roc, recalls = figure.subplots(1, 2)
        roc.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for number, column in enumerate(columns):
            area = metrics.per_class[column].auc
            if math.isnan(area):
                continue
            told = labels[:, column] if several else labels
            known = told >= 0
            positive = told[known] == (1 if several else column)
            score = scores[known, column]
            false_positive, true_positive, _ = roc_curve(positive, score)
            precision, recall, _ = precision_recall_curve(positive, score)
            average = average_precision_score(positive, score)
            label = f"{short(classes[column])}  {area:.3f}  {average:.3f}"
            line(roc, false_positive, true_positive, number, label, marker=False)
            line(recalls, recall, precision, number, label, marker=False)
            recalls.axhline(
                positive.mean(),
                color=COLOURS[number % len(COLOURS)],
                linewidth=0.8,
                linestyle=":",
            )
        name_axes(roc, "false positive rate", "true positive rate")
        name_axes(recalls, "recall (sensitivity)", "precision")
        handles, names = roc.get_legend_handles_labels()
        if handles:
            figure.legend(
                handles,
                names,
                loc="outside lower center",
                ncols=2,
                title=f"{'finding' if several else 'class'}, AUC, average precision",
                alignment="left",
            )

    rows = -(-len(columns) // 2)
    return render(draw, (9.0, 4.1 + 0.25 * rows))


def name_axes(axis: Any, across: str, up: str) -> None:
    """Name the axes of rates from 0 to 1."""
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.set_xlim(-0.03, 1.03)
    axis.set_ylim(-0.03, 1.03)
    axis.set_aspect("equal")


def value_scatter(predictions: Predictions, name: str) -> bytes:
    """Predicted numbers over true ones, the diagonal on which they would agree, and the errors
    below: SVG."""
    known = is_labelled(predictions.labels)
    labels = predictions.labels[known].numpy()
    values = predictions.logits[known, 0].double().numpy()

    def draw(figure: Any) -> None:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        ends = [min(labels.min(), values.min()), max(labels.max(), values.max())]
        top.plot(ends, ends, color="#9ca3af", linewidth=1, linestyle=":")
        below.axhline(0, color="#9ca3af", linewidth=1, linestyle=":")
        for axis, heights in ((top, values), (below, values - labels)):
            axis.scatter(labels, heights, s=14, color=COLOURS[0], alpha=0.6, linewidths=0)
        top.set_ylabel(f"predicted {short(name)}")
        below.set_ylabel("error")
        below.set_xlabel(f"true {short(name)}")

    return render(draw, (5.6, 5.4))


def reliability_diagram(calibration: Calibration) -> bytes:
    """Share that is right against confidence, as they are and at the fitted temperature, above
    the number of images by confidence: SVG."""
    shown = [("as they are", calibration.plain)]
    if calibration.scaled is not None and calibration.temperature is not None:
        shown.append((f"at temperature {calibration.temperature:.2f}", calibration.scaled))

    def draw(figure: Any) -> None:
        top, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        top.plot([0, 1], [0, 1], color="#9ca3af", linewidth=1, linestyle=":")
        for number, (name, errors) in enumerate(shown):
            rows = [row for row in errors.bins if row.images]
            confidence = [row.confidence for row in rows]
            label = f"{name}, error {errors.ece.estimate:.3f}"
            line(top, confidence, [row.accuracy for row in rows], number, label)
            below.stairs(
                [row.images for row in errors.bins],
                [row.low for row in errors.bins] + [1.0],
                color=COLOURS[number],
                linestyle=DASHES[number],
            )
        top.set_ylabel("share right")
        top.legend(loc="best")
        below.set_xlabel("confidence: probability of the predicted class")
        below.set_ylabel("images")

    return render(draw, (5.6, 4.8))


def line(
    axis: Any, x: Sequence[float], y: Sequence[float], number: int, label: str, marker: bool = True
) -> None:
    """Draw one line in the colour and dash of its ``number``."""
    axis.plot(
        x,
        y,
        color=COLOURS[number % len(COLOURS)],
        linestyle=DASHES[number // len(COLOURS) % len(DASHES)],
        marker="o" if marker else "",
        markersize=3.5,
        # matplotlib hides labels that begin with an underscore.
        label=f"\u200b{label}" if label.startswith("_") else label,
    )


def dot(axis: Any, x: float, y: float, number: int, label: str, area: float) -> None:
    """Draw one dot of ``area`` square points in the colour and shape of its ``number``."""
    axis.scatter(
        [x],
        [y],
        s=area,
        color=COLOURS[number % len(COLOURS)],
        marker=_MARKERS[number % len(_MARKERS)],
        edgecolors="white",
        linewidths=0.8,
        zorder=3,
        label=label,
    )


def log_axis(axis: Any) -> None:
    """A logarithmic ``axis.xaxis`` or ``axis.yaxis`` with plain numbers, 1, 2, 5, 10, 20, ...: in
    these figures a dollar sign is a dollar sign, so matplotlib's powers of ten would stay TeX."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    getattr(axis.axes, f"set_{axis.axis_name}scale")("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def render(draw: Any, size: tuple[float, float]) -> bytes:
    """SVG of what ``draw(figure)`` draws on a figure of ``size`` in inches."""
    # matplotlib takes half a second to import; Figure on its own needs no display or backend.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context(_STYLE), warnings.catch_warnings():
        # It measures text with its own font, which lacks many scripts; the reader's does not.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def short(name: str, limit: int = 28) -> str:
    """A name that fits a legend."""
    return name if len(name) <= limit else f"{name[: limit - 1]}…"
