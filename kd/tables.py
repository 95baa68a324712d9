"""What evaluation prints: tables for the eye, JSON and CSV for programs."""

from __future__ import annotations

import csv
import io
import json
import math
import os

from kd.data.corrupt import SEVERITIES
from kd.evaluation import Measured

WIDTH = 120  # columns that a printed table may have

COLUMNS = (
    ("top-1 %", lambda row: f"{row['top1']:.2f}"),
    ("top-5 %", lambda row: f"{row['top5']:.2f}"),
    ("NLL", lambda row: f"{row['nll']:.4f}"),
    ("ECE %", lambda row: f"{row['calibration_error']:.2f}"),
    ("agrees %", lambda row: "-" if row["agreement"] is None else f"{row['agreement']:.2f}"),
    ("parameters", lambda row: f"{row['num_params']:,}"),
    ("multiply-adds", lambda row: f"{row['multiply_adds']:,}"),
    ("MB", lambda row: f"{row['bytes'] / 1e6:.2f}"),
    ("ms/image", lambda row: "-" if row["latency_ms"] is None else f"{row['latency_ms']:.2f}"),
)


def render(results: list[Measured], groups: list[dict], form: str) -> str:
    """All that is printed: `json` and `csv` hold the numbers of all runs, `table` and `markdown` what fits the eye."""
    if form == "json":
        return to_json(results, groups).decode().rstrip()
    if form == "csv":
        return to_csv(results, groups).rstrip()
    markdown = form == "markdown"
    parts = [caption(results), table(results, markdown)]
    if len(groups) > 1 or groups[0]["n"] > 1:
        parts += [comparison_table(groups, markdown), *against(groups)]
    if "corruptions" in results[0].row:
        parts.append(corruption_table(results, groups, markdown))
    if any(result.row["cka"] for result in results):
        parts.append(cka_table(results, markdown))
    classes = class_table(results, markdown)
    if len(results[0].row["per_class"]) <= 20 and (markdown or _width(classes) <= WIDTH):
        parts.append(classes)
    return "\n\n".join(parts)


def caption(results: list[Measured]) -> str:
    """Which images these are."""
    seen = [
        f"{row['split']} of {row['source']}, {row['num_images']:,} images"
        + (f", {row['corruption']} of severity {row['severity']}" if row["corruption"] else "")
        for row in (result.row for result in results)
    ]
    return "; ".join(dict.fromkeys(seen))


def table(results: list[Measured], markdown: bool = False) -> str:
    """One line a run: accuracy, calibration, agreement with its teacher, cost."""
    head = ["run", *(title for title, _ in COLUMNS)]
    return _align_names(head, [[r.name, *(show(r.row) for _, show in COLUMNS)] for r in results], markdown)


def comparison_table(groups: list[dict], markdown: bool = False) -> str:
    """One line a group of seeds: accuracy, and what it gains over its baseline."""
    head = ["runs", "n", "top-1 %", "gain", "95 % interval", "McNemar p", "gap closed %", "Pareto front by"]
    body = []
    for group in groups:
        top1, tests = group["spread"]["top1"], sorted(test["p"] for test in group["mcnemar"] or [])
        front = [title for key, title in (("multiply_adds", "adds"), ("num_params", "params")) if group["front"][key]]
        body.append(
            [
                group["name"],
                str(group["n"]),
                f"{top1['mean']:.2f}" + ("" if top1["std"] is None else f" ± {top1['std']:.2f}"),
                "-" if group["difference"] is None else f"{group['difference']:+.2f}",
                "-" if group["interval"] is None else "{:+.2f} to {:+.2f}".format(*group["interval"]),
                " to ".join(dict.fromkeys(f"{p:.2g}" for p in (tests[0], tests[-1]))) if tests else "-",
                "-" if group["gap_closed"] is None else f"{group['gap_closed']:.0f}",
                ", ".join(front) or "-",
            ]
        )
    return _align_names(head, body, markdown)


def against(groups: list[dict]) -> list[str]:
    """What the comparison table's gains are over, a sentence or none."""
    over: dict[str, list[str]] = {}
    for group in groups:
        if group["baseline"]:
            over.setdefault(group["baseline"], []).append(group["name"])
    parts = [f"over {baseline}: {', '.join(names)}" for baseline, names in over.items()]
    return [f"Gain {'; '.join(parts)}."] if parts else []


def corruption_table(results: list[Measured], groups: list[dict], markdown: bool = False) -> str:
    """Accuracy in percent of each group, the mean of its runs, for each corruption and severity, and the means."""
    body = []
    for group in groups:
        rows = [result.row for result in results if result.name in group["runs"]]
        lines = {
            name: [_mean(values) for values in zip(*(row["corruptions"][name] for row in rows), strict=True)]
            for name in rows[0]["corruptions"]
        }
        lines["all"] = [_mean(values) for values in zip(*lines.values(), strict=True)]
        body.append([group["name"], "none", *("-" for _ in SEVERITIES), f"{group['spread']['top1']['mean']:.2f}"])
        for name, values in lines.items():
            body.append([group["name"], name, *(f"{value:.2f}" for value in (*values, _mean(values)))])
    return _align_names(["runs", "corruption", *(f"severity {n}" for n in SEVERITIES), "mean"], body, markdown)


def _mean(values) -> float:
    return sum(values) / len(values)


def cka_table(results: list[Measured], markdown: bool = False) -> str:
    """One line a pair of modules: how alike the student's and the teacher's are."""
    body = []
    for result in results:
        for part in result.row["cka"] or []:
            value = "-" if part["cka"] is None else f"{part['cka']:.4f}"
            body.append([result.name, part["student"], part["teacher"], value])
    return _align_names(["run", "student's module", "teacher's module", "CKA"], body, markdown)


def class_table(results: list[Measured], markdown: bool = False) -> str:
    """One line a class: each run's accuracy on it in percent."""
    body = []
    for name in results[0].row["per_class"]:
        values = [result.row["per_class"].get(name) for result in results]
        body.append([name, *("-" if value is None else f"{value:.1f}" for value in values)])
    return _align(["class", *(result.name for result in results)], body, markdown)


def _width(text: str) -> int:
    return max(len(line) for line in text.splitlines())


def shared_folder(names: list[str]) -> str:
    """The folder that holds all of these paths, empty if none that they name does."""
    several = len({os.path.isabs(name) for name in names}) > 1
    return "" if several else os.path.commonpath([os.path.dirname(name) for name in names])


def _align_names(head: list[str], body: list[list[str]], markdown: bool) -> str:
    """A table whose first column are paths: where it is too wide, the folder that they share goes above it."""
    text, folder = _align(head, body, markdown), shared_folder([row[0] for row in body])
    if markdown or not folder or _width(text) <= WIDTH:
        return text
    return f"in {folder}:\n" + _align(head, [[os.path.relpath(row[0], folder), *row[1:]] for row in body], markdown)


def _align(head: list[str], body: list[list[str]], markdown: bool) -> str:
    rows = [head, *body]
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |" if markdown else "  ".join(cells).rstrip())
    if markdown:
        lines.insert(
            1, "| " + " | ".join("-" * w if i == 0 else "-" * max(1, w - 1) + ":" for i, w in enumerate(widths)) + " |"
        )
    return "\n".join(lines)


def to_json(results: list[Measured], groups: list[dict]) -> bytes:
    """`runs`: all numbers of all runs, confusion matrices (row: label, column: prediction), notes; `groups`: as
    `kd.compare.compare` gives them. A number that is not finite becomes null."""
    runs = [{**r.row, "confusion": r.confusion.tolist(), "notes": r.notes} for r in results]
    return (json.dumps(_finite({"runs": runs, "groups": groups}), indent=2, allow_nan=False) + "\n").encode()


def _finite(value):
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_csv(results: list[Measured], groups: list[dict]) -> str:
    """One line a run: its single numbers, and those of its group, whose columns begin with `group_`."""
    lines = []
    for result in results:
        group = next(group for group in groups if result.name in group["runs"])
        low, high = group["interval"] or (None, None)
        top1 = group["spread"]["top1"]
        keys = ("name", "n", "baseline", "difference", "gain", "gap_closed")
        whole = {**{key: group[key] for key in keys}, "interval_low": low, "interval_high": high}
        whole |= {"top1_mean": top1["mean"], "top1_std": top1["std"]}
        whole |= {f"front_{key}": value for key, value in group["front"].items()}
        row = {key: value for key, value in result.row.items() if not isinstance(value, dict | list)}
        row = {key: value for key, value in row.items() if key not in ("speed", "cka")}
        names = result.row["teacher"] or []
        row["teacher"] = names if isinstance(names, str) else " ".join(names)
        row |= {key: len(result.row[key] or []) for key in ("only_student_right", "only_teacher_right") if names}
        for part in result.row["speed"] or []:
            size = part["batch_size"]
            row |= {f"{key}_batch_{size}": part[key] for key in ("p50_ms", "p95_ms", "images_per_second")}
        lines.append({**row, **{f"group_{key}": value for key, value in whole.items()}})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def all_notes(results: list[Measured], groups: list[dict]) -> list[str]:
    """What a reader of the tables should know besides."""
    return [note for part in (*(r.notes for r in results), *(g["notes"] for g in groups)) for note in part]
