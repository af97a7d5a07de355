"""Rules over how many images each class or finding has, and over what else tells the class."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

from fpt_fast.doctor.findings import Finding
from fpt_fast.doctor.image_facts import ImageFacts
from fpt_fast.records import SPLITS
from fpt_fast.words import counted_do, plural

Facts = Sequence[ImageFacts]

_FEW = 10
_IMBALANCE = 10
# A side fact that removes this share of a constant guess's errors gives the class away.
_GIVEN_AWAY = 0.3


def find_imbalance(facts: Facts, classes: Sequence[str]) -> Iterator[Finding]:
    """Classes (findings) with far fewer images than others, with few, and with none."""
    kind = "finding" if any(fact.item.findings for fact in facts) else "class"
    counts = Counter((fact.item.split, label) for fact in facts for label in fact.labels)
    labels = range(len(classes))
    train = [counts["train", label] for label in labels]
    least, most = min(train, default=0), max(train, default=0)
    if least > 0 and most >= _IMBALANCE * least:
        yield Finding(
            "warning",
            f"the largest {kind} has {most / least:.0f} times the training images of the smallest: "
            + ", ".join(f"{name} {train[label]}" for label, name in enumerate(classes)),
            f"weight the {plural(kind)} in the loss, and judge by AUC and figures by {kind}, not "
            "accuracy",
        )
    few: list[str] = []
    for split in SPLITS:
        here = [counts[split, label] for label in labels]
        if not any(fact.item.split == split for fact in facts):
            yield Finding("note", f"there are no images in the {split} split")
            continue
        missing = tuple(name for label, name in enumerate(classes) if not here[label])
        few += [
            f"{name}: {here[i]} in {split}"
            for i, name in enumerate(classes)
            if here[i] and here[i] < _FEW
        ]
        if missing:
            yield Finding(
                "error" if split == "train" else "warning",
                f"{counted_do(len(missing), kind, 'have')} no image in the {split} split: "
                "no figure can be given for them",
                f"split the images anew, by {kind}",
                missing,
            )
    if few:
        yield Finding(
            "warning",
            f"some {plural(kind)} have fewer than {_FEW} images in a split: figures on them say "
            "little",
            "read the confidence intervals",
            tuple(few),
        )


def find_given_away(facts: Facts) -> Iterator[Finding]:
    """Whether something beside the picture tells the class: a model will learn that instead."""
    looks: dict[str, Callable[[ImageFacts], Hashable]] = {
        "size": lambda fact: fact.size,
        "file type": lambda fact: fact.item.path.suffix.lower(),
        "bit depth": lambda fact: fact.depth,
        "grey or colour": lambda fact: fact.grey,
    }
    for name, look in looks.items():
        gain = _removed_errors([look(f) for f in facts], [f.item.label for f in facts])
        if gain >= _GIVEN_AWAY:
            yield Finding(
                "warning",
                f"the {name} of an image gives its class away: guessing by it makes {gain:.0%} "
                "fewer errors than guessing the largest class",
                "find out why; a model may learn the camera or the hospital instead of the finding",
            )


def _removed_errors(values: Sequence[Hashable], labels: Sequence[int]) -> float:
    """Share of a constant guess's errors that are not made by guessing from ``values``.

    Each image is guessed from the others of its value, so that rare values tell nothing; where
    these are divided, the largest class is guessed.
    """
    of_value: dict[Hashable, Counter[int]] = defaultdict(Counter)
    for value, label in zip(values, labels, strict=True):
        of_value[value][label] += 1
    [(largest, count), *_] = Counter(labels).most_common(1) or [(0, 0)]
    constant = len(labels) - count
    if not constant:
        return 0.0
    wrong = 0
    for value, label in zip(values, labels, strict=True):
        others = (of_value[value] - Counter({label: 1})).most_common(2)
        clear = others and (len(others) == 1 or others[0][1] > others[1][1])
        wrong += (others[0][0] if clear else largest) != label
    return (constant - wrong) / constant
