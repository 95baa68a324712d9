"""Predictions as one page: pictures inside it, no network, no script."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

from kd.report.page import document, image


@dataclass
class Prediction:
    """What runs say about one image: by run the best classes with their probabilities, and the milliseconds it took."""

    image: str
    best: dict[str, list[tuple[str, float]]]
    milliseconds: dict[str, float]
    thumbnail: str | None = None  # a data URI

    @property
    def agreed(self) -> bool:
        """Whether all runs name the same class."""
        return len({pairs[0][0] for pairs in self.best.values()}) == 1


_STYLE = """
img { display: block; height: 10rem; margin: auto; max-width: 100%; object-fit: contain; }
.cards h2 { font-size: 1rem; margin: .5rem 0; }
table { border-collapse: collapse; width: 100%; }
caption { font-weight: inherit; padding: .5rem 0 0; }
td:last-child { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; padding: 0; }
"""


def page(runs: list[str], predictions: list[Prediction], left_out: list[tuple[str, str]]) -> str:
    """The page's HTML.

    Args:
        runs: in the order in which they are shown.
        predictions: with thumbnails.
        left_out: names of images that could not be read, and why.
    """
    differing = [i for i, said in enumerate(predictions, 1) if not said.agreed]
    number = f"{len(predictions):,} image{'' if len(predictions) == 1 else 's'}"
    parts = [
        f"<h1>Predictions</h1>\n<p>{number}, by {escape(', '.join(runs))}. Percentages are "
        "the networks' probabilities; times are for one image from its pixels on.</p>"
    ]
    if len(runs) > 1:
        links = ", ".join(f'<a href="#image-{i}">{escape(predictions[i - 1].image)}</a>' for i in differing)
        parts.append(f"<p>The runs name different classes for {len(differing)}{': ' + links if links else ''}.</p>")
    if left_out:
        rows = "".join(f"<li>{escape(name)}: {escape(why)}</li>" for name, why in left_out)
        parts.append(f"<h2>Left out</h2>\n<ul>{rows}</ul>")
    parts.append('<ol class="cards">')
    for i, said in enumerate(predictions, 1):
        picture = image(said.thumbnail, _in_words(said, runs))
        parts.append(f'<li id="image-{i}">\n{picture}\n<h2>{escape(said.image)}</h2>')
        if not said.agreed:
            parts.append("<p><strong>The runs differ.</strong></p>")
        for run in runs:
            rows = "".join(
                f'<tr><td>{escape(name)}</td><td>{100 * p:.1f} %</td></tr>' for name, p in said.best[run]
            )  # fmt: skip
            parts.append(f"<table><caption>{escape(run)}, {said.milliseconds[run]:.1f} ms</caption>{rows}</table>")
        parts.append("</li>")
    parts.append("</ol>")
    return document(f"Predictions for {number}", parts, _STYLE)


def _in_words(said: Prediction, runs: list[str]) -> str:
    best = [f"{said.best[run][0][0]}, {100 * said.best[run][0][1]:.0f} %" for run in runs]
    if len(runs) > 1:
        best = [f"{run}: {text}" for run, text in zip(runs, best, strict=True)]
    return f"{said.image}; predicted {'; '.join(best)}"
