"""Names that users chose, as text: what they hold does not act where it is shown."""

from __future__ import annotations

import re

# Control characters, those that change the direction of writing, and halves of characters, which cannot be written.
_ACTS = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def in_terminal(text: str) -> str:
    r"""A text as a terminal may be sent it: what would act there is shown as its escape, such as `\x1b`; lines stay."""
    return _ACTS.sub(lambda found: ascii(found[0])[1:-1], text)


def in_markdown(name: str) -> str:
    """A name as Markdown shows it, on one line: https://spec.commonmark.org/0.31.2/#backslash-escapes"""
    return re.sub(r"([\\`*_\[\]<>|~&$#])", r"\\\1", in_terminal(" ".join(name.split())))
