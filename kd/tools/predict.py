"""Which classes finished runs give images: class, probability, milliseconds. Several runs are shown side by side.

python -m kd.predict runs/mine/kd cat.jpg photos/
python -m kd.predict runs/mine/teacher runs/mine/kd photos/ --top 3 --html predictions.html
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import PositiveInt
from PIL import Image

from kd.data.decode import UnreadableImage, open_image
from kd.data.sources import IMAGE_SUFFIXES
from kd.models import Classifier, load_classifier
from kd.report.page import render, thumbnail
from kd.report.tables import Table, shared_folder, short_names
from kd.run.folder import is_run
from kd.util.errors import CommandParser, UserError
from kd.util.escape import in_terminal
from kd.util.files import shown


@dataclass
class Prediction:
    """What runs predict for one image: by run the best classes with their probabilities, and the milliseconds it took.

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


def main(argv: list[str] | None = None) -> int:
    """Print the predictions; returns 1 if an image was left out, else 0."""
    parser = CommandParser("predict", __doc__, "RUN [RUN ...] IMAGE_OR_FOLDER ... [options]")
    parser.add_argument("paths", nargs="+", help="run folders; images, and folders with images anywhere in them")
    parser.add_argument("--top", type=PositiveInt, default=1, metavar="K", help="the K best classes of each image")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.add_argument("--html", metavar="FILE", help="write a page with the images too, which needs no other file")
    parser.add_trust()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.html and Path(arguments.html).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {arguments.html!r} must end in .html; it is overwritten, so it may not be an image")
    runs = list(dict.fromkeys(path for path in arguments.paths if is_run(path)))
    if not runs:
        load_classifier(arguments.paths[0])  # its error says what is missing
    files, left_out = find_images([path for path in arguments.paths if path not in runs])
    if not files:
        reasons = [f"{name!r}: {why}" for name, why in left_out] or ["no image is given; name files or folders"]
        raise UserError("; ".join(reasons))
    with contextlib.redirect_stdout(sys.stderr):  # stdout is for the result alone
        networks = {run: load_classifier(run, trust=arguments.trust_code) for run in runs}
    predictions, unreadable = predict(networks, files, arguments.top, thumbnails=bool(arguments.html))
    left_out += unreadable
    for name, why in left_out:
        print(in_terminal(f"left out: {name} ({why})"), file=sys.stderr)
    if predictions or arguments.format != "table":
        print(in_terminal(FORMATS[arguments.format](runs, predictions, left_out)))
    if arguments.html:
        Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.html).write_bytes(page(runs, predictions, left_out))
        print(f"wrote {arguments.html}", file=sys.stderr)
    return 1 if left_out else 0


def find_images(paths: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The files given, and those under the folders given that are called as images are; and what was not found."""
    files, missing = [], []
    for path in map(Path, paths):
        found = [path] if path.exists() and not path.is_dir() else []
        if path.is_dir():
            inside = sorted(
                file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            )
            found = [file for file in inside if not any(part[0] == "." for part in file.relative_to(path).parts)]
        if not found:
            why = (
                f"holds no images ({', '.join(IMAGE_SUFFIXES)})" if path.is_dir() else "there is no such file or folder"
            )
            missing.append((shown(path), why))
        files += found
    return files, missing


def predict(
    networks: dict[str, Classifier], files: Sequence[Path], top: int, thumbnails: bool = False
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """What each network predicts for each image; and the images that cannot be read, each with the reason.

    The time is that of one image alone from its pixels to its probabilities, preprocessing included, decoding not.
    """
    for run, network in networks.items():
        try:
            network.predict([Image.new("RGB", (64, 64))])  # the first call is slower than those that follow
        except (RuntimeError, ValueError) as error:
            raise UserError(f"run {run!r} does not take images as its config.json prepares them: {error}") from None
    predictions, unreadable = [], []
    for file in files:
        try:
            picture = open_image(file)
        except (UnreadableImage, OSError) as error:
            unreadable.append((shown(file), str(error)))
            continue
        best, milliseconds = {}, {}
        for run, network in networks.items():
            start = time.perf_counter()
            best[run] = network.predict([picture], top)[0]
            milliseconds[run] = 1000 * (time.perf_counter() - start)
        small, label = thumbnail(picture) if thumbnails else None, Path(os.path.abspath(file)).parent.name
        known = all(label in network.classes for network in networks.values())
        predictions.append(Prediction(shown(file), best, milliseconds, small, label if known else None))
    return predictions, unreadable


def _table(runs: list[str], predictions: list[Prediction], _left_out) -> str:
    rows = []
    for each in predictions:
        cells = [(", ".join(f"{c} {100 * p:.1f} %" for c, p in each.best[run]), each.milliseconds[run]) for run in runs]
        rows.append([each.image, *(text for best, ms in cells for text in (best, f"{ms:.1f}"))])
    lines = [Table(["image", *(title for run in short_names(runs) for title in (run, "ms"))], rows).text()]
    if len(runs) > 1:
        same = sum(each.agreed for each in predictions)
        lines.append(f"all runs name the same class for {same} of {len(predictions)} images")
    return "\n".join(filter(None, [*lines, accuracy(runs, predictions)]))


def _json(runs: list[str], predictions: list[Prediction], left_out) -> str:
    images = []
    for each in predictions:
        parts = []
        for run in runs:
            classes = [{"class": name, "probability": p} for name, p in each.best[run]]
            parts.append({"run": run, "classes": classes, "ms": each.milliseconds[run]})
        images.append({"image": each.image, "label": each.label, "predictions": parts})
    return json.dumps({"images": images, "left_out": [{"image": n, "reason": why} for n, why in left_out]}, indent=2)


def _csv(runs: list[str], predictions: list[Prediction], _left_out) -> str:
    from pandas import DataFrame  # slow to import

    rows = [
        (each.image, run, rank, name, probability, each.milliseconds[run], each.label)
        for each in predictions
        for run in runs
        for rank, (name, probability) in enumerate(each.best[run], 1)
    ]
    head = ["image", "run", "rank", "class", "probability", "ms", "label"]
    return DataFrame(rows, columns=head).to_csv(index=False).rstrip("\n")


FORMATS = {"table": _table, "json": _json, "csv": _csv}


def accuracy(runs: list[str], predictions: list[Prediction]) -> str:
    """How many images each run has right, in words, of those whose folder is a class; empty if none is."""
    labelled = [each for each in predictions if each.label is not None]
    parts = []
    for run, name in zip(runs, short_names(runs), strict=True):
        right = sum(each.best[run][0][0] == each.label for each in labelled)
        parts.append(f"{name} {100 * right / max(1, len(labelled)):.1f} % ({right})")
    return f"right of {len(labelled)} whose folder is a class: {', '.join(parts)}" if labelled else ""


def page(runs: list[str], predictions: list[Prediction], left_out: list[tuple[str, str]]) -> bytes:
    """The page as HTML: first the images for which the runs name different classes, then those that a run is least
    sure of. `predictions` have thumbnails; `left_out` are names of images that could not be read, and why."""
    images = [each.image for each in predictions]
    sure = {each.image: min(pairs[0][1] for pairs in each.best.values()) for each in predictions}
    number = f"{len(images):,} image{'' if len(images) == 1 else 's'}"
    return render(
        "predictions.html",
        title=f"Predictions for {number}",
        number=number,
        runs=dict(zip(runs, short_names(runs), strict=True)),
        folder=shared_folder(images) if images else "",
        names=dict(zip(images, short_names(images), strict=True)) if images else {},
        predictions=sorted(predictions, key=lambda each: (each.agreed, sure[each.image])),
        accuracy=accuracy(runs, predictions),
        left_out=left_out,
    )
