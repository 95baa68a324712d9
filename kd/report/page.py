"""What the project's HTML pages share: one file each, everything inside it, no network, no script.

The browser is told so too (a content security policy), so that a name that looks like a script is never run.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; }
body { font: 1rem/1.45 system-ui, sans-serif; margin: 0 auto; max-width: 75rem; padding: 1rem; }
h1, h2, h3, p, li, caption, figcaption { overflow-wrap: anywhere; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; } h3 { font-size: 1.05rem; }
h1, h2, h3 { break-after: avoid; line-height: 1.2; }
.skip { background: Canvas; left: 1rem; padding: .5rem; position: absolute; top: -10rem; z-index: 2; }
.skip:focus { top: .5rem; }
:focus-visible { outline: 3px solid #c60; outline-offset: 2px; }
.scroll { margin: .75rem 0; overflow-x: auto; }
.scroll table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { font-weight: 600; max-width: calc(100vw - 2.5rem); padding-bottom: .25rem; text-align: left; }
.scroll :is(td, th) { border-top: 1px solid #8886; padding: .25rem .6rem; text-align: right; }
.scroll :is(th:first-child, td.text, th.text) { text-align: left; }
.scroll :is(td:not(.text), th[scope=col]) { white-space: nowrap; }
.scroll th[scope=row] { background: Canvas; font-weight: inherit; left: 0; max-width: 11rem; overflow-wrap: break-word;
  position: sticky; }
.cards { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 17rem), 1fr));
  padding: 0; }
.cards > li { border: 1px solid #8888; border-radius: .5rem; break-inside: avoid; list-style: none; padding: .75rem; }
.cards > li:target { outline: 3px solid; }
img.small { image-rendering: pixelated; }
figure { margin: 1rem 0; }
figure > svg { break-inside: avoid; display: block; height: auto; max-width: 100%; }
.plots { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 25rem), 1fr)); }
.plots > * { min-width: 0; }
summary { cursor: pointer; padding: .25rem 0; }
nav ul { columns: 15rem; padding-left: 1.2rem; }
@media print {
  body { font-size: 9pt; max-width: none; padding: 0; }
  .skip { display: none; }
  .scroll { overflow: visible; }
  .scroll :is(td, th) { padding: .1rem .3rem; }
  .scroll :is(td.text, th) { overflow-wrap: anywhere; white-space: normal; }
  .scroll th[scope=row] { position: static; }
  tr { break-inside: avoid; }
  caption, thead { break-after: avoid; }
  details::details-content { content-visibility: visible; display: block; height: auto; }
}
"""


def document(title: str, body: Sequence[str], style: str = "") -> str:
    """A whole page: the head, a link that skips to what matters, and the body's parts of HTML in `main`."""
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}{style}</style>\n</head>\n<body>\n"
        '<a class="skip" href="#main">Skip to the content</a>\n<main id="main" tabindex="-1">\n'
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def table(caption: str, head: Sequence[str], body: Sequence[Sequence[str]], text: Sequence[str] = ()) -> str:
    """A table that scrolls in its own box where the screen is narrow, also by keyboard; a line's first cell names it.

    Args:
        caption, head, body: plain text, escaped here.
        text: titles of the columns that hold words, which stand on the left.
    """
    left = ["" if name not in text else ' class="text"' for name in head]
    columns = "".join(
        f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(head, left, strict=True)
    )  # fmt: skip
    lines = []
    for first, *rest in body:
        cells = "".join(f"<td{kind}>{escape(cell)}</td>" for cell, kind in zip(rest, left[1:], strict=True))
        lines.append(f'<tr><th scope="row">{escape(first)}</th>{cells}</tr>')
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">\n<table>'
        f"<caption>{escape(caption)}</caption>\n<thead><tr>{columns}</tr></thead>\n<tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


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


def image(uri: str, alt: str) -> str:
    """The tag of a thumbnail; the pixels of small ones are shown as they are."""
    small = ' class="small"' if uri.startswith("data:image/png") else ""
    return f'<img{small} src="{uri}" alt="{escape(alt)}">'
