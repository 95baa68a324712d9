"""The report's page: the content of results.json, the learning curves and some images, put into report.html."""

from __future__ import annotations

import itertools
import math

from markupsafe import Markup

from kd.measure.records import Record
from kd.report import plots
from kd.report.page import render
from kd.report.tables import (
    Table,
    against,
    all_tables,
    caption,
    class_accuracy,
    class_gains,
    members,
    shared_folder,
    short_names,
    shown,
    verdicts,
)

MOST_RUNS = 6  # whose confusion is shown
MOST_COLUMNS = plots.MOST_PANELS  # groups in the table of classes
MOST_LINES = 300  # of the learning curves' numbers
_SCALED = {  # as `kd.report.tables.COLUMNS`
    "run": ("run", ""),
    "temperature": ("temperature", ".3f"),
    "NLL": ("nll", ".4f"),
    "NLL with it": ("nll_scaled", ".4f"),
    "ECE %": ("calibration_error", ".2f"),
    "ECE % with it": ("calibration_error_scaled", ".2f"),
}


def report_page(content: dict, records: list[Record], pictures: dict[tuple[str, int], str]) -> bytes:
    """The page as HTML.

    Args:
        content: what `kd.report.tables.content` gives for results.json, with its `differences` and `soft_targets`.
        records: the folders of its runs, in the same order.
        pictures: data URIs by (run, position of the image), of the images that `content` names.
    """
    runs, groups = [row["run"] for row in content["runs"]], [group["name"] for group in content["groups"]]
    # One folder for both, so that a name means one thing.
    short = dict(zip([*runs, *groups], short_names([*runs, *groups]), strict=True))
    content = _renamed(content, short)
    rows, groups = content["runs"], content["groups"]
    tables, curves, every = all_tables(rows, groups), *_curves(records, short)
    there = {key: key in tables for key in ("comparison", "speed", "corruptions", "features")}
    there |= {"curves": curves.body, **{key: content[key.replace("-", "_")] for key in ("differences", "soft-targets")}}
    taught = {row["experiment"] for row in rows if row["agreement"] is not None}
    firsts, number = [members(rows, group)[0] for group in groups], itertools.count(1)
    return render(
        "report.html",
        **content | {"rows": rows, "records": records, "firsts": firsts, "plots": plots},
        title=f"{'One run' if len(rows) == 1 else f'{len(rows)} runs'}: {caption(rows)}",
        verdicts=verdicts(groups),
        against=against(groups),
        absent=[section for section, found in there.items() if not found],
        folder=shared_folder(runs) if len(runs) > 1 else "",
        notes=[note for part in (*rows, *groups) for note in part["notes"]],
        pictures={(short[run], image): uri for (run, image), uri in pictures.items()},
        named=lambda image: image["file"] or f"image {image['image']}",
        groups_left=len(taught) - len(content["differences"]),
        most_confusions=MOST_RUNS,
        tables=tables,
        cost=_cost(rows, groups),
        curves=curves,
        every=every,
        reliability=_reliability(firsts[: plots.MOST_PANELS]),
        scaled=Table.of((row for row in rows if row["temperature"] is not None), _SCALED),
        classes=_classes(rows, groups),
        confusion_tables=_confusions,
        soft_table=_soft,
        training=_training(rows, records),
        svg=lambda plot, *words: Markup(plots.svg(plot, f"plot-{next(number)}", *words)),
    )


def _renamed(value, names: dict[str, str], key: str = ""):
    """The content with runs and groups by other names."""
    if isinstance(value, dict):
        return {inner: _renamed(part, names, inner) for inner, part in value.items()}
    if isinstance(value, list):
        return [_renamed(part, names, key) for part in value]
    return names.get(value, value) if key in ("run", "runs", "name", "baseline", "alone", "teacher") else value


def _cost(rows: list[dict], groups: list[dict]) -> Table:
    body = [
        [g["name"], shown(g["spread"]["top1"]["mean"], ".2f"), f"{plots.error(members(rows, g)):.2f}",
         f"{g['multiply_adds']:,}", f"{g['num_params']:,}", "yes" if g["front"]["multiply_adds"] else "no"]
        for g in groups
    ]  # fmt: skip
    return Table(["runs", "top-1 %", "bar", "multiply-adds", "parameters", "on the front"], body)


def _curves(records: list[Record], names: dict[str, str]) -> tuple[Table, int]:
    """The numbers of every so many epochs, and of how many."""
    every = math.ceil(sum(len(record.epochs) for record in records) / MOST_LINES)
    body = [
        [names[record.name], str(row["epoch"]), shown(row.get("val/accuracy"), ".2f"), shown(row["epoch/loss"], ".4f")]
        for record in records
        for i, row in enumerate(record.epochs, 1)
        if i % every == 0 or i == len(record.epochs)
    ]
    return Table(["run", "epoch", "validation accuracy %", "training loss"], body), every


def _reliability(rows: list[dict]) -> Table:
    body = [
        [row["run"], f"{part['low']:.2f} to {part['high']:.2f}", f"{part['count']:,}",
         shown(part["confidence"], ".2f"), shown(part["accuracy"], ".2f")]
        for row in rows
        for part in row["reliability"]
        if part["count"]
    ]  # fmt: skip
    return Table(["run", "bin", "images", "confidence %", "accuracy %"], body)


def _classes(rows: list[dict], groups: list[dict]) -> dict:
    """A `table` of the classes on which the groups are most unlike; whether it holds what is `gained`; what is left
    out in words, where it is `some`."""
    means, gained = class_accuracy(rows, groups), class_gains(rows, groups)
    columns = list(means)[:MOST_COLUMNS]
    every = list(dict.fromkeys(name for group in columns for name in means[group]))
    known = {name: [v for v in (means[group].get(name) for group in columns) if v is not None] for name in every}
    apart = {name: max(values) - min(values) if values else 0.0 for name, values in known.items()}
    names = plots.most_unlike([apart]) if len(every) > plots.MOST_CLASSES else every
    some = ""
    if len(names) < len(every) or len(columns) < len(means):
        some = f"Shown are {len(names)} of {len(every)} classes, those on which the runs are most unlike, and "
        some += f"{len(columns)} of {len(means)} groups; all are in results.json."
    more = [group for group in columns if group in gained]
    body = [[name, *(shown(means[group].get(name), ".1f") for group in columns),
             *(shown(gained[group].get(name), "+.1f") for group in more)] for name in names]  # fmt: skip
    return {"table": Table(["class", *columns, *(f"gain of {g}" for g in more)], body), "gained": gained, "some": some}


def _confusions(row: dict) -> dict[str, Table]:
    name, classes = row["run"], list(row["per_class"])
    pairs = [[f"{pair['label']} → {pair['predicted']}", f"{pair['count']:,}"] for pair in row["confused"]]
    tables = {f"Most frequent mistakes of {name}": Table(["label → predicted", "images"], pairs[: plots.MOST_CLASSES])}
    if len(classes) <= plots.MOST_CLASSES:
        body = [[label, *map(str, line)] for label, line in zip(classes, row["confusion"], strict=True)]
        tables[f"Confusion of {name}: a line a label"] = Table(["label", *classes], body)
    return tables


def _soft(image: dict, temperatures: list[float]) -> Table:
    columns = zip(*image["probabilities"], strict=True)
    lines = zip([*image["classes"], "others"], columns, strict=False)  # others where there are more classes
    return Table(
        ["class", *(f"T = {value:g}" for value in temperatures)],
        [[name, *(f"{value:.2f}" for value in line)] for name, line in lines],
    )


def _training(rows: list[dict], records: list[Record]) -> Table:
    body = []
    for record, row in zip(records, rows, strict=True):
        teacher = row["teacher"] or []
        words = [record.network, record.objective, teacher if isinstance(teacher, str) else " + ".join(teacher) or "-"]
        body.append([row["run"], *words, record.config["data"]["source"], str(record.config.get("epochs")),
                     str(row["seed"]), shown(row["train_seconds"], ",.0f")])  # fmt: skip
    words = ("network", "objective", "teacher", "data")
    return Table(["run", *words, "epochs", "seed", "seconds"], body, words)
