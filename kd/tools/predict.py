"""What finished runs say about images: class, probability, milliseconds. Several runs are shown side by side.

python -m kd.predict runs/mine/kd cat.jpg photos/
python -m kd.predict runs/mine/teacher runs/mine/kd photos/ --top 3 --html predictions.html
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from kd.data.decode import UnreadableImage, open_image
from kd.data.sources import IMAGE_SUFFIXES
from kd.models import Classifier, load_classifier
from kd.report.page import thumbnail
from kd.report.tables import Table, short_names
from kd.run.folder import is_run
from kd.tools.predict_page import Prediction, accuracy, page
from kd.util.errors import CommandParser, UserError
from kd.util.escape import in_terminal
from kd.util.files import shown


def main(argv: list[str] | None = None) -> int:
    """Print the predictions; returns 1 if an image was left out, else 0."""
    parser = CommandParser(
        prog="python -m kd.predict",
        usage="python -m kd.predict RUN [RUN ...] IMAGE_OR_FOLDER ... [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("paths", nargs="+", help="run folders; images, and folders with images anywhere in them")
    parser.add_argument("--top", type=int, default=1, metavar="K", help="the K best classes of each image")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table", help="default: table")
    parser.add_argument("--html", metavar="FILE", help="write a page with the images too, which needs no other file")
    parser.add_trust()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.top < 1:
        raise UserError(f"--top {arguments.top} must be 1 or more")
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
    predictions, unreadable = ask(networks, files, arguments.top, thumbnails=bool(arguments.html))
    left_out += unreadable
    for name, why in left_out:
        print(in_terminal(f"left out: {name} ({why})"), file=sys.stderr)
    if predictions or arguments.format != "table":
        form = {"table": _table, "json": _json, "csv": _csv}[arguments.format]
        print(in_terminal(form(runs, predictions, left_out)))
    if arguments.html:
        Path(arguments.html).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.html).write_bytes(page(runs, predictions, left_out))
        print(f"wrote {arguments.html}", file=sys.stderr)
    return 1 if left_out else 0


def find_images(paths: Sequence[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """The files given, and those under the folders given that are called as images are; and what was not found."""
    files, missing = [], []
    for path in map(Path, paths):
        if not path.is_dir():
            if path.exists():
                files.append(path)
            else:
                missing.append((shown(path), "there is no such file or folder"))
            continue
        found = [file for file in path.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]
        found = [file for file in found if not any(part[0] == "." for part in file.relative_to(path).parts)]
        if not found:
            missing.append((shown(path), f"holds no images ({', '.join(IMAGE_SUFFIXES)})"))
        files += sorted(found)
    return files, missing


def ask(
    networks: dict[str, Classifier], files: Sequence[Path], top: int, thumbnails: bool = False
) -> tuple[list[Prediction], list[tuple[str, str]]]:
    """What each network says about each image; and the images that cannot be read, each with the reason.

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
    for said in predictions:
        cells = [(", ".join(f"{c} {100 * p:.1f} %" for c, p in said.best[run]), said.milliseconds[run]) for run in runs]
        rows.append([said.image, *(text for best, ms in cells for text in (best, f"{ms:.1f}"))])
    lines = [Table(["image", *(title for run in short_names(runs) for title in (run, "ms"))], rows).text()]
    if len(runs) > 1:
        same = sum(said.agreed for said in predictions)
        lines.append(f"all runs name the same class for {same} of {len(predictions)} images")
    return "\n".join(filter(None, [*lines, accuracy(runs, predictions)]))


def _json(runs: list[str], predictions: list[Prediction], left_out) -> str:
    content = {
        "images": [
            {
                "image": said.image,
                "label": said.label,
                "predictions": [
                    {
                        "run": run,
                        "classes": [{"class": name, "probability": p} for name, p in said.best[run]],
                        "ms": said.milliseconds[run],
                    }
                    for run in runs
                ],
            }
            for said in predictions
        ],
        "left_out": [{"image": name, "reason": why} for name, why in left_out],
    }
    return json.dumps(content, indent=2)


def _csv(runs: list[str], predictions: list[Prediction], _left_out) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["image", "run", "rank", "class", "probability", "ms", "label"])
    for said in predictions:
        for run in runs:
            for rank, (name, probability) in enumerate(said.best[run], 1):
                rows.writerow([said.image, run, rank, name, probability, said.milliseconds[run], said.label])
    return text.getvalue().rstrip("\n")
