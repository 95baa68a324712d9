"""Predictions as one page: pictures inside it, no network, no script."""

from __future__ import annotations

from dataclasses import dataclass

from kd.report.page import render
from kd.report.tables import shared_folder, short_names


@dataclass
class Prediction:
    """What runs say about one image: by run the best classes with their probabilities, and the milliseconds it took.

    label: the image's folder where that is called as a class of all runs, else None.
    """

    image: str
    best: dict[str, list[tuple[str, float]]]
    milliseconds: dict[str, float]
    thumbnail: str | None = None  # a data URI
    label: str | None = None

    @property
    def agreed(self) -> bool:
        """Whether all runs name the same class."""
        return len({pairs[0][0] for pairs in self.best.values()}) == 1

    @property
    def sureness(self) -> float:
        """The probability that the least sure run gives its class."""
        return min(pairs[0][1] for pairs in self.best.values())


def accuracy(runs: list[str], predictions: list[Prediction]) -> str:
    """How many images each run has right, in words, of those whose folder is a class; empty if none is."""
    labelled = [said for said in predictions if said.label is not None]
    parts = []
    for run, name in zip(runs, short_names(runs), strict=True):
        right = sum(said.best[run][0][0] == said.label for said in labelled)
        parts.append(f"{name} {100 * right / max(1, len(labelled)):.1f} % ({right})")
    return f"right of {len(labelled)} whose folder is a class: {', '.join(parts)}" if labelled else ""


def page(runs: list[str], predictions: list[Prediction], left_out: list[tuple[str, str]]) -> bytes:
    """The page as HTML: first the images for which the runs name different classes, then the least sure ones.

    Args:
        runs: in the order in which they are shown.
        predictions: with thumbnails.
        left_out: names of images that could not be read, and why.
    """
    number = f"{len(predictions):,} image{'' if len(predictions) == 1 else 's'}"
    images = [said.image for said in predictions]
    ordered = sorted(predictions, key=lambda said: (said.agreed, said.sureness))
    return render(
        "predictions.html",
        title=f"Predictions for {number}",
        number=number,
        runs=dict(zip(runs, short_names(runs), strict=True)),
        folder=shared_folder(images) if images else "",
        names=dict(zip(images, short_names(images), strict=True)) if images else {},
        predictions=ordered,
        differing=[said for said in ordered if not said.agreed],
        accuracy=accuracy(runs, predictions),
        left_out=left_out,
    )
