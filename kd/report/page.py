"""The project's HTML pages: one file each, everything inside it, no network, no script, from the templates beside this.

A content security policy holds the browser to that, and what is filled in is escaped, so that a name that looks like
a script is never run.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from PIL import Image

from kd.util.escape import in_markdown

_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=select_autoescape(),
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["escaped"] = in_markdown


def render(template: str, **content) -> bytes:
    """A template filled in; on a page no line breaks before a percent sign."""
    text = _ENVIRONMENT.get_template(template).render(content)
    text = text.replace(" %", "\N{NO-BREAK SPACE}%") if template.endswith(".html") else text
    return text.encode("utf-8", "replace")


def thumbnail(picture: Image.Image, side: int = 240) -> str:
    """A picture of at most `side` pixels as a data URI: small ones without loss, others as JPEG."""
    exact = max(picture.size) <= 64
    if picture.mode.startswith("I"):  # 16 bits, see `read_image`
        picture = picture.point(lambda value: value / 256).convert("L")
    small = picture.convert("RGB")
    small.thumbnail((side, side))
    content = io.BytesIO()
    small.save(content, "PNG" if exact else "JPEG", quality=80)
    kind = "png" if exact else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(content.getvalue()).decode()}"
