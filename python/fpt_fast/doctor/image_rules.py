"""Rules over the images of a data set: each yields what it finds wrong."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from fpt_fast.doctor.balance_rules import find_given_away, find_imbalance
from fpt_fast.doctor.findings import Finding
from fpt_fast.doctor.image_facts import ImageFacts
from fpt_fast.doctor.look_alikes import look_alike_pairs
from fpt_fast.doctor.value_rules import find_in_values
from fpt_fast.images import ImageError
from fpt_fast.records import Fit
from fpt_fast.words import counted, counted_are, counted_do

Facts = Sequence[ImageFacts]

_STRETCH = 1.5
# Share of a 16-bit image's range below which it is nearly black on a screen and to a network.
_DARK = 0.02


def find_in_images(
    facts: Facts,
    errors: Sequence[ImageError],
    classes: Sequence[str],
    input_size: tuple[int, int] | None = None,
    fit: Fit = "stretch",
) -> list[Finding]:
    """Everything that the rules find; ``input_size`` (height, width) is the frozen model's, which
    images are brought to by ``fit``."""
    found = list(_unreadable(errors))
    found += _same_pictures(facts, classes)
    found += _look_alikes(facts)
    found += _blank(facts)
    found += _sizes(facts, input_size, fit)
    found += _depths(facts)
    if any(fact.item.value is not None for fact in facts):
        return found + list(find_in_values([fact.item for fact in facts], classes[0]))
    found += find_imbalance(facts, classes)
    found += find_given_away(facts)
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
    contradictory = [g for g in repeated if len({fact.labels for fact in g}) > 1]
    leaks = [g for g in repeated if len({fact.item.split for fact in g}) > 1]
    rest = [g for g in repeated if g not in contradictory and g not in leaks]
    if leaks:
        yield Finding(
            "error",
            f"{counted_do(len(leaks), 'picture', 'stand')} in more than one split: test figures "
            "would be too good",
            "keep each picture in one split only",
            tuple(_together(group) for group in leaks),
        )
    if contradictory:
        yield Finding(
            "error",
            f"{counted_do(len(contradictory), 'picture', 'stand')} under more than one label",
            "find out which label is right and remove the others",
            tuple(
                " = ".join(f"{fact.item.key} ({_named(fact, classes)})" for fact in group)
                for group in contradictory
            ),
        )
    if rest:
        yield Finding(
            "warning",
            f"{counted_are(len(rest), 'picture')} there more than once in one split and class",
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
            f"in different splits {counted_do(len(pairs), 'pair', 'look')} the same (images saved "
            "again, scaled or brightened?)",
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


def _sizes(facts: Facts, input_size: tuple[int, int] | None, fit: Fit) -> Iterator[Finding]:
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
    if fit == "pad":
        return
    stretched = [f for f in facts if _stretch(f.size, (height, width)) >= _STRETCH]
    if stretched:
        yield Finding(
            "warning",
            f"{counted_are(len(stretched), 'image')} stretched by {_STRETCH} or more when "
            "resized to the input's shape",
            "give an --input-size of their shape, or pad them: --fit pad",
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
            f"{counted_do(counts[8], 'image', 'have')} 8 bits a sample and "
            f"{counted_do(counts[16], 'image', 'have')} 16",
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
            f"{counted_do(len(dark), '16-bit image', 'use')} less than {_DARK:.0%} of their range",
            "stretch 10- and 12-bit values to 16 bits: to the frozen model these are black",
            dark,
        )


def _named(fact: ImageFacts, classes: Sequence[str]) -> str:
    if fact.item.value is not None:
        return f"{fact.item.value:g}"
    return ", ".join(classes[int(label)] for label in fact.labels) or "no finding"


def _together(group: Sequence[ImageFacts]) -> str:
    return " = ".join(fact.item.key for fact in group)
