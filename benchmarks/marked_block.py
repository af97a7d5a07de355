"""What scripts write into documents, between two markers."""

from pathlib import Path


def write_block(document: Path, start: str, end: str, text: str) -> None:
    """Put ``text`` between the lines ``start`` and ``end`` of a document, for what was there."""
    head, first, rest = document.read_text(encoding="utf-8").partition(start)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise SystemExit(f"{document} must hold the lines {start} and {end}")
    document.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")
