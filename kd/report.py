"""The report of measured runs: a page of tables and pictures."""

from __future__ import annotations

import io
import math
import os
from pathlib import Path

from kd.evaluation import Measured
from kd.run_folder import write_atomic
from kd.tables import against, all_notes, caption, class_table, comparison_table, shared_folder, table, to_json


def write_report(folder: Path, results: list[Measured], groups: list[dict]) -> list[Path]:
    """Write report.md, results.json, accuracy against cost and a confusion matrix a run; returns the files."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    files = {"results.json": to_json(results, groups), "accuracy_vs_cost.png": _accuracy_against_cost(results)}
    for number, result in enumerate(results, start=1):
        stem = "".join(c if c.isalnum() else "-" for c in result.name).strip("-")
        files[f"confusion_{number}_{stem}.png"] = _confusion(result)
    notes = [f"- {note}" for note in all_notes(results, groups)]
    pictures = [f"![{name.removesuffix('.png').replace('_', ' ')}]({name})" for name in files if name.endswith(".png")]
    text = [
        f"# {caption(results)}",
        table(results, True),
        comparison_table(groups, True),
        *against(groups),
        *notes,
        class_table(results, True),
        *pictures,
        f"Latency on {results[0].row['device']}, one image, preprocessing included.",
    ]
    files["report.md"] = ("\n\n".join(text) + "\n").encode()
    for name, content in files.items():
        write_atomic(folder / name, content)
    return [folder / name for name in files]


def _png(figure) -> bytes:
    import matplotlib.pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, bbox_inches="tight", metadata={"Software": None})
    plt.close(figure)
    return buffer.getvalue()


def _accuracy_against_cost(results: list[Measured]) -> bytes:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    figure, axes = plt.subplots(figsize=(6.4, 4))
    kinds = {"trained on labels": ("o", "#2b6cb0"), "distilled": ("D", "#c05621")}
    # Where the labels of runs of equal cost go, the most accurate first, so that they do not cover each other.
    sides = (("left", (9, 5)), ("right", (-9, -12)), ("left", (9, -12)), ("right", (-9, 5)))
    seen: set[str] = set()
    placed: dict[str, int] = {}
    prefix = shared_folder([result.name for result in results]) if len(results) > 1 else ""
    for result in sorted(results, key=lambda result: -result.row["top1"]):
        row = result.row
        kind = "distilled" if row["teacher"] else "trained on labels"
        marker, colour = kinds[kind]
        share = row["top1"] / 100
        error = 100 * math.sqrt(share * (1 - share) / row["num_images"])
        group = f"{math.log10(row['multiply_adds']):.1f}"
        number = placed[group] = placed.get(group, -1) + 1
        x = row["multiply_adds"] * 1.05**number  # a step aside, so that the bars do not cover each other
        label = None if kind in seen else kind
        axes.errorbar(x, row["top1"], yerr=error, fmt=marker, color=colour, capsize=3, markersize=8, label=label)
        seen.add(kind)
        side, offset = sides[number % len(sides)]
        name = os.path.relpath(result.name, prefix) if prefix else result.name
        axes.annotate(name, (x, row["top1"]), textcoords="offset points", xytext=offset, ha=side, fontsize=9)
    costs = [result.row["multiply_adds"] for result in results]
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 3, max(costs) * 3)
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter("")
    axes.margins(y=0.25)
    axes.set_xlabel("multiply-adds an image (log scale)")
    axes.set_ylabel(f"{results[0].row['split']} accuracy, %")
    axes.set_title(f"{results[0].row['source']}: accuracy against cost (bars: one standard error)", fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="best")
    return _png(figure)


def _confusion(result: Measured) -> bytes:
    import matplotlib.pyplot as plt

    counts = result.confusion.double()
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    names = list(result.row["per_class"])
    size = max(4.0, min(12.0, 0.45 * len(names) + 1.5))
    figure, axes = plt.subplots(figsize=(size, size))
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    if len(names) <= 30:
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        for i in range(len(names)):
            for j in range(len(names)):
                if counts[i, j]:
                    colour = "white" if shares[i, j] > 0.5 else "black"
                    axes.text(j, i, int(counts[i, j]), ha="center", va="center", fontsize=7, color=colour)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.set_title(f"{result.name}: {result.row['top1']:.2f} % of {result.row['num_images']}", fontsize=10)
    return _png(figure)
