"""The report of measured runs: one page with tables, plots and images, and its numbers as JSON and Markdown."""

from __future__ import annotations

import functools
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd.data import open_source
from kd.data.sources import RawSplit
from kd.measure import metrics
from kd.measure.evaluation import Measured
from kd.measure.records import Record
from kd.report.page import thumbnail
from kd.report.sections import report_page
from kd.report.tables import content, to_json, to_markdown
from kd.run.config import DataConfig
from kd.util.files import write_atomic

TEMPERATURES = (1.0, 2.0, 4.0, 8.0)
MOST_TEMPERATURES = 5
MOST_IMAGES = 24  # where student and teacher differ, of all runs together
MOST_STUDENTS, MOST_TEACHERS = 6, 3
SOFT_IMAGES, SOFT_CLASSES = 4, 4
SURE = 0.8  # how sure a teacher is of the images whose soft targets are shown, as nearly as there are any


def write_report(folder: Path, results: list[Measured], groups: list[dict]) -> list[Path]:
    """Write index.html, results.json, report.md and accuracy_vs_cost.png; returns the files."""
    from kd.report import plots

    folder.mkdir(parents=True, exist_ok=True)
    students = {result.name: result for result in results if result.teacher_logits is not None}
    firsts = [students[group["runs"][0]] for group in groups if group["runs"][0] in students][:MOST_STUDENTS]
    found = content(results, groups)
    found["differences"] = [differences(student, MOST_IMAGES // len(firsts)) for student in firsts]
    found["soft_targets"] = soft_targets(list(students.values()))
    pictures: dict[tuple[str, int], str] = {}
    for part in (*found["differences"], *found["soft_targets"]):
        student = students[part["run"]]
        for image in part["images"]:
            pictures[part["run"], image["image"]] = _picture(student.view, image["image"])
            image["file"] = _file_name(student, image["image"])
    files = {
        "index.html": report_page(found, [Record(result.name) for result in results], pictures),
        "results.json": to_json(found),
        "report.md": to_markdown(results, groups, "accuracy_vs_cost.png").encode(),
        "accuracy_vs_cost.png": plots.png(plots.accuracy_against_cost([result.row for result in results])),
    }
    for name, file in files.items():
        write_atomic(folder / name, file)
    return [folder / name for name in files]


def differences(student: Measured, most: int) -> dict:
    """On which images a run and its teacher name different classes.

    Returns:
        `run`; `counts` of the images by kind: `only_teacher_right`, `only_student_right`, `both_wrong`; and at most
        `most` of the `images`, of each kind those that both networks are surest of: each one's position in the split,
        `kind`, `label`, and for `student` and `teacher` the class and its probability.
    """
    labels, names, images = student.labels, list(student.row["per_class"]), []
    logits = {"student": student.logits, "teacher": student.teacher_logits}
    best = {who: each.argmax(1) for who, each in logits.items()}
    sure = {who: each.double().softmax(1).nan_to_num().amax(1) for who, each in logits.items()}
    mine, theirs = (each == labels for each in best.values())
    kinds = {"only_teacher_right": theirs & ~mine, "only_student_right": mine & ~theirs}
    kinds["both_wrong"] = ~mine & ~theirs & (best["student"] != best["teacher"])
    kinds = {kind: where.nonzero()[:, 0] for kind, where in kinds.items()}
    used = {kind: places for kind, places in kinds.items() if len(places)}
    for kind, places in used.items():
        order = (sure["student"] + sure["teacher"])[places].argsort(descending=True, stable=True)
        for i in places[order][: max(1, most // len(used))].tolist():
            answers = {who: {"class": names[best[who][i]], "probability": sure[who][i].item()} for who in logits}
            images.append({"image": i, "kind": kind, "label": names[labels[i]], **answers})
    return {"run": student.name, "counts": {kind: len(places) for kind, places in kinds.items()}, "images": images}


def soft_targets(students: list[Measured]) -> list[dict]:
    """What the teachers teach: their probabilities for a few images at several temperatures.

    Returns:
        For each teacher: `teacher`, the first `run` that it taught, `temperatures`, and `images` that it gets right, of
        different classes, those of which it is most nearly 80 % sure: each one's position, `label`, likeliest `classes`
        and for each temperature their `probabilities`, and where there are more classes that of all others.
    """
    found, parts = {}, []
    for student in students:
        row = student.row
        found.setdefault((str(row["teacher"]), row["config"]["teacher_mean"], row["images"]), []).append(student)
    for taught in list(found.values())[:MOST_TEACHERS]:
        first, names = taught[0], taught[0].row["teacher"]
        losses = [loss for s in taught for loss in s.row["config"].get("losses") or []]
        used = {loss.get("init_args", {}).get("temperature") for loss in losses}
        used = sorted(value for value in used if isinstance(value, int | float) and value not in TEMPERATURES)
        temperatures = sorted([*TEMPERATURES, *used][:MOST_TEMPERATURES])
        logits, classes = first.teacher_logits, list(first.row["per_class"])
        images = [_soften(logits[i], classes, temperatures) | {"image": i, "label": classes[first.labels[i]]}
                  for i in _instructive(logits, first.labels)]  # fmt: skip
        names = [names] if isinstance(names, str) else names
        parts.append({"teacher": names, "run": first.name, "temperatures": temperatures, "images": images})
    return parts


def _instructive(logits: Tensor, labels: Tensor) -> list[int]:
    right = metrics.hits(logits, labels).nonzero()[:, 0]
    distance = (logits[right].softmax(1).amax(1) - SURE).abs()
    chosen: dict[int, int] = {}
    for i in right[distance.argsort(stable=True)].tolist():
        chosen.setdefault(labels[i].item(), i)
    return list(chosen.values())[:SOFT_IMAGES]


def _soften(logits: Tensor, classes: list[str], temperatures: list[float]) -> dict:
    top = logits.argsort(descending=True, stable=True)[:SOFT_CLASSES]
    rows = []
    for temperature in temperatures:
        values = (logits.double() / temperature).softmax(0)[top].tolist()
        rows.append([*values, max(0.0, 1 - sum(values))] if len(classes) > SOFT_CLASSES else values)
    return {"classes": [classes[i] for i in top.tolist()], "probabilities": rows}


def _file_name(result: Measured, place: int) -> str | None:
    """An image's file below its source's folder, or its row there; None where images are no files, or some were left
    out."""
    row, store = result.row, result.view.store
    if not Path(row["source"]).expanduser().is_dir():
        return None
    splits = _raw_splits(json.dumps(result.settings))
    raw, where = splits.get(row["split"], splits["train"]), int(result.view.places[place])
    if not np.array_equal(raw.labels, store.labels):
        return None
    return raw.name(where) if raw.title else os.path.relpath(raw.name(where), Path(row["source"]).expanduser())


@functools.cache
def _raw_splits(settings: str) -> dict[str, RawSplit]:
    return open_source(DataConfig(**json.loads(settings)))[0].open()[1]


def _picture(view, place: int) -> str:
    """An image of a split as a data URI."""
    pixels = view.read(torch.tensor([place]).numpy(), torch.device("cpu"))[0]["image"][0].permute(1, 2, 0)
    return thumbnail(Image.fromarray(pixels.squeeze(2).numpy() if pixels.shape[2] == 1 else pixels.numpy()), 128)
