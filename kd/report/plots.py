"""Plots of runs, for a notebook and for the report: each function returns a matplotlib figure.

`runs` are those of `kd.runs("runs/")` or rows of `kd.results("report")["runs"]`. Nothing is shown by colour alone: the
palette (Okabe and Ito's, its light colours darkened) can be told apart by the colour-blind and stands out from white
and from black, and each series has a marker and a line of its own.
"""

from __future__ import annotations

import functools
import io
import math
import re
import warnings
from collections.abc import Iterable
from html import escape

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from kd.measure.compare import by_experiment, group_names, pareto, spread
from kd.report.tables import class_gains as gains
from kd.report.tables import short_names

INK = "#1b1e23"  # becomes the text's colour on the page, so that the plots are legible in dark mode too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#c46a9c", "#a87a00", "#7f7f7f")
MARKERS, LINES = "oDs^vX", ("-", "--", "-.", ":")
MOST_NAMED = 12  # series or points that are named in a plot; with more of them the numbers beneath show which is which
MOST_PANELS = 8
MOST_CLASSES = 20  # of a whole confusion matrix, and of the bars
_STYLE = {
    "font.size": 11,
    "font.sans-serif": ["DejaVu Sans"],
    "text.parse_math": False,  # a dollar in a name is a dollar
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "legend.frameon"), False),
    "axes.titlesize": 10,
    "grid.alpha": 0.3,
    "legend.fontsize": 10,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


class Plot(Figure):
    """A figure that a notebook shows whether or not it has imported pyplot."""

    def _repr_png_(self) -> bytes:
        return png(self)


def _plot(draw):
    """The function with the plots' style, given a new figure as its first argument."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs) -> Plot:
        with matplotlib.rc_context(_STYLE):
            figure = Plot(layout="constrained")
            draw(figure, *args, **kwargs)
        return figure

    return wrapped


def _series(number: int) -> dict:
    kinds = {"color": COLOURS, "marker": MARKERS, "linestyle": LINES}
    return {key: values[number % len(values)] for key, values in kinds.items()}


def _legend(figure: Plot, axes, columns: int = 2) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def _rows(runs: Iterable) -> list[dict]:
    """Rows of runs, those that are not finished left out."""
    rows = [run if isinstance(run, dict) else run.row for run in runs]
    return [row for row in rows if row is not None]


def _groups(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows of one experiment on the same images by a short name."""
    found = by_experiment(rows)
    return dict(zip(short_names(group_names(found)), found, strict=True))


@_plot
def learning_curves(figure: Plot, runs) -> None:
    """Validation accuracy and training loss against the epoch, or the step where the runs' epochs differ in length, a
    line for each of `kd.runs`; seeds look alike."""
    figure.set_size_inches(5.2, 6)
    found: dict[str, list] = {}
    for run in (run for run in runs if run.epochs):
        found.setdefault(run.experiment, []).append(run)
    lengths = {members[0].epochs[0]["step"] for members in found.values()}
    unit = "step" if len(lengths) > 1 else "epoch"
    names = short_names(group_names([[{"run": run.name} for run in members] for members in found.values()]))
    panels = (("val/accuracy", "validation accuracy, %"), ("epoch/loss", "training loss (log scale)"))
    for axes, (key, title) in zip(figure.subplots(2, sharex=True), panels, strict=True):
        for number, members in enumerate(found.values()):
            for i, run in enumerate(members):
                points = [(row[unit], row[key]) for row in run.epochs if row.get(key) is not None]
                style = {**_series(number), "markersize": 4, "markevery": max(1, len(points) // 8)}
                x, y = zip(*points, strict=True) if points else ((), ())
                axes.plot(x, y, **style, label=None if i else names[number])
        axes.set_ylabel(title)
        axes.grid()
    axes.set(yscale="log", xlabel=unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(found) <= MOST_NAMED:
        _legend(figure, axes)


@_plot
def accuracy_against_cost(figure: Plot, runs, cost: str = "multiply_adds") -> None:
    """Top-1 accuracy against `multiply_adds` or `num_params`, one point a group of seeds, and the Pareto front.

    Bars are one standard deviation over the seeds, of a single run one standard error over its images.
    """
    figure.set_size_inches(5.2, 4.2)
    axes, rows = figure.subplots(), _rows(runs)
    groups = _groups(rows)
    points = {name: (spread(row["top1"] for row in group)["mean"], group[0][cost]) for name, group in groups.items()}
    best = dict(zip(points, pareto(list(points.values())), strict=True))
    front = sorted((c, a) for name, (a, c) in points.items() if best[name])
    axes.step(*zip(*front, strict=True), where="post", color=COLOURS[-1], linestyle=":", label="Pareto front")
    # Where the labels of points of equal cost go, the most accurate first, so that they do not cover each other.
    sides = (("left", (8, 5)), ("right", (-8, -13)), ("left", (8, -13)), ("right", (-8, 5)))
    seen, placed = set(), {}
    for name in sorted(points, key=lambda name: -points[name][0]):
        accuracy, adds = points[name]
        kind = "distilled" if groups[name][0]["teacher"] else "trained on labels"
        style = {"fmt": MARKERS[kind == "distilled"], "color": COLOURS[kind == "distilled"]}
        place = f"{math.log10(adds):.1f}"
        number = placed[place] = placed.get(place, -1) + 1
        x = adds * 1.04**number  # a step aside, so that the bars do not cover each other
        label = None if kind in seen else kind
        axes.errorbar(x, accuracy, yerr=error(groups[name]), capsize=3, markersize=8, label=label, **style)
        seen.add(kind)
        if len(points) <= MOST_NAMED or best[name]:
            side, offset = sides[number % len(sides)]
            where = {"textcoords": "offset points", "xytext": offset, "ha": side}
            axes.annotate(_short(name, 36), (x, accuracy), **where, fontsize=10)
    costs = [adds for _, adds in points.values()]
    words = {"multiply_adds": "multiply-adds per image"}.get(cost, "parameters") + " (log scale)"
    axes.set(xscale="log", xlim=(min(costs) / 3, max(costs) * 3), xlabel=words)
    axes.set_ylabel(f"{rows[0]['split']} accuracy, %")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.xaxis.set_minor_formatter("")
    axes.margins(y=0.25)
    axes.grid()
    _legend(figure, axes, 3)


def error(rows: list[dict]) -> float:
    """The bar of a group of runs: the standard deviation over its seeds, of one run the standard error over images."""
    over = spread(row["top1"] for row in rows)
    share = over["mean"] / 100
    return over["std"] if len(rows) > 1 else 100 * math.sqrt(share * (1 - share) / rows[0]["num_images"])


@_plot
def reliability(figure: Plot, rows: list[dict]) -> None:
    """How often the networks are right against how sure they are, a panel a run, of at most 8 of them.

    Marks on the dashed line would be calibrated; a mark's area is its share of the images.
    """
    rows = rows[:MOST_PANELS]
    columns = min(2, len(rows))
    figure.set_size_inches(2.6 * columns, 2.75 * math.ceil(len(rows) / columns))
    names = short_names([row["run"] for row in rows])
    shape = math.ceil(len(rows) / columns), columns
    panels = list(figure.subplots(*shape, sharex=True, sharey=True, squeeze=False).flat)
    for number, (axes, row) in enumerate(zip(panels, rows, strict=False)):
        bins = [part for part in row["reliability"] if part["count"]]
        sure, right, style = [b["confidence"] for b in bins], [b["accuracy"] for b in bins], _series(number)
        axes.plot([0, 100], [0, 100], color=INK, linestyle="--", linewidth=1)
        axes.vlines(sure, sure, right, color=style["color"], linewidth=1)
        area = [12 + 120 * part["count"] / row["num_images"] for part in bins]
        axes.scatter(sure, right, s=area, color=style["color"], marker=style["marker"])
        axes.set_title(f"{names[number]}\nECE {row['calibration_error']:.2f} %")
        axes.set(xlim=(-3, 103), ylim=(-3, 103), aspect="equal")
        axes.grid()
    for axes in panels[len(rows) :]:
        axes.remove()
    figure.supxlabel("confidence, %", fontsize=11)
    figure.supylabel("accuracy, %", fontsize=11)


@_plot
def confusion(figure: Plot, row: dict) -> None:
    """What a run takes for what: the matrix, or of more than 20 classes the most frequent mistakes."""
    names, counts = list(row["per_class"]), row["confusion"]
    if len(names) > MOST_CLASSES:
        pairs = row["confused"][:MOST_CLASSES][::-1]
        figure.set_size_inches(5.2, 1 + 0.24 * max(2, len(pairs)))
        axes = figure.subplots()
        names = [f"{_short(pair['label'])} → {_short(pair['predicted'])}" for pair in pairs]
        bars = axes.barh(names, [pair["count"] for pair in pairs], color=COLOURS[0])
        axes.bar_label(bars, padding=3, fontsize=9)
        axes.tick_params(axis="y", labelsize=9)
        axes.set_xlabel("images")
        return
    side = max(3.6, min(6.4, 0.42 * len(names) + 1.2))
    figure.set_size_inches(side, side)
    axes = figure.subplots()
    shares = [[count / max(1, sum(line)) for count in line] for line in counts]
    axes.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(ylim=(len(names), 0), aspect="equal")
    ticks, labels = [i + 0.5 for i in range(len(names))], [_short(name) for name in names]
    long = max(map(len, labels)) > 2
    axes.set_xticks(ticks, labels, rotation=60 if long else 0, ha="right" if long else "center", fontsize=9)
    axes.set_yticks(ticks, labels, fontsize=9)
    for i, line in enumerate(counts):
        for j, count in enumerate(line):
            if count:
                colour = "white" if shares[i][j] > 0.5 else "black"
                axes.text(j + 0.5, i + 0.5, count, ha="center", va="center", fontsize=9, color=colour)
    axes.set(xlabel="predicted", ylabel="label")


@_plot
def class_gains(figure: Plot, rows: list[dict], groups: list[dict]) -> None:
    """What each distilled group gains over its student alone, class by class, in points; the most unlike 20 classes."""
    found = list(gains(rows, groups).items())[:MOST_PANELS]
    shown = most_unlike([values for _, values in found])
    figure.set_size_inches(5.2, 1.4 + 0.3 * len(shown) + 0.12 * len(found))
    axes = figure.subplots()
    axes.axvline(0, color=INK, linewidth=1)
    names = short_names([group["name"] for group in groups])
    known = dict(zip((group["name"] for group in groups), names, strict=True))
    for number, (name, values) in enumerate(found):
        height = [i + (number - (len(found) - 1) / 2) * 0.7 / len(found) for i in range(len(shown))]
        x = [math.nan if values.get(entry) is None else values[entry] for entry in shown]
        style = {**_series(number), "linestyle": ""}
        axes.hlines(height, 0, x, color=style["color"], linewidth=1)
        axes.plot(x, height, **style, label=known[name])
    axes.set_yticks(range(len(shown)), [_short(name) for name in shown], fontsize=10)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.set_xlabel("gain in accuracy on the class, points")
    _legend(figure, axes)


def most_unlike(columns: list[dict[str, float | None]], most: int = MOST_CLASSES) -> list[str]:
    """The names under which the columns hold the largest numbers, in the columns' order."""
    names = list(dict.fromkeys(name for column in columns for name in column))
    largest = {name: max(abs(column.get(name) or 0) for column in columns) for name in names}
    chosen = set(sorted(names, key=lambda name: -largest[name])[:most])
    return [name for name in names if name in chosen]


@_plot
def soft_targets(figure: Plot, image: dict, temperatures: list[float]) -> None:
    """A teacher's likeliest classes for one image of `kd.results(...)["soft_targets"]`, a panel a temperature."""
    figure.set_size_inches(1 + 1.05 * len(temperatures), 0.6 + 0.26 * (len(image["classes"]) + 1))
    labels = [*(_short(name, 14) for name in image["classes"]), "others"]
    labels = labels[: len(image["probabilities"][0])]  # others where there are more classes
    places = range(len(labels))
    panels = figure.subplots(1, len(temperatures), sharey=True, squeeze=False).flat
    for axes, temperature, values in zip(panels, temperatures, image["probabilities"], strict=True):
        bars = axes.barh(places, values, color=COLOURS[0])
        axes.bar_label(bars, [f"{value:.2f}" for value in values], padding=2, fontsize=10)
        axes.set_xlim(0, 1.65)  # room for the number beside a bar of 1
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.set_title(f"T = {temperature:g}", loc="left")
    panels[0].set_yticks(places, labels, fontsize=10)
    panels[0].invert_yaxis()


def _short(name: str, most: int = 18) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def png(figure: Figure) -> bytes:
    """The figure as a PNG on white; the same bytes for a figure of the same numbers."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # of a name's script that the font lacks
        figure.savefig(buffer, format="png", dpi=150, bbox_inches="tight", metadata={"Software": None})
    return buffer.getvalue()


_FONT = "font-family: 'DejaVu Sans', sans-serif; "  # left out, so that the page's font is taken


def svg(figure: Figure, key: str, title: str, description: str) -> str:
    """The figure as SVG to be put into a page: text as text, in the page's colour, named for a screen reader.

    Args:
        key: in front of the ids in it, which must be the page's only ones.
        title, description: what a screen reader reads in its place.
    """
    buffer = io.StringIO()
    names = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", bbox_inches="tight", transparent=True, metadata=names)
    _, start, drawn = buffer.getvalue().partition("<svg ")
    drawn = re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "\ufffd", drawn)
    # Its style would hold for the whole page, and its groups have the same ids in each figure; others have the salt.
    drawn = re.sub(r"<(metadata|style).*?</\1>", "", drawn, flags=re.S)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn).replace(INK, "currentColor").replace(_FONT, "")
    head = f'role="img" aria-labelledby="{key}-title" aria-describedby="{key}-desc" style="stroke-linejoin: round" '
    words = f'<title id="{key}-title">{escape(title)}</title><desc id="{key}-desc">{escape(description)}</desc>'
    return start + head + drawn.replace(">", f">{words}", 1)
