"""What evaluation prints: tables for the eye, JSON and CSV for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

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

# For each title a row's key, and the format of `shown`.
COLUMNS = {
    "run": ("run", ""),
    "top-1 %": ("top1", ".2f"),
    "top-5 %": ("top5", ".2f"),
    "NLL": ("nll", ".4f"),
    "Brier": ("brier", ".4f"),
    "ECE %": ("calibration_error", ".2f"),
    "agrees %": ("agreement", ".2f"),
    "parameters": ("num_params", ","),
    "multiply-adds": ("multiply_adds", ","),
    "MB": ("bytes", "MB"),
    "ms/image": ("latency_ms", ".2f"),
}
SPEED = {
    "run": ("run", ""),
    "batch size": ("batch_size", ""),
    "p50 ms": ("p50_ms", ".2f"),
    "p95 ms": ("p95_ms", ".2f"),
    "images/s": ("images_per_second", ",.0f"),
    "peak MB": ("peak_memory_bytes", "MB"),
}
CKA = {
    "run": ("run", ""),
    "student's module": ("student", ""),
    "teacher's module": ("teacher", ""),
    "CKA": ("cka", ".4f"),
}


@dataclass
class Table:
    """Text in columns; the first cell of a line names it.

    words: titles of the columns that hold words, which stand on the left on a page.
    """

    head: list[str]
    body: list[list[str]]
    words: tuple[str, ...] = ()

    @classmethod
    def of(cls, rows: Iterable[dict], columns: dict[str, tuple[str, str]], words: tuple[str, ...] = ()) -> Table:
        """A line for each row, with its values under `columns`, such as `COLUMNS`."""
        return cls(list(columns), [[shown(row[key], form) for key, form in columns.values()] for row in rows], words)

    def text(self) -> str:
        """For a terminal. Where that is too wide and the lines' names are paths, the folder they share goes above."""
        text, folder = _aligned(self.head, self.body), shared_folder([line[0] for line in self.body])
        if not folder or _width(text) <= WIDTH:
            return text
        return f"in {folder}:\n" + _aligned(self.head, [[os.path.relpath(n, folder), *line] for n, *line in self.body])

    def markdown(self) -> str:
        lines = [self.head, ["---", *["---:"] * (len(self.head) - 1)], *self.body]
        return "\n".join(f"| {' | '.join(map(in_markdown, line))} |" for line in lines)


def shown(value: float | str | None, form: str) -> str:
    """A value as text, a dash where there is none.

    Args:
        form: a format, or `MB` for a number of bytes.
    """
    return "-" if value is None else f"{value / 1e6:,.2f}" if form == "MB" else format(value, form)


def _aligned(head: list[str], body: list[list[str]]) -> str:
    from pandas import DataFrame  # slow to import

    (corner, *titles), *lines = [[in_terminal(cell).replace("\n", "\\n") for cell in row] for row in (head, *body)]
    frame = DataFrame([line[1:] for line in lines], [line[0] for line in lines], titles).rename_axis(columns=corner)
    return frame.to_string(col_space=[len(title) + 1 for title in titles])  # two spaces apart: a title holds one


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
    """The tables that there is something for, by name.

    `runs`: accuracy, calibration, agreement with the teacher and cost of each run; `comparison` of groups of seeds;
    `speed` by batch size; `corruptions`; `features`: how alike the student's and the teacher's modules are; `classes`:
    each run's accuracy on each class in percent.
    """
    of_many = any(len(row["per_class"]) > 5 for row in rows)
    columns = {title: column for title, column in COLUMNS.items() if of_many or column[0] != "top5"}
    tables = {"runs": Table.of(rows, columns)}
    if len(groups) > 1 or groups[0]["n"] > 1:
        tables["comparison"] = comparison_table(groups)
    for name, key, columns, words in (("speed", "speed", SPEED, ()), ("features", "cka", CKA, tuple(CKA)[1:3])):
        if lines := [{"run": row["run"], **part} for row in rows for part in row[key] or []]:
            tables[name] = Table.of(lines, columns, words)
    if "corruptions" in rows[0]:
        tables["corruptions"] = corruption_table(rows, groups)
    classes = [[name, *(shown(row["per_class"].get(name), ".1f") for row in rows)] for name in rows[0]["per_class"]]
    return {**tables, "classes": Table(["class", *(row["run"] for row in rows)], classes)}


def caption(rows: list[dict]) -> str:
    """Which images these are."""
    seen = [
        f"{row['split']} of {row['source']}, {row['num_images']:,} images"
        + (f", {row['corruption']} of severity {row['severity']}" if row["corruption"] else "")
        for row in rows
    ]
    return "; ".join(dict.fromkeys(seen))


def comparison_table(groups: list[dict]) -> Table:
    """One line a group of seeds: accuracy, and what it gains over its baseline."""
    head = ["runs", "gain", "95 % interval", "top-1 %", "n", "McNemar p", "gap closed %", "Pareto front by"]
    body = []
    for group in groups:
        top1, p = group["spread"]["top1"], sorted(test["p"] for test in group["mcnemar"] or [])
        front = [title for key, title in (("multiply_adds", "adds"), ("num_params", "params")) if group["front"][key]]
        interval = "-" if group["interval"] is None else "{:+.2f} to {:+.2f}".format(*group["interval"])
        accuracy = f"{top1['mean']:.2f}" + ("" if top1["std"] is None else f" ± {top1['std']:.2f}")
        tests = " to ".join(dict.fromkeys(f"{end:.2g}" for end in (p[0], p[-1]))) if p else "-"
        words = [interval, accuracy, str(group["n"]), tests, shown(group["gap_closed"], ".0f"), ", ".join(front) or "-"]
        body.append([group["name"], shown(group["difference"], "+.2f"), *words])
    return Table(head, body)


def against(groups: list[dict]) -> list[str]:
    """What the comparison table's gains are, a sentence or none."""
    short, over = _short(groups), {}
    for group in groups:
        if group["baseline"]:
            over.setdefault(short[group["baseline"]], []).append(short[group["name"]])
    parts = [f"of {', '.join(names)} over {baseline}" for baseline, names in over.items()]
    return [f"Gain is the difference in top-1 accuracy, in points: {'; '.join(parts)}."] if parts else []


def _short(groups: list[dict]) -> dict[str, str]:
    names = [group["name"] for group in groups]
    return dict(zip(names, short_names(names), strict=True))


def verdicts(groups: list[dict]) -> list[str]:
    """Whether each group is better than its baseline, a sentence each: shown where the 95 % interval leaves out 0."""
    short, seeds, sentences = _short(groups), {group["name"]: group["n"] for group in groups}, []
    for group in (group for group in groups if group["interval"]):
        name, other = short[group["name"]], short[group["baseline"]]
        points, (low, high) = group["difference"], group["interval"]
        few = ", of one seed" if 1 in (group["n"], seeds[group["baseline"]]) else ""
        text = f"no difference shown between {name} and {other}"
        if low > 0:
            text = f"{name} is better than {other} by {points:.1f} points"
        elif high < 0:
            text, low, high = f"{name} is worse than {other} by {-points:.1f} points", -high, -low
        sentences.append(f"{text} (95 %: {low:.1f} to {high:.1f}{few})")
    return sentences


def corruption_table(rows: list[dict], groups: list[dict]) -> Table:
    """Accuracy in percent of each group, the mean of its runs, for each corruption and severity, and the means."""
    body = []
    for group in groups:
        found = [row["corruptions"] for row in members(rows, group)]
        values = np.mean([list(each.values()) for each in found], axis=0)
        body.append([group["name"], "none", *("-" for _ in SEVERITIES), f"{group['spread']['top1']['mean']:.2f}"])
        for name, line in zip([*found[0], "all"], [*values, values.mean(0)], strict=True):
            body.append([group["name"], name, *(f"{value:.2f}" for value in (*line, line.mean()))])
    return Table(["runs", "corruption", *(f"severity {n}" for n in SEVERITIES), "mean"], body, ("corruption",))


def members(rows: list[dict], group: dict) -> list[dict]:
    """The rows of a group's runs."""
    return [row for row in rows if row["run"] in group["runs"]]


def class_accuracy(rows: list[dict], groups: list[dict]) -> dict[str, dict[str, float | None]]:
    """For each group by name: its accuracy in percent on each class, the mean of its runs."""
    means = {}
    for group in groups:
        each = [row["per_class"] for row in members(rows, group)]
        means[group["name"]] = {name: (spread(one[name] for one in each) or {}).get("mean") for name in each[0]}
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
    mistakes. A number that is not finite becomes None, and half a character, which no file can hold, a question mark.
    """
    runs = []
    for result in results:
        counts, names = result.confusion, list(result.row["per_class"])
        wrong = counts.clone().fill_diagonal_(0)
        pairs = zip(wrong.nonzero().tolist(), wrong[wrong > 0].tolist(), strict=True)
        pairs = sorted(pairs, key=lambda pair: -pair[1])[:MOST_PAIRS]
        confused = [{"label": names[i], "predicted": names[j], "count": count} for (i, j), count in pairs]
        confusion = counts.tolist() if len(names) <= MOST_DENSE else None
        runs.append({**result.row, "confusion": confusion, "confused": confused, "notes": result.notes})
    text = json.dumps({"runs": runs, "groups": groups}, ensure_ascii=False).encode("utf-8", "replace")
    return json.loads(text, parse_constant=lambda _: None)


def to_json(content: dict) -> bytes:
    """The content as JSON."""
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def to_csv(results: list[Measured], groups: list[dict]) -> str:
    """One line a run: its single numbers, and those of its group, whose columns begin with `group_`."""
    from pandas import DataFrame  # slow to import

    lines = []
    for result in results:
        group = next(group for group in groups if result.name in group["runs"])
        row = {
            key: v for key, v in result.row.items() if not isinstance(v, dict | list) and key not in ("speed", "cka")
        }
        names = result.row["teacher"] or []
        row["teacher"] = names if isinstance(names, str) else " ".join(names)
        row |= {key: len(result.row[key] or []) for key in ("only_student_right", "only_teacher_right") if names}
        for part in result.row["speed"] or []:
            row |= {f"{key}_batch_{part['batch_size']}": part[key] for key, _ in list(SPEED.values())[2:]}
        row |= {f"group_{key}": group[key] for key in ("name", "n", "baseline", "difference", "gain", "gap_closed")}
        row["group_interval_low"], row["group_interval_high"] = group["interval"] or (None, None)
        row |= {f"group_top1_{key}": value for key, value in group["spread"]["top1"].items()}
        lines.append(row | {f"group_front_{key}": value for key, value in group["front"].items()})
    return DataFrame(lines, dtype=object).to_csv(index=False)


def all_notes(results: list[Measured], groups: list[dict]) -> list[str]:
    """What a reader of the tables should know besides."""
    return [note for part in (*(r.notes for r in results), *(g["notes"] for g in groups)) for note in part]
