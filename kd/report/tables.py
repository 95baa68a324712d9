"""What evaluation prints: tables for the eye, JSON and CSV for programs."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kd.data.corrupt import SEVERITIES
from kd.measure.compare import spread
from kd.report import page
from kd.util.escape import in_markdown, in_terminal

if TYPE_CHECKING:  # what measures is slow to import and not needed to show saved numbers
    from kd.measure.evaluation import Measured

WIDTH = 120  # columns that a printed table may have
MOST_PRINTED = 20  # classes of the printed table
MOST_DENSE = 100  # classes of a confusion matrix that is kept whole
MOST_PAIRS = 100  # of the most frequent mistakes

# Title, key in a row, format, and unit.
COLUMNS = (
    ("top-1 %", "top1", ".2f", 1),
    ("top-5 %", "top5", ".2f", 1),
    ("NLL", "nll", ".4f", 1),
    ("Brier", "brier", ".4f", 1),
    ("ECE %", "calibration_error", ".2f", 1),
    ("agrees %", "agreement", ".2f", 1),
    ("parameters", "num_params", ",", 1),
    ("multiply-adds", "multiply_adds", ",", 1),
    ("MB", "bytes", ".2f", 1e6),
    ("ms/image", "latency_ms", ".2f", 1),
)
SPEED = (
    ("batch size", "batch_size", "", 1),
    ("p50 ms", "p50_ms", ".2f", 1),
    ("p95 ms", "p95_ms", ".2f", 1),
    ("images/s", "images_per_second", ",.0f", 1),
    ("peak MB", "peak_memory_bytes", ",.2f", 1e6),
)


@dataclass
class Table:
    """Text in columns; the first cell of a line names it.

    words: titles of the columns that hold words, which stand on the left on a page.
    """

    head: list[str]
    body: list[list[str]]
    words: tuple[str, ...] = ()

    def text(self) -> str:
        """For a terminal. Where that is too wide and the lines' names are paths, the folder they share goes above."""
        text, folder = _aligned(self.head, self.body), shared_folder([line[0] for line in self.body])
        if not folder or _width(text) <= WIDTH:
            return text
        return f"in {folder}:\n" + _aligned(self.head, [[os.path.relpath(n, folder), *line] for n, *line in self.body])

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.body]
        return "\n".join(f"| {' | '.join(map(in_markdown, line))} |" for line in lines)


def _aligned(head: list[str], body: list[list[str]]) -> str:
    rows = [[in_terminal(cell).replace("\n", "\\n") for cell in row] for row in (head, *body)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([first.ljust(widths[0]), *map(str.rjust, rest, widths[1:])] for first, *rest in rows)
    return "\n".join(map("  ".join, lines))


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def render(results: list[Measured], groups: list[dict], form: str) -> str:
    """All that is printed: `json` and `csv` hold the numbers of all runs, `table` and `markdown` what fits the eye."""
    if form == "json":
        return to_json(content(results, groups)).decode().rstrip()
    if form == "csv":
        return to_csv(results, groups).rstrip()
    if form == "markdown":
        return to_markdown(results, groups)
    rows = [result.row for result in results]
    parts = [caption(rows)]
    for name, table in all_tables(rows, groups).items():
        if name == "classes" and (len(table.body) > MOST_PRINTED or _width(table.text()) > WIDTH):
            continue
        parts += [table.text()] if name != "speed" else []
        parts += against(groups) if name == "comparison" else []
    return "\n\n".join(parts)


def to_markdown(results: list[Measured], groups: list[dict], picture: str = "") -> str:
    """What `report.md` holds: the tables, and the verdict.

    Args:
        picture: a file to show at the end.
    """
    rows = [result.row for result in results]
    return page.render(
        "report.md",
        caption=caption(rows),
        device=rows[0]["device"],
        verdicts=verdicts(groups),
        tables=all_tables(rows, groups),
        against=against(groups),
        notes=all_notes(results, groups),
        picture=picture,
    ).decode()


def all_tables(rows: list[dict], groups: list[dict]) -> dict[str, Table]:
    """The tables that there are something to say in, by name."""
    tables = {"runs": runs_table(rows)}
    if len(groups) > 1 or groups[0]["n"] > 1:
        tables["comparison"] = comparison_table(groups)
    if any(row["speed"] for row in rows):
        tables["speed"] = speed_table(rows)
    if "corruptions" in rows[0]:
        tables["corruptions"] = corruption_table(rows, groups)
    if any(row["cka"] for row in rows):
        tables["features"] = cka_table(rows)
    return {**tables, "classes": class_table(rows)}


def caption(rows: list[dict]) -> str:
    """Which images these are."""
    seen = [
        f"{row['split']} of {row['source']}, {row['num_images']:,} images"
        + (f", {row['corruption']} of severity {row['severity']}" if row["corruption"] else "")
        for row in rows
    ]
    return "; ".join(dict.fromkeys(seen))


def shown(value: float | None, form: str, unit: float = 1) -> str:
    """A number in a unit as text; a dash where there is none."""
    return "-" if value is None else format(value if unit == 1 else value / unit, form)


def runs_table(rows: list[dict]) -> Table:
    """One line a run: accuracy, calibration, agreement with its teacher, cost."""
    of_many = any(len(row["per_class"]) > 5 for row in rows)
    columns = [column for column in COLUMNS if column[1] != "top5" or of_many]
    body = [[row["run"], *(shown(row[key], form, unit) for _, key, form, unit in columns)] for row in rows]
    return Table(["run", *(title for title, *_ in columns)], body)


def comparison_table(groups: list[dict]) -> Table:
    """One line a group of seeds: accuracy, and what it gains over its baseline."""
    head = ["runs", "gain", "95 % interval", "top-1 %", "n", "McNemar p", "gap closed %", "Pareto front by"]
    body = []
    for group in groups:
        top1, tests = group["spread"]["top1"], sorted(test["p"] for test in group["mcnemar"] or [])
        front = [title for key, title in (("multiply_adds", "adds"), ("num_params", "params")) if group["front"][key]]
        body.append(
            [
                group["name"],
                shown(group["difference"], "+.2f"),
                "-" if group["interval"] is None else "{:+.2f} to {:+.2f}".format(*group["interval"]),
                f"{top1['mean']:.2f}" + ("" if top1["std"] is None else f" ± {top1['std']:.2f}"),
                str(group["n"]),
                " to ".join(dict.fromkeys(f"{p:.2g}" for p in (tests[0], tests[-1]))) if tests else "-",
                shown(group["gap_closed"], ".0f"),
                ", ".join(front) or "-",
            ]
        )
    return Table(head, body)


def against(groups: list[dict]) -> list[str]:
    """What the comparison table's gains are, a sentence or none."""
    over: dict[str, list[str]] = {}
    names = [group["name"] for group in groups]
    short = dict(zip(names, short_names(names), strict=True))
    for group in groups:
        if group["baseline"]:
            over.setdefault(short[group["baseline"]], []).append(short[group["name"]])
    parts = [f"of {', '.join(names)} over {baseline}" for baseline, names in over.items()]
    return [f"Gain is the difference in top-1 accuracy, in points: {'; '.join(parts)}."] if parts else []


def verdicts(groups: list[dict]) -> list[str]:
    """Whether each group is better than its baseline, a sentence each: shown where the 95 % interval leaves out 0."""
    names = short_names([group["name"] for group in groups])
    known = {group["name"]: (name, group["n"]) for group, name in zip(groups, names, strict=True)}
    sentences = []
    for group in (group for group in groups if group["interval"]):
        (name, n), (other, theirs) = known[group["name"]], known[group["baseline"]]
        points, (low, high) = group["difference"], group["interval"]
        text = f"no difference shown between {name} and {other}"
        if low > 0:
            text = f"{name} is better than {other} by {points:.1f} points"
        elif high < 0:
            text, low, high = f"{name} is worse than {other} by {-points:.1f} points", -high, -low
        sentences.append(f"{text} (95 %: {low:.1f} to {high:.1f}{', of one seed' if min(n, theirs) == 1 else ''})")
    return sentences


def corruption_table(rows: list[dict], groups: list[dict]) -> Table:
    """Accuracy in percent of each group, the mean of its runs, for each corruption and severity, and the means."""
    body = []
    for group in groups:
        mine = members(rows, group)
        lines = {
            name: [_mean(values) for values in zip(*(row["corruptions"][name] for row in mine), strict=True)]
            for name in mine[0]["corruptions"]
        }
        lines["all"] = [_mean(values) for values in zip(*lines.values(), strict=True)]
        body.append([group["name"], "none", *("-" for _ in SEVERITIES), f"{group['spread']['top1']['mean']:.2f}"])
        for name, values in lines.items():
            body.append([group["name"], name, *(f"{value:.2f}" for value in (*values, _mean(values)))])
    return Table(["runs", "corruption", *(f"severity {n}" for n in SEVERITIES), "mean"], body, ("corruption",))


def _mean(values) -> float:
    return sum(values) / len(values)


def members(rows: list[dict], group: dict) -> list[dict]:
    """The rows of a group's runs."""
    return [row for row in rows if row["run"] in group["runs"]]


def cka_table(rows: list[dict]) -> Table:
    """One line a pair of modules: how alike the student's and the teacher's are."""
    body = [
        [row["run"], part["student"], part["teacher"], shown(part["cka"], ".4f")]
        for row in rows
        for part in row["cka"] or []
    ]
    words = ("student's module", "teacher's module")
    return Table(["run", *words, "CKA"], body, words)


def speed_table(rows: list[dict]) -> Table:
    """One line a run and batch size: the time of one batch, images a second, and the memory that it takes."""
    body = [
        [row["run"], *(shown(part[key], form, unit) for _, key, form, unit in SPEED)]
        for row in rows
        for part in row["speed"] or []
    ]
    return Table(["run", *(title for title, *_ in SPEED)], body)


def class_table(rows: list[dict]) -> Table:
    """One line a class: each run's accuracy on it in percent."""
    body = [[name, *(shown(row["per_class"].get(name), ".1f") for row in rows)] for name in rows[0]["per_class"]]
    return Table(["class", *(row["run"] for row in rows)], body)


def class_accuracy(rows: list[dict], groups: list[dict]) -> dict[str, dict[str, float | None]]:
    """For each group by name: its accuracy in percent on each class, the mean of its runs."""
    means = {}
    for group in groups:
        mine = members(rows, group)
        found = {name: spread(row["per_class"][name] for row in mine) for name in mine[0]["per_class"]}
        means[group["name"]] = {name: over and over["mean"] for name, over in found.items()}
    return means


def class_gains(rows: list[dict], groups: list[dict]) -> dict[str, dict[str, float | None]]:
    """For each group that has a student alone, by name: what it gains over that on each class, in points."""
    means = class_accuracy(rows, groups)
    return {
        group["name"]: {
            name: None if None in (value, means[group["alone"]][name]) else value - means[group["alone"]][name]
            for name, value in means[group["name"]].items()
        }
        for group in groups
        if group["alone"]
    }


def short_names(names: list[str]) -> list[str]:
    """Paths without the folder that they share."""
    folder = shared_folder(names)
    return [os.path.relpath(name, folder) for name in names] if folder else names


def shared_folder(names: list[str]) -> str:
    """The folder that holds all of these paths, empty if none that they name does."""
    several = len({os.path.isabs(name) for name in names}) > 1
    return "" if several else os.path.commonpath([os.path.dirname(name) for name in names])


def content(results: list[Measured], groups: list[dict]) -> dict:
    """`runs`: all numbers of all runs, and notes; `groups`: as `kd.measure.compare.compare` gives them.

    `confusion` (row: label, column: prediction) is None of more than 100 classes; `confused` are the 100 most frequent
    mistakes. A number that is not finite becomes None.
    """
    runs = []
    for result in results:
        counts, names = result.confusion, list(result.row["per_class"])
        wrong = counts.clone().fill_diagonal_(0)
        most, where = wrong.flatten().sort(descending=True, stable=True)
        pairs = zip(most[:MOST_PAIRS].tolist(), where[:MOST_PAIRS].tolist(), strict=True)
        pairs = [(count, *divmod(place, len(names))) for count, place in pairs if count]
        confused = [{"label": names[i], "predicted": names[j], "count": count} for count, i, j in pairs]
        confusion = counts.tolist() if len(names) <= MOST_DENSE else None
        runs.append({**result.row, "confusion": confusion, "confused": confused, "notes": result.notes})
    return _plain({"runs": runs, "groups": groups})


def to_json(content: dict) -> bytes:
    """The content as JSON."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _plain(value):
    """The value without numbers that are not finite and letters that no file can hold."""
    if isinstance(value, dict):
        return {_plain(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
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
            row |= {f"{key}_batch_{size}": part[key] for _, key, *_ in SPEED[1:]}
        lines.append({**row, **{f"group_{key}": value for key, value in whole.items()}})
    import pandas  # slow to import

    return pandas.DataFrame(lines, dtype=object).to_csv(index=False)


def all_notes(results: list[Measured], groups: list[dict]) -> list[str]:
    """What a reader of the tables should know besides."""
    return [note for part in (*(r.notes for r in results), *(g["notes"] for g in groups)) for note in part]
