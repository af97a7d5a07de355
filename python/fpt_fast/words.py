"""Counts and names in words, for messages."""

import difflib
from collections.abc import Iterable


def counted(count: int, noun: str) -> str:
    """``1 image``, ``2 images``, ``2 classes``."""
    return f"{count:d} {noun}" if count == 1 else f"{count:d} {plural(noun)}"


def plural(noun: str) -> str:
    """``images``, ``classes``, ``patches``, ``epochs``."""
    return noun + ("es" if noun.endswith(("s", "tch")) else "s")


def counted_are(count: int, noun: str) -> str:
    """``1 image is``, ``2 images are``."""
    return f"{counted(count, noun)} {'is' if count == 1 else 'are'}"


def counted_do(count: int, noun: str, verb: str) -> str:
    """``1 picture stands``, ``2 pictures stand``; ``1 class has``, ``2 classes have``."""
    if count == 1:
        verb = "has" if verb == "have" else f"{verb}s"
    return f"{counted(count, noun)} {verb}"


def what_was_meant(name: str, known: Iterable[str]) -> list[str]:
    """``["did you mean 'fit' instead of 'fits'?"]``, or nothing where no known name is near."""
    by_lower = {other.lower(): other for other in known}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1)
    return [f"did you mean {by_lower[found]!r} instead of {name!r}?" for found in near]


def format_bytes(count: int) -> str:
    """A count of bytes for people, in decimal units."""
    if count < 1000:
        return f"{count} B"
    value = float(count)
    for unit in ("kB", "MB", "GB", "TB"):
        value /= 1000
        if value < 999.95 or unit == "TB":
            break
    return f"{value:.1f} {unit}"
