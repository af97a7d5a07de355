"""Rules over the images of a data set: each yields what it finds wrong."""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence

from fpt_fast.doctor.findings import Finding
from fpt_fast.doctor.image_facts import ImageFacts
from fpt_fast.doctor.look_alikes import look_alike_pairs
from fpt_fast.doctor.value_rules import find_in_values
from fpt_fast.images import ImageError
from fpt_fast.records import SPLITS
from fpt_fast.words import counted, counted_are

Facts = Sequence[ImageFacts]

_FEW = 10
_IMBALANCE = 10
_STRETCH = 1.5
# Share of a 16-bit image's range below which it is nearly black on a screen and to a network.
_DARK = 0.02
# A side fact that removes this share of a constant guess's errors gives the class away.
_GIVEN_AWAY = 0.3


def find_in_images(
    facts: Facts,
    errors: Sequence[ImageError],
    classes: Sequence[str],
    input_size: tuple[int, int] | None = None,
) -> list[Finding]:
    """Everything that the rules find; ``input_size`` (height, width) is the frozen model's."""
    found = list(_unreadable(errors))
    found += _same_pictures(facts, classes)
    found += _look_alikes(facts)
    found += _blank(facts)
    found += _sizes(facts, input_size)
    found += _depths(facts)
    if any(fact.item.value is not None for fact in facts):
        return found + list(find_in_values([fact.item for fact in facts], classes[0]))
    found += _balance(facts, classes)
    found += _given_away(facts)
    return found


def _unreadable(errors: Sequence[ImageError]) -> Iterator[Finding]:
    if errors:
        yield Finding(
            "error",
            f"{counted(len(errors), 'image')} cannot be decoded",
            "mend or remove them; --skip-unreadable leaves them out",
            tuple(f"{error.key}: {error.reason}" for error in errors),
        )


def _same_pictures(facts: Facts, classes: Sequence[str]) -> Iterator[Finding]:
    """The same pixels more than once, by content: between splits, between classes, in one place."""
    groups: dict[str, list[ImageFacts]] = defaultdict(list)
    for fact in facts:
        if not fact.blank:
            groups[fact.digest].append(fact)
    repeated = [group for group in groups.values() if len(group) > 1]
    contradictory = [g for g in repeated if len({_labels(fact) for fact in g}) > 1]
    leaks = [g for g in repeated if len({fact.item.split for fact in g}) > 1]
    rest = [g for g in repeated if g not in contradictory and g not in leaks]
    if leaks:
        yield Finding(
            "error",
            f"{len(leaks)} pictures stand in more than one split: test figures would be too good",
            "keep each picture in one split only",
            tuple(_together(group) for group in leaks),
        )
    if contradictory:
        yield Finding(
            "error",
            f"{len(contradictory)} pictures stand under more than one label",
            "find out which label is right and remove the others",
            tuple(
                " = ".join(f"{fact.item.key} ({_named(fact, classes)})" for fact in group)
                for group in contradictory
            ),
        )
    if rest:
        yield Finding(
            "warning",
            f"{len(rest)} pictures are there more than once in one split and class",
            "remove the copies: each of them counts as an image of its own",
            tuple(_together(group) for group in rest),
        )


def _look_alikes(facts: Facts) -> Iterator[Finding]:
    sharp = [fact for fact in facts if not fact.blank]
    pairs = [
        (sharp[i], sharp[j])
        for i, j in look_alike_pairs([fact.thumbnail for fact in sharp])
        if sharp[i].digest != sharp[j].digest and sharp[i].item.split != sharp[j].item.split
    ]
    if pairs:
        yield Finding(
            "warning",
            f"{len(pairs)} pairs of images in different splits look the same (saved again, scaled "
            "or brightened?)",
            "look at them: the same picture in two splits makes test figures too good",
            tuple(_together(pair) for pair in pairs),
        )


def _blank(facts: Facts) -> Iterator[Finding]:
    blank = tuple(fact.item.key for fact in facts if fact.blank)
    if blank:
        yield Finding(
            "warning",
            f"{counted_are(len(blank), 'image')} of one value everywhere",
            "remove them",
            blank,
        )


def _range(numbers: Sequence[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low}-{high}"


def _sizes(facts: Facts, input_size: tuple[int, int] | None) -> Iterator[Finding]:
    if not facts:
        return
    heights, widths = [fact.size[0] for fact in facts], [fact.size[1] for fact in facts]
    yield Finding(
        "note",
        f"images are {_range(heights)} px high and {_range(widths)} px wide",
    )
    height, width = input_size or (1, 1)
    if input_size is not None:
        small = [f for f in facts if f.size[0] < height and f.size[1] < width]
        if small:
            yield Finding(
                "warning",
                f"{counted_are(len(small), 'image')} smaller than the input of {height}x{width}: "
                "enlarging adds tokens and no detail",
                "choose a smaller --input-size, or find the originals",
                tuple(f"{f.item.key}: {f.size[0]}x{f.size[1]}" for f in small),
            )
    stretched = [f for f in facts if _stretch(f.size, (height, width)) >= _STRETCH]
    if stretched:
        yield Finding(
            "warning",
            f"{counted_are(len(stretched), 'image')} stretched by {_STRETCH} or more when "
            "resized to the input's shape",
            "give an --input-size of their shape",
            tuple(f"{f.item.key}: {f.size[0]}x{f.size[1]}" for f in stretched),
        )


def _stretch(size: tuple[int, int], target: tuple[int, int]) -> float:
    ratio = (size[0] * target[1]) / (size[1] * target[0])
    return max(ratio, 1.0 / ratio)


def _depths(facts: Facts) -> Iterator[Finding]:
    counts = Counter(fact.depth for fact in facts)
    if len(counts) > 1:
        yield Finding(
            "warning",
            f"{counts[8]} images have 8 bits a sample and {counts[16]} have 16",
            "bring them to one depth by the same window: else brightness tells where they are from",
        )
    dark = tuple(
        f"{f.item.key}: values {f.low}..{f.high} of 0..65535"
        for f in facts
        if f.depth == 16 and not f.blank and f.high < _DARK * 65535
    )
    if dark:
        yield Finding(
            "warning",
            f"{len(dark)} 16-bit images use less than {_DARK:.0%} of their range",
            "stretch 10- and 12-bit values to 16 bits: to the frozen model these are black",
            dark,
        )


def _labels(fact: ImageFacts) -> tuple[float, ...]:
    """The class of an image, the findings that it has, or its number."""
    if fact.item.value is not None:
        return (fact.item.value,)
    if fact.item.findings:
        return tuple(place for place, has in enumerate(fact.item.findings) if has == 1)
    return (fact.item.label,)


def _named(fact: ImageFacts, classes: Sequence[str]) -> str:
    if fact.item.value is not None:
        return f"{fact.item.value:g}"
    return ", ".join(classes[int(label)] for label in _labels(fact)) or "no finding"


def _balance(facts: Facts, classes: Sequence[str]) -> Iterator[Finding]:
    several = any(fact.item.findings for fact in facts)
    kind, kinds = ("finding", "findings") if several else ("class", "classes")
    counts = Counter((fact.item.split, label) for fact in facts for label in _labels(fact))
    labels = range(len(classes))
    train = [counts["train", label] for label in labels]
    least, most = min(train, default=0), max(train, default=0)
    if least > 0 and most >= _IMBALANCE * least:
        yield Finding(
            "warning",
            f"the largest {kind} has {most / least:.0f} times the training images of the smallest: "
            + ", ".join(f"{name} {train[label]}" for label, name in enumerate(classes)),
            f"weight the {kinds} in the loss, and judge by AUC and figures by {kind}, not accuracy",
        )
    for split in SPLITS:
        here = [counts[split, label] for label in labels]
        if not any(here):
            yield Finding("note", f"there are no images in the {split} split")
            continue
        missing = tuple(name for label, name in enumerate(classes) if not here[label])
        few = tuple(
            f"{name}: {here[label]}" for label, name in enumerate(classes) if 0 < here[label] < _FEW
        )
        if missing:
            yield Finding(
                "error" if split == "train" else "warning",
                f"{len(missing)} {kinds} have no image in the {split} split: "
                "no figure can be given for them",
                f"split the images anew, by {kind}",
                missing,
            )
        if few:
            yield Finding(
                "warning",
                f"{len(few)} {kinds} have fewer than {_FEW} images in the {split} split: their "
                "figures say little",
                "read the confidence intervals",
                few,
            )


def _given_away(facts: Facts) -> Iterator[Finding]:
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


def _together(group: Sequence[ImageFacts]) -> str:
    return " = ".join(fact.item.key for fact in group)
