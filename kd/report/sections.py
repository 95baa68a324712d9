"""The report's page, section by section: the content of results.json, the learning curves and some images."""

from __future__ import annotations

import math
from html import escape

from kd.measure.records import Record
from kd.report import plots
from kd.report.page import document, image, table
from kd.report.tables import (
    against,
    caption,
    cka_table,
    class_accuracy,
    class_gains,
    comparison_table,
    corruption_table,
    members,
    runs_table,
    shown,
    speed_table,
)

MOST_RUNS = 6  # whose confusion is shown
MOST_COLUMNS = plots.MOST_PANELS  # groups in the table of classes
MOST_LINES = 300  # of the learning curves' numbers
_KINDS = {
    "only_teacher_right": "only the teacher is right",
    "only_student_right": "only the student is right",
    "both_wrong": "both are wrong and differ",
}
_STYLE = """
figure { max-width: 34rem; }
#curves figure, #cost figure { max-width: 38rem; }
.cards > li { display: flex; gap: .75rem; }
.cards img { flex: none; height: 6rem; max-width: 45%; object-fit: contain; }
.cards p { margin: 0 0 .25rem; }
.plots :is(td, th) { padding: .25rem .4rem; }
.plots .scroll { font-size: .9rem; }
.soft { align-items: flex-start; display: flex; flex-wrap: wrap; gap: 0 1rem; break-inside: avoid; }
.soft img { height: 6rem; margin-top: 1rem; }
.soft figure { flex: 1 1 20rem; min-width: 0; }
@media print { .plots:has(section) { display: block; } #results table { font-size: 7.5pt; } }
"""


def report_page(content: dict, records: list[Record], pictures: dict[tuple[str, int], str]) -> str:
    """The page's HTML.

    Args:
        content: what `kd.report.tables.content` gives for results.json, with its `differences` and `soft_targets`.
        records: the folders of its runs, in the same order.
        pictures: data URIs by (run, position of the image), of the images that `content` names.
    """
    return _Report(content, records, pictures).page()


class _Report:
    def __init__(self, content: dict, records: list[Record], pictures: dict[tuple[str, int], str]):
        self.content, self.records, self.pictures = content, records, pictures
        self.rows, self.groups = content["runs"], content["groups"]
        runs, groups = [row["run"] for row in self.rows], [group["name"] for group in self.groups]
        short = plots.short_names([*runs, *groups])  # one folder for both, so that a name means one thing
        self.names = dict(zip([*runs, *groups], short, strict=True))
        self.number = 0

    def page(self) -> str:
        count = len(self.rows)
        title = f"{'One run' if count == 1 else f'{count} runs'}: {caption(self.rows)}"
        sections = [
            ("results", "Results", self.results()),
            ("comparison", "Comparison", self.comparison()),
            ("cost", "Accuracy against cost", self.cost()),
            ("curves", "Learning curves", self.curves()),
            ("reliability", "Reliability", self.reliability()),
            ("classes", "Classes", self.classes()),
            ("speed", "Speed and memory", self.speed()),
            ("confusion", "Confusion", self.confusion()),
            ("differences", "Where student and teacher differ", self.differences()),
            ("soft-targets", "What the teacher teaches", self.soft_targets()),
            ("corruptions", "Corrupted images", self.corruptions()),
            ("features", "Likeness of features", self.features()),
            ("runs", "How the runs were made", self.made()),
        ]
        sections = [section for section in sections if section[2]]
        links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in sections)
        body = [f"<h1>{escape(title)}</h1>", f'<nav aria-label="Sections"><ul>{links}</ul></nav>']
        for key, name, parts in sections:
            body.append('<div class="plots">' * (key == "cost"))  # four sections side by side where there is room
            body.append(f'<section id="{key}" aria-labelledby="{key}-heading">\n<h2 id="{key}-heading">{name}</h2>')
            body += [*parts, "</section>", "</div>" * (key == "classes")]
        return document(title, body, _STYLE)

    def short(self, name: str) -> str:
        return self.names.get(name, name)

    def named(self, caption: str, found: tuple[list[str], list[list[str]]], text: tuple[str, ...] = ()) -> str:
        """A table of runs or groups by their short names."""
        head, body = found
        return table(caption, [*map(self.short, head)], [[self.short(line[0]), *line[1:]] for line in body], text)

    def figure(self, plot, title: str, description: str, *numbers: str) -> str:
        """A plot with the tables of its numbers beneath."""
        self.number += 1
        drawn = plots.svg(plot, f"plot-{self.number}", title, description)
        more = f"<details><summary>{escape(title)}: the numbers</summary>\n{''.join(numbers)}</details>"
        return f"<figure>{drawn}\n<figcaption>{escape(description)}</figcaption>\n{more}</figure>"

    def results(self) -> list[str]:
        parts = [self.named("Runs", runs_table(self.rows))]
        folder = plots.shared_folder([row["run"] for row in self.rows]) if len(self.rows) > 1 else ""
        words = " ".join(_RESULTS.split())
        if self.rows[0]["speed"]:
            words += f" Latency on {self.rows[0]['device']}, one image, preprocessing included."
        parts.append(_p(words + (f" The runs are in {folder}." if folder else "")))
        notes = [note for part in (*self.rows, *self.groups) for note in part["notes"]]
        if notes:
            parts.append("<h3>Notes</h3>\n<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
        return parts

    def comparison(self) -> list[str]:
        if len(self.groups) == 1 and self.groups[0]["n"] == 1:
            return []
        groups = [{**g, "name": self.short(g["name"]), "baseline": g["baseline"] and self.short(g["baseline"])}
                  for g in self.groups]  # fmt: skip
        return [
            table("Groups of runs that differ only in their seed", *comparison_table(groups)),
            *map(_p, against(groups)),
            _p(" ".join(_COMPARISON.split())),
        ]

    def speed(self) -> list[str]:
        if not any(row["speed"] for row in self.rows):
            return []
        words = f"Of one batch on {self.rows[0]['device']}, preprocessing included: the median time and the 95th "
        words += "percentile; the memory is that of the network and of what it computes."
        return [self.named("Speed and memory by batch size", speed_table(self.rows)), _p(words)]

    def cost(self) -> list[str]:
        body = [
            [g["name"], shown(g["spread"]["top1"]["mean"], ".2f"), f"{plots.error(members(self.rows, g)):.2f}",
             f"{g['multiply_adds']:,}", f"{g['num_params']:,}", "yes" if g["front"]["multiply_adds"] else "no"]
            for g in self.groups
        ]  # fmt: skip
        words = "Bars: one standard deviation over seeds, of a single run one standard error over its images."
        if len(self.groups) > plots.MOST_NAMED:
            words += " Only the groups on the Pareto front are named."
        head = ["runs", "top-1 %", "bar", "multiply-adds", "parameters", "on the front"]
        numbers = self.named("Accuracy against cost", (head, body))
        return [self.figure(plots.accuracy_against_cost(self.rows), "Accuracy against multiply-adds", words, numbers)]

    def curves(self) -> list[str]:
        if not any(record.epochs for record in self.records):
            return []
        every = math.ceil(sum(len(record.epochs) for record in self.records) / MOST_LINES)
        body = [
            [record.name, str(row["epoch"]), shown(row.get("val/accuracy"), ".2f"), shown(row["epoch/loss"], ".4f")]
            for record in self.records
            for i, row in enumerate(record.epochs, 1)
            if i % every == 0 or i == len(record.epochs)
        ]
        words = "Losses of different objectives cannot be compared."
        if len({record.experiment for record in self.records}) > plots.MOST_NAMED:
            words += " There are too many runs to name each line."
        words += f" The numbers are those of every {every} epochs." if every > 1 else ""
        numbers = self.named("Learning curves", (["run", "epoch", "validation accuracy %", "training loss"], body))
        return [self.figure(plots.learning_curves(self.records), "Learning curves", words, numbers)]

    def chosen(self, most: int) -> tuple[list[dict], list[str]]:
        """The first run of each group, of the first groups, and a sentence if that is not all."""
        rows = [members(self.rows, group)[0] for group in self.groups][:most]
        some = len(rows) < len(self.rows)
        return rows, [_p(f"Shown for {len(rows)} of {len(self.rows)} runs; all are in results.json.")] if some else []

    def reliability(self) -> list[str]:
        rows, words = self.chosen(plots.MOST_PANELS)
        body = [
            [row["run"], f"{part['low']:.2f} to {part['high']:.2f}", f"{part['count']:,}",
             shown(part["confidence"], ".2f"), shown(part["accuracy"], ".2f")]
            for row in rows
            for part in row["reliability"]
            if part["count"]
        ]  # fmt: skip
        numbers = self.named("Reliability", (["run", "bin", "images", "confidence %", "accuracy %"], body))
        scaled = [
            [row["run"], *(shown(row[key], form) for key, form in _SCALED.values())]
            for row in self.rows
            if row["temperature"] is not None
        ]
        description = "Accuracy against confidence; on the dashed line a network is as often right as it is sure. "
        description += "A mark's area is its share of the images."
        parts = [*words, self.figure(plots.reliability(rows), "Reliability diagrams", description, numbers)]
        if scaled:
            parts.append(self.named("With the temperature that is best on validation", (["run", *_SCALED], scaled)))
        return parts

    def classes(self) -> list[str]:
        means, gained = class_accuracy(self.rows, self.groups), class_gains(self.rows, self.groups)
        shown_groups = list(means)[:MOST_COLUMNS]
        every = list(dict.fromkeys(name for group in shown_groups for name in means[group]))
        apart = {}
        for name in every:
            values = [means[g][name] for g in shown_groups if means[g].get(name) is not None]
            apart[name] = max(values) - min(values) if values else 0.0
        names = plots.most_unlike([apart]) if len(every) > plots.MOST_CLASSES else every
        words = []
        if len(names) < len(every) or len(shown_groups) < len(means):
            some = f"{len(names)} of {len(every)} classes, those on which the runs are most unlike"
            words = [_p(f"Shown are {some}, and {len(shown_groups)} of {len(means)} groups; all are in results.json.")]
        columns = [(group, means[group], ".1f", "") for group in shown_groups]
        columns += [(group, gained[group], "+.1f", "gain of ") for group in shown_groups if group in gained]
        body = [[name, *(shown(values.get(name), form) for _, values, form, _ in columns)] for name in names]
        head = ["class", *(f"{prefix}{self.short(group)}" for group, _, _, prefix in columns)]
        numbers = table("Accuracy of each class in percent", head, body)
        if not gained:
            return [*words, numbers]
        title, description = "Gains by class", "What each distilled group gains over its student alone, in points."
        plot = plots.class_gains(self.rows, self.groups)
        return [*words, self.figure(plot, title, description, numbers)]

    def confusion(self) -> list[str]:
        rows, words = self.chosen(MOST_RUNS)
        if any(len(row["per_class"]) > plots.MOST_CLASSES for row in rows):
            some = f"Of more than {plots.MOST_CLASSES} classes only the most frequent mistakes are shown"
            words.append(_p(f"{some}: label → prediction and how many images."))
        figures = []
        for row in rows:
            name, classes = self.short(row["run"]), list(row["per_class"])
            pairs = row["confused"][: plots.MOST_CLASSES]
            body = [[f"{pair['label']} → {pair['predicted']}", f"{pair['count']:,}"] for pair in pairs]
            numbers = [table(f"Most frequent mistakes of {name}", ["label → predicted", "images"], body)]
            if len(classes) <= plots.MOST_CLASSES:
                body = [[label, *map(str, line)] for label, line in zip(classes, row["confusion"], strict=True)]
                numbers.append(table(f"Confusion of {name}: a line a label", ["label", *classes], body))
            description = f"{name}: {row['top1']:.2f} % of {row['num_images']:,} right."
            figures.append(self.figure(plots.confusion(row), f"Confusion of {name}", description, *numbers))
        return [*words, '<div class="plots">', *figures, "</div>"]

    def differences(self) -> list[str]:
        parts = []
        for part in self.content["differences"]:
            counts = [f"{words}: {part['counts'][kind]:,}" for kind, words in _KINDS.items()]
            parts.append(f"<h3>{escape(self.short(part['run']))}</h3>\n{_p('Images where ' + '; '.join(counts) + '.')}")
            cards = []
            for said in part["images"]:
                picture = image(self.pictures[part["run"], said["image"]], f"image {said['image']}, {said['label']}")
                lines = [f"{who}: {_sure(said[who])}" for who in ("student", "teacher")]
                cards.append(
                    f"<li>{picture}<div><p><strong>{escape(said['label'])}</strong> (image {said['image']}): "
                    f"{_KINDS[said['kind']]}</p>{''.join(map(_p, lines))}</div></li>"
                )
            parts.append(f'<ol class="cards">{"".join(cards)}</ol>' if cards else "")
        if parts:
            taught = {row["experiment"] for row in self.rows if row["agreement"] is not None}
            words = "For the first run of each distilled group, of each kind the images that both are surest of."
            left = len(taught) - len(self.content["differences"])
            parts.insert(0, _p(words + (f" {left} more distilled groups are not shown." if left > 0 else "")))
        return parts

    def soft_targets(self) -> list[str]:
        parts = []
        for part in self.content["soft_targets"]:
            parts.append(f"<h3>{escape(' + '.join(map(self.short, part['teacher'])))}</h3>")
            parts.append('<div class="plots">')
            for said in part["images"]:
                temperatures = [f"T = {value:g}" for value in part["temperatures"]]
                values = zip(*said["probabilities"], strict=True)
                body = [[name, *(f"{p:.2f}" for p in line)]
                        for name, line in zip((*said["classes"], "others"), values, strict=True)]  # fmt: skip
                title = f"Soft targets for image {said['image']}, {said['label']}"
                picture = image(self.pictures[part["run"], said["image"]], f"image {said['image']}, {said['label']}")
                likeliest = ", ".join(f"{line[0]} {line[1]}" for line in body[:2])
                plot = plots.soft_targets(said, part["temperatures"])
                description = f"{said['label']}; at {temperatures[0]} the teacher says {likeliest}."
                numbers = table(title, ["class", *temperatures], body)
                parts.append(f'<div class="soft">{picture}{self.figure(plot, title, description, numbers)}</div>')
            parts.append("</div>")
        if parts:
            words = "The teacher's probabilities, softened by the temperature T, for images that it gets right and of "
            words += "which it is most nearly 80 % sure. A high temperature shows which classes it finds alike."
            parts.insert(0, _p(words))
        return parts

    def corruptions(self) -> list[str]:
        if "corruptions" not in self.rows[0]:
            return []
        return [self.named("Accuracy in percent", corruption_table(self.rows, self.groups), ("corruption",))]

    def features(self) -> list[str]:
        if not any(row["cka"] for row in self.rows):
            return []
        text = ("student's module", "teacher's module")
        return [self.named("Linear CKA of tapped features", cka_table(self.rows), text)]

    def made(self) -> list[str]:
        head = ["run", "network", "objective", "teacher", "data", "epochs", "seed", "seconds"]
        body = []
        for record, row in zip(self.records, self.rows, strict=True):
            teacher = row["teacher"] or []
            teacher = [teacher] if isinstance(teacher, str) else teacher
            words = [record.network, record.objective, " + ".join(map(self.short, teacher)) or "-"]
            body.append([row["run"], *words, record.config["data"]["source"], str(record.config.get("epochs")),
                         str(row["seed"]), shown(row["train_seconds"], ",.0f")])  # fmt: skip
        versions = ", ".join(f"{name} {number}" for name, number in self.rows[0]["versions"].items())
        text = ("network", "objective", "teacher", "data")
        return [self.named("Training", (head, body), text), _p(f"Measured with {versions}.")]


_RESULTS = """
NLL in nats; Brier is the squared error over all classes; ECE is the expected calibration error; agrees is how often
student and teacher name the same class.
"""
_COMPARISON = """
Accuracy is the mean ± standard deviation over n seeds. The interval is a paired bootstrap over test images and runs:
where it holds 0, nothing was shown, and that of a few runs is too narrow. McNemar p is the exact test of run against
run on the same images, the smallest to the largest. Gap closed is the share of the teacher's lead over the student
alone. On the Pareto front are the groups that no other beats in accuracy or cost without losing in the other.
"""
_SCALED = {
    "temperature": ("temperature", ".3f"),
    "NLL": ("nll", ".4f"),
    "NLL with it": ("nll_scaled", ".4f"),
    "ECE %": ("calibration_error", ".2f"),
    "ECE % with it": ("calibration_error_scaled", ".2f"),
}


def _p(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def _sure(said: dict) -> str:
    return f"{said['class']}, {100 * said['probability']:.0f} %"
