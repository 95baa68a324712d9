#!/usr/bin/env python
"""The tables of docs/speed.md and the picture docs/speed.png, written from benchmarks/results/*.json.

    python benchmarks/document.py

A table stands between `<!-- table NAME -->` and `<!-- end -->`; all else in the document is left as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from common import RESULTS, ROOT, median, spread

DOCUMENT, PICTURE = ROOT / "docs/speed.md", ROOT / "docs/speed.png"
BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
NOTHING = "Not measured yet.\n"
# the stages of growth.py's axis memory
WITHIN = {
    "store": "images decoded into the store",
    "table": "a table of the teacher's features made, an epoch from it",
    "views": "two epochs with flips, a table of views filled",
}


def hardware(entry: dict) -> str:
    """The line that says where a table was measured."""
    versions = entry["versions"]
    load = "" if entry.get("load_before") is None else f", load {entry['load_before']:.1f} before"
    device = entry["device"] if not entry["device"].startswith("cpu") else entry["processor"]
    where = f"{device}, {entry['cores']} cores, {entry['threads']} threads{load}"
    return (
        f"{where}; torch {versions['torch']}, Python {versions['python']}; {entry['date']}, commit {entry['commit']}."
    )


def table(columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def plain(entries: dict) -> str:
    """Times against the plain loop."""
    parts = []
    for job, entry in entries.items():
        rows = []
        for side, row in entry["sides"].items():
            seconds, accuracy = ([run[key] for run in row["runs"]] for key in ("seconds", "accuracy"))
            faster = "" if side == "plain" else spread(row["ratios"], 1)
            rows.append([side, spread(seconds, 1), faster, spread(accuracy)])
        count = len(entry["sides"]["plain"]["runs"])
        what = f"`{job}`: {entry['images']:,} images, {entry['epochs']} epochs, {entry['test_images']:,} test images, "
        columns = ["side", "seconds", "times faster", "test accuracy, %"]
        parts.append(f"{what}{count} rounds. {hardware(entry)}\n\n{table(columns, rows)}")
    return "\n".join(parts)


def limit(entries: dict) -> str:
    """The loop's share of the bare step's speed."""
    rows = []
    for entry in entries.values():
        speeds = [[pair[side] for pair in entry["pairs"]] for side in ("loop", "limit")]
        setting = [f"`{entry['student']}`", entry["image_size"], entry["batch_size"], entry["losses"]]
        rows.append([*setting, *(f"{median(values):,.0f}" for values in speeds), spread(entry["share_percent"], 1)])
    columns = ["student", "image", "batch", "losses", "loop, images/s", "limit, images/s", "share, %"]
    return f"{table(columns, rows)}\n{hardware(next(iter(entries.values())))}\n"


def growth(entries: dict) -> str:
    """One table an axis, and the run within a memory limit."""
    parts = []
    for axis, entry in entries.items():
        if axis == "memory":
            rows = []
            for row in entry["rows"]:
                speed, held = (
                    "" if row[key] is None else f"{row[key]:,.0f}" for key in ("images_per_second", "held_mb")
                )
                rows.append([WITHIN[row["stage"]], f"{row['made_mb']:,.0f}", f"{row['seconds']:.0f}", speed, held])
            columns = ["within the limit", "MB on disk", "seconds", "images/s", "most MB held"]
            what = f"{entry['images']:,} images, {entry['source_mb']:,.0f} MB of Parquet files"
            limit = f"A limit of {entry['limit_mb']:,.0f} MB ({entry['limit']})"
            parts.append(f"{limit}; {what}.\n\n{table(columns, rows)}\n{hardware(entry)}\n")
            continue
        rows = []
        for row in entry["rows"]:
            cold = "" if row["cold_seconds"] is None else f"{row['cold_seconds']:.1f}"
            numbers = [
                f"{row['ms_per_step']:.1f}",
                f"{row['seconds_to_first_step']:.1f}",
                cold,
                f"{row['peak_mb']:,.0f}",
            ]
            rows.append([f"{row[axis]:,}", *numbers])
        columns = [axis, "ms/step", "s to the first step", "the same, nothing made before", "peak MB"]
        parts.append(f"{table(columns, rows)}\n{_times(axis, entry['rows'])}{hardware(entry)}\n")
    return "\n".join(parts)


def _times(axis: str, rows: list[dict]) -> str:
    """By how much the work grows over an axis, and each cost with it; at most as much is at most linear."""
    first, last = rows[0], rows[-1]
    if not first[axis] or len(rows) == 1:
        return ""
    costs = {"ms/step": "ms_per_step", "seconds": "seconds_to_first_step", "with nothing made": "cold_seconds"}
    grown = [f"{name} {last[key] / first[key]:.1f}" for name, key in (costs | {"MB": "peak_mb"}).items() if first[key]]
    return f"{last[axis] / first[axis]:,.0f} times the {axis}: {', '.join(grown)} times. "


def peers(entries: dict) -> str:
    """Seconds of each side."""
    rows = []
    for job, entry in entries.items():
        own = entry["seconds"]["ours"]
        for side, values in entry["seconds"].items():
            speed = entry["images"] * entry["epochs"] / median(values)
            ratio = median([value / mine for value, mine in zip(values, own, strict=True)])
            named = " ".join([side, entry["packages"].get(side, "")]).strip()
            what = f"{job}: `{entry['teacher']}` to `{entry['student']}`"
            rows.append([what, named, spread(values, 1), f"{speed:,.0f}", f"{ratio:.1f}"])
    columns = ["job", "side", "seconds", "images/s", "times ours"]
    first = next(iter(entries.values()))
    return f"{table(columns, rows)}\n{first['epochs']} epochs. {hardware(first)}\n"


def kernels(entries: dict) -> str:
    """The share of kernels, and the largest operations."""
    parts = []
    for entry in entries.values():
        rows = [[f"`{row['name']}`", f"{row['percent']:.1f}"] for row in entry["largest"]]
        what = f"`{entry['student']}` at {entry['image_size']} and batch {entry['batch_size']}"
        took = (
            f"{entry['ms_per_step']:.1f} ms per step under the profiler, "
            f"{entry['kernel_percent']:.1f} % of it in kernels"
        )
        parts.append(f"{what}: {took}. {hardware(entry)}\n\n{table(['operation', '% of the step'], rows)}")
        rows = [[name, f"{milliseconds:.2f}"] for name, milliseconds in entry["parts"].items()]
        parts.append(table(["part of a step, without the profiler", "ms"], rows))
    return "\n".join(parts)


def gpu(entries: dict) -> str:
    """The tutorial's seconds, the teacher's and its students' accuracy."""
    parts = []
    if entry := entries.get("tutorial"):
        seconds = spread([run["seconds"] for run in entry["runs"]], 1)
        parts.append(f"CIFAR-10 tutorial, {entry['epochs']} epochs a run: {seconds} s. {hardware(entry)}\n")
    if entry := entries.get("teacher95"):
        rows = []
        for name in entry["runs"][0]:
            columns = [
                [run[name][key] for run in entry["runs"]] for key in ("accuracy", "seconds", "images_per_second")
            ]
            accuracy, seconds, speed = (
                spread(values, digits) for values, digits in zip(columns, (2, 0, 0), strict=True)
            )
            rows.append([name.replace("_", " "), accuracy, seconds, speed])
        columns = ["run", "test accuracy, %", "seconds", "images/s"]
        parts.append(f"{entry['epochs']} epochs a run. {hardware(entry)}\n\n{table(columns, rows)}")
    return "\n".join(parts)


TABLES = {"plain": plain, "limit": limit, "growth": growth, "peers": peers, "kernels": kernels, "gpu": gpu}


def tables(results: Path) -> dict[str, str]:
    """The text of each table, from the JSON files of a folder."""
    found = {}
    for name, make in TABLES.items():
        path = results / f"{name}.json"
        found[name] = make(json.loads(path.read_text())) if path.exists() else NOTHING
    return found


def filled(text: str, made: dict[str, str]) -> str:
    """A document with these tables in their places."""
    return BLOCK.sub(lambda match: match[1] + made[match[2]] + match[3], text)


def picture(results: Path, file: Path) -> None:
    """Draw what the files of a folder hold: times faster, share of the limit, growth, peers."""
    from matplotlib.figure import Figure

    read = {name: results / f"{name}.json" for name in ("plain", "limit", "growth", "peers")}
    data = {name: json.loads(path.read_text()) if path.exists() else {} for name, path in read.items()}
    bars: list[tuple[str, list[str], list[list[float]]]] = []
    labels, values = [], []
    for job, entry in data["plain"].items():
        for side in ("first run", "second run"):
            labels.append(f"{job}, {side}")
            values.append(entry["sides"][side]["ratios"])
    bars.append(("times faster than the plain loop", labels, values))
    shares = [entry["share_percent"] for entry in data["limit"].values()]
    names = [f"{entry['student']}, {entry['losses']}" for entry in data["limit"].values()]
    bars.append(("% of the bare step's speed", names, shares))
    labels, values = [], []
    for job, entry in data["peers"].items():
        for side, seconds in entry["seconds"].items():
            labels.append(f"{job}, {side}")
            values.append([entry["images"] * entry["epochs"] / value for value in seconds])
    bars.append(("images/s, beside peers", labels, values))
    figure = Figure(figsize=(11, 7), layout="constrained")
    axes = figure.subplots(2, 2).flat
    for axis, (title, labels, values) in zip(axes, bars, strict=False):
        places = range(len(labels))
        axis.barh(places, [median(each) for each in values], color="tab:blue", alpha=0.7)
        for place, each in zip(places, values, strict=True):
            axis.plot(each, [place] * len(each), ".", color="black", markersize=4)
        axis.set_yticks(places, labels, fontsize=8)
        axis.invert_yaxis()
        axis.set_title(title, fontsize=10)
    last = axes[3] if hasattr(axes, "__getitem__") else figure.axes[3]
    for name, entry in data["growth"].items():
        if name != "memory":
            base = entry["rows"][0]
            points = [
                (row[name] / max(1, base[name]), row["ms_per_step"] / base["ms_per_step"]) for row in entry["rows"]
            ]
            last.plot(*zip(*points, strict=True), "o-", label=name, markersize=4)
    last.set_xscale("log")
    last.set_title("ms a step as the work grows, relative to the first row", fontsize=10)
    if data["growth"]:
        last.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def write(out: Path | None = None) -> str:
    """Fill the document's tables and draw the picture; the tables. With `out` both go there, docs/ stays as it is."""
    results = out or RESULTS
    made = tables(results)
    document = filled(DOCUMENT.read_text(), made)
    results.mkdir(parents=True, exist_ok=True)
    (results / "speed.md" if out else DOCUMENT).write_text(document)
    picture(results, results / "speed.png" if out else PICTURE)
    return "\n".join(f"# {name}\n\n{text}" for name, text in made.items())


if __name__ == "__main__":
    print(write())
