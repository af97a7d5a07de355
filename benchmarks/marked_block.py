"""What scripts write into documents, between two markers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


def write_block(document: Path, start: str, end: str, text: str) -> None:
    """Put ``text`` between the lines ``start`` and ``end`` of a document, for what was there."""
    head, first, rest = document.read_text(encoding="utf-8").partition(start)
    _, last, tail = rest.partition(end)
    if not first or not last:
        raise SystemExit(f"{document} must hold the lines {start} and {end}")
    document.write_text(f"{head}{start}\n{text}\n{end}{tail}", encoding="utf-8")


class Published(NamedTuple):
    """Where a script's figures go: its JSON, and a block of a document that is made of it."""

    results: Path
    document: Path
    start: str
    end: str
    render: Callable[[dict[str, Any]], str]

    def write(self, found: dict[str, Any]) -> None:
        """Write both."""
        self.results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_block(self.document, self.start, self.end, self.render(found))
