"""How to use a shared model, in its card: code and a command that run as they stand."""

from fpt_fast.report.card_facts import CardFacts

_OUTPUTS = {
    "classes": """probabilities = predictions.probabilities[0].tolist()
for name, probability in zip(predictor.classes, probabilities):
    print(f"{name}: {probability:.3f}")""",
    "grade": """[grade] = predicted_classes(predictions, len(predictor.classes)).tolist()
print(predictor.classes[grade], f"{predictions.logits[0, 0]:.2f}")""",
    "value": """print(predictor.classes[0], predictions.logits[0, 0].item())""",
}


def usage(facts: CardFacts) -> str:
    """Markdown: Python, the same as a command, and what is not part of the files."""
    where = facts.repository or "FOLDER"
    kind = "value" if facts.target is not None else "grade" if facts.graded else "classes"
    metrics = "from fpt_fast.metrics import predicted_classes\n" if kind == "grade" else ""
    name = facts.features.get("backbone.name", "the frozen model")
    options, flags = "", ""
    if facts.frozen_folder:
        options += f', backbone="FOLDER OF {name}"'
        flags += f" --backbone 'FOLDER OF {name}'"
    if facts.temperatures is not None:
        options += ", calibrated=True"
        flags += " --calibrated"
    return (
        f"```python\n{metrics}from fpt_fast.pipeline import Predictor\n\n"
        f'predictor = Predictor("{where}"{options})\n'
        'predictions = predictor(["image.png"])  # files, or decoded images; any number\n'
        f"{_OUTPUTS[kind]}\n```\n\n"
        f"```bash\nfpt-fast predict --run {where}{flags} --images IMAGES --output predictions.csv\n"
        f"```\n\n{_scaled(facts)}{_frozen_model(facts, name)}"
    )


def _frozen_model(facts: CardFacts, name: str) -> str:
    found = "fpt-fast finds it by its name"
    if facts.frozen_folder:
        found = f"it was a folder named {name}, and you say where yours is"
    return (
        f"The frozen model is not part of these files: {found}. Other weights than those named "
        "above are refused. Images are prepared as is written above by `Predictor` and `fpt-fast "
        "predict` themselves."
    )


def _scaled(facts: CardFacts) -> str:
    if facts.target is None:
        return ""
    mean, deviation = facts.target
    return (
        f"Its output times {deviation:.9g}, plus {mean:.9g}, is {facts.classes[0]} (`target` in "
        "config.json; `Predictor` and `fpt-fast predict` do it). "
    )
