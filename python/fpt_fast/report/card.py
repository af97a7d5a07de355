"""The model card: what the model is, what it was trained and tested on, and what it is not for.

The front matter is that of the Hugging Face hub (its ``model-index`` holds the metrics).
"""

from collections.abc import Mapping
from typing import Any

import yaml

from fpt_fast.metrics import spoken
from fpt_fast.report.card_facts import CardFacts
from fpt_fast.report.card_usage import usage

_METHODS = {"fpt": "FPT", "fpt_plus": "FPT+"}
_FITS = {"stretch": "stretching", "pad": "padding with black (pad)"}
_VALUES = (
    "It predicts a number for every image, whatever it shows, and knows no bounds: outside the "
    "range that it was trained on it guesses."
)
_METRICS = (
    "auc",
    "ap",
    "mae",
    "accuracy",
    "exact_match",
    "f1",
    "kappa",
    "recall",
    "precision",
    "rmse",
    "r2",
    "pearson",
    "spearman",
)
_LIMITS = (
    "Nothing here is a medical device. Do not use the model for diagnosis or treatment.",
    "The figures hold for images like those that it was tested on: other cameras, hospitals, "
    "populations or ways of labelling can be far worse. Test it on your own data first.",
)
_UNCALIBRATED = "Its probabilities are not calibrated."
_CALIBRATED = (
    "Its probabilities are calibrated where that is asked for (see the figures), and only for "
    "images like those of validation."
)
_ONE_CLASS = (
    "It knows only the classes listed, and gives each image to one of them, whatever it shows."
)
_FINDINGS = (
    "It knows only the findings listed, and says of each alone whether it is there; what else an "
    "image shows it does not see."
)


def model_card(facts: CardFacts) -> str:
    """The card as Markdown with YAML front matter; what the author did not say is said to lack."""
    front = yaml.safe_dump(_front_matter(facts), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{front}---",
        f"# {facts.name}",
        _introduction(facts),
        "## Intended use\n\n" + (facts.intended_use or "Not stated by the author."),
        "## Limits\n\n" + _limits(facts),
        "## Figures\n\n" + _figures(facts),
        "## Data\n\n" + _data(facts),
        "## Frozen model and input\n\n" + _frozen(facts),
        "## Training\n\n" + _listed(_used(facts.training)),
        "## How to use it\n\n" + usage(facts),
        "## Method\n\n" + _METHOD,
    ]
    if facts.contact:
        parts.append(f"## Contact\n\n{facts.contact}")
    return "\n\n".join(parts) + "\n"


_METHOD = (
    "Y. Huang, P. Cheng, R. Tam, X. Tang. *Fine-grained Prompt Tuning: A Parameter and Memory "
    "Efficient Transfer Learning Method for High-resolution Medical Image Classification.* "
    "MICCAI 2024. *FPT+*, IEEE TNNLS 2025."
)


def _front_matter(facts: CardFacts) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "fpt-fast",
        "pipeline_tag": "image-classification",
        "tags": ["fpt-fast", "medical-imaging", "prompt-tuning", _method_name(facts)],
    }
    if facts.license:
        front["license"] = facts.license
    if facts.base_model:
        front["base_model"] = facts.base_model
    results = [
        {"type": name, "value": round(float(facts.metrics[name]), 4)}
        for name in _METRICS
        if facts.metrics.get(name) is not None
    ]
    front["model-index"] = [
        {
            "name": facts.name,
            "results": [
                {
                    "task": {"type": "image-classification"},
                    "dataset": {"name": facts.data_set or "not stated", "type": "private"},
                    "metrics": results,
                }
            ],
        }
    ]
    return front


def _method_name(facts: CardFacts) -> str:
    name = str(facts.method.get("method", ""))
    return _METHODS.get(name, name)


def _introduction(facts: CardFacts) -> str:
    if facts.target is not None:
        return (
            f"A regression of {facts.classes[0]} trained with {_method_name(facts)}, Fine-grained "
            f"Prompt Tuning: {facts.parameters:,d} trained parameters beside a frozen "
            f"{facts.features.get('backbone.name', 'vision transformer')}. "
            f"Made with fpt-fast {facts.version}."
        )
    what = "findings, any number of them in an image" if facts.several else "classes"
    return (
        f"A classifier of {len(facts.classes)} {what} ({', '.join(facts.classes)}) trained with "
        f"{_method_name(facts)}, Fine-grained Prompt Tuning: {facts.parameters:,d} trained "
        f"parameters beside a frozen {facts.features.get('backbone.name', 'vision transformer')}. "
        f"Made with fpt-fast {facts.version}."
    )


def _limits(facts: CardFacts) -> str:
    if facts.target is not None:
        limits: tuple[str, ...] = (*_LIMITS, _VALUES)
    else:
        calibrated = _UNCALIBRATED if facts.temperatures is None else _CALIBRATED
        limits = (*_LIMITS, calibrated, _FINDINGS if facts.several else _ONE_CLASS)
    return "\n".join(f"- {limit}" for limit in limits)


def _figures(facts: CardFacts) -> str:
    intervals = facts.metrics.get("intervals") or {}
    values = intervals.get("values", {})
    rows = ["| metric | value | interval |", "| --- | --- | --- |"]
    for name in _METRICS:
        value = facts.metrics.get(name)
        if value is None:
            continue
        low_high = values.get(name)
        shown = "" if low_high is None else f"{low_high[0]:.3f} to {low_high[1]:.3f}"
        rows.append(f"| {spoken(name)} | {value:.3f} | {shown} |")
    text = "On images that were neither trained on nor used to choose the epoch:\n\n"
    text += "\n".join(rows)
    if intervals:
        text += (
            f"\n\nIntervals: {intervals['level']:.0%}, bootstrap ({intervals['method']}, "
            f"{intervals['resamples']} resamples of {intervals['units']})."
        )
    return text + _grading(facts.metrics.get("grade_cuts")) + _calibration(facts)


def _calibration(facts: CardFacts) -> str:
    """What the logits are divided by for calibrated probabilities."""
    if facts.temperatures is None:
        return ""
    told = ", ".join(f"{temperature:.4f}" for temperature in facts.temperatures)
    each = "each finding at its own temperature" if facts.several else "at the temperature"
    text = (
        f"\n\nCalibrated probabilities (`predict --calibrated`) are {each}, fitted on the "
        f"validation images: {told} (`temperatures` in config.json)."
    )
    errors = facts.metrics.get("calibration") or {}
    if errors.get("scaled") is None:
        return text
    plain, scaled = (errors[which]["ece"] for which in ("plain", "scaled"))
    return f"{text} Expected calibration error: {plain:.3f} plain, {scaled:.3f} calibrated."


def _grading(grading: Mapping[str, Any] | None) -> str:
    """Where grades are cut, for whoever turns the model's output into one."""
    if grading is None:
        return ""
    cuts = ", ".join(f"{cut:.4f}" for cut in grading["cuts"])
    halves = ", ".join(
        f"{spoken(name)} {value:.3f}"
        for name, value in grading["at_halves"].items()
        if value is not None
    )
    return (
        "\n\nThe model predicts a number; the grade is how many of these cut points, chosen on "
        f"the validation images, it reaches: {cuts} (`grade_cuts` in config.json). With cuts at "
        f"the halves: {halves}."
    )


def _data(facts: CardFacts) -> str:
    if facts.target is not None:
        mean, deviation = facts.target
        told = f"{facts.classes[0]} of the training images: {mean:.6g} ± {deviation:.6g}."
        return (facts.data_set or "The author did not name the data set.") + "\n\n" + told
    what = "finding | test images with it" if facts.several else "class | test images"
    rows = [f"| {what} | recall | AUC |", "| --- | --- | --- | --- |"]
    per_class = facts.metrics.get("per_class") or []
    for name, row in zip(facts.classes, per_class, strict=False):
        rows.append(
            f"| {name} | {row.get('support', '')} | {_number(row.get('recall'))} | "
            f"{_number(row.get('auc'))} |"
        )
    return (facts.data_set or "The author did not name the data set.") + "\n\n" + "\n".join(rows)


def _number(value: Any) -> str:
    return "" if value is None else f"{value:.3f}"


def _frozen(facts: CardFacts) -> str:
    features = facts.features
    height, width = features["input_size"]
    return _listed(
        {
            "model": features["backbone.name"],
            "weights (xxh3-128)": features["backbone.weights_hash"],
            "input": f"{height}x{width} px",
            "images are brought to it by": _FITS[features.get("fit", "stretch")],
            "window of grey images": features.get("window", "file"),
            "frame of DICOM files": features.get("dicom_frame"),
            "side network's input": "{}x{} px".format(*facts.method["side_size"]),
            "mean": ", ".join(f"{x:.4f}" for x in features["mean"]),
            "std": ", ".join(f"{x:.4f}" for x in features["std"]),
            "layers": ", ".join(map(str, features["layers"])),
            "kept tokens": f"{features['token_ratio']:.0%} by {features['importance']} importance",
        }
    )


def _listed(values: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in values.items() if value is not None and value != []}
    return "\n".join(f"- {name}: {_in_a_line(value)}" for name, value in kept.items())


def _in_a_line(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _used(training: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe without what it had no use for; the target's scale stands with the data."""
    unused = {"target"}
    unused |= {"betas"} if training.get("optimizer") == "sgd" else {"momentum"}
    unused |= set() if training.get("loss_weight") == "dynamic" else {"loss_weight_decay"}
    return {name: value for name, value in training.items() if name not in unused}
