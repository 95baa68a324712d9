"""Names that users chose, as text: what they hold does not act where it is shown."""

from __future__ import annotations

import re


def in_markdown(name: str) -> str:
    """A name as Markdown shows it, on one line: https://spec.commonmark.org/0.31.2/#backslash-escapes"""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", " ".join(name.split()))
