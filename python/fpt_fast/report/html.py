"""The shell of a page that needs no network and no other file, and what pages share."""

import base64
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from fpt_fast.report.script import SCRIPT, SCRIPT_HASH
from fpt_fast.report.style import STYLE


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page, of ``sections`` of HTML; empty ones are left out."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # The page asks nothing of anybody, and a browser holds it to that.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        f"img-src data:; style-src 'unsafe-inline'; script-src '{SCRIPT_HASH}'\">\n"
        f"<title>{escape(title)} – fpt-fast</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(section for section in sections if section)
        + f"\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
    )


def image_tag(content: bytes, kind: str, alternative: str) -> str:
    """An image of the bytes of a file of ``kind`` (svg+xml, png, jpeg)."""
    # As an image, an SVG can neither run scripts nor clash with another one's names.
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{escape(alternative)}">'


def flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as names and text; a mapping inside becomes dotted names."""
    flat: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat += flatten(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            flat.append((f"{prefix}{name}", ", ".join(map(str, value))))
        else:
            flat.append((f"{prefix}{name}", "–" if value is None else str(value)))
    return flat
