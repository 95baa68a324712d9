"""The report of evaluate.py: its numbers are those of results.json, its pictures those of the images, its page works in
a browser, on a phone, in print, by keyboard and for a screen reader."""

from __future__ import annotations

import base64
import contextlib
import io
import itertools
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from browser import BINARY, Browser
from conftest import write_image
from PIL import Image

import kd
from kd.data import load_data
from kd.data.corrupt import STRENGTHS
from kd.measure import metrics
from kd.report import plots
from kd.report.tables import verdicts
from kd.run.config import DataConfig

SECTIONS = ["results", "comparison", "cost", "curves", "reliability", "classes", "speed", "confusion", "differences"]
SECTIONS += ["soft-targets", "corruptions", "features", "runs"]
KINDS = {
    "only_teacher_right": "only the teacher is right",
    "only_student_right": "only the student is right",
    "both_wrong": "both are wrong and differ",
}
pytestmark = pytest.mark.slow
EMPTY = ("meta", "img", "br", "link", "input")


class Node:
    """An element of a page: its tag, attributes, children, and the text in it."""

    def __init__(self, tag: str, attributes: dict):
        self.tag, self.attributes, self.children, self.parts = tag, attributes, [], []

    def walk(self):
        yield self
        for child in self.children:
            yield from child.walk()

    def all(self, *tags: str) -> list[Node]:
        return [node for node in self.walk() if node.tag in tags]

    @property
    def text(self) -> str:
        return "".join(part if isinstance(part, str) else part.text for part in self.parts)


class Page(HTMLParser):
    """A page as a tree; an element that is not closed in its turn is an error."""

    def __init__(self, text: str):
        super().__init__()
        self.root = Node("", {})
        self.open = [self.root]
        assert " %" not in text.partition("</style>")[2]  # where a line could break
        self.feed(text.replace("\N{NO-BREAK SPACE}", " "))
        assert self.open == [self.root]
        self.nodes = list(self.root.walk())
        self.by_id = {node.attributes["id"]: node for node in self.nodes if "id" in node.attributes}
        self.tables = {node.all("caption")[0].text: _grid(node) for node in self.root.all("table")}

    def handle_starttag(self, tag, attrs):
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        self.open[-1].parts.append(node)
        if tag not in EMPTY:
            self.open.append(node)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].parts.append(data)


def _grid(table: Node) -> list[list[str]]:
    return [[cell.text for cell in row.all("th", "td")] for row in table.all("tr")]


@pytest.fixture(scope="module")
def report(teacher_run, runs, tmp_path_factory):
    """What `evaluate.py --report` writes of a teacher and two seeds of two students: `folder`, `content`, `page`."""
    import evaluate

    folder = tmp_path_factory.mktemp("evaluated") / "report"
    arguments = [str(run) for run in (teacher_run, *runs)] + ["--corruption", "all", "--report", str(folder)]
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr("kd.measure.evaluation.BATCH_SIZES", (1, 8))
        patch.setattr("kd.measure.evaluation.STRENGTHS", {name: STRENGTHS[name] for name in ("blur", "contrast")})
        assert evaluate.main(arguments) == 0
    content = json.loads((folder / "results.json").read_text())
    page = Page((folder / "index.html").read_text())
    return SimpleNamespace(folder=folder, content=content, rows=content["runs"], groups=content["groups"], page=page)


@pytest.fixture(scope="module")
def data():
    return load_data(DataConfig(source="digits", num_train=200))


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if BINARY is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def short(report) -> dict[str, str]:
    """The names on the page: the folder that runs and groups share is left out."""
    names = [row["run"] for row in report.rows] + [group["name"] for group in report.groups]
    return dict(zip(names, plots.short_names(names), strict=True))


def test_the_tables_of_runs_equal_the_json(report):
    names, tables = short(report), report.page.tables
    expected = [["run", "top-1 %", "top-5 %", "NLL", "Brier", "ECE %", "agrees %", "parameters", "multiply-adds", "MB"]]
    for row in report.rows:
        agrees = "-" if row["agreement"] is None else f"{row['agreement']:.2f}"
        values = [f"{row['top1']:.2f}", f"{row['top5']:.2f}", f"{row['nll']:.4f}", f"{row['brier']:.4f}"]
        values += [f"{row['calibration_error']:.2f}", agrees, f"{row['num_params']:,}", f"{row['multiply_adds']:,}"]
        expected.append([names[row["run"]], *values, f"{row['bytes'] / 1e6:.2f}"])
    assert [line[:-1] for line in tables["Runs"]] == expected
    assert [line[-1] for line in tables["Runs"]] == ["ms/image", *(f"{row['latency_ms']:.2f}" for row in report.rows)]
    speed = [
        [names[row["run"]], str(part["batch_size"]), f"{part['p50_ms']:.2f}", f"{part['p95_ms']:.2f}"]
        + [f"{part['images_per_second']:,.0f}", f"{part['peak_memory_bytes'] / 1e6:.2f}"]
        for row in report.rows
        for part in row["speed"]
    ]
    assert tables["Speed and memory by batch size"][1:] == speed
    assert len(speed) == 10
    scaled = [
        [names[row["run"]], f"{row['temperature']:.3f}", f"{row['nll']:.4f}", f"{row['nll_scaled']:.4f}"]
        + [f"{row['calibration_error']:.2f}", f"{row['calibration_error_scaled']:.2f}"]
        for row in report.rows
    ]
    assert tables["With the temperature that is best on validation"][1:] == scaled
    cka = [[names[r["run"]], "features.3", "features.3", f"{r['cka'][0]['cka']:.4f}"] for r in report.rows if r["cka"]]
    assert tables["Linear CKA of tapped features"][1:] == cka
    assert len(cka) == 2
    for row, line in zip(report.rows, tables["Training"][1:], strict=True):
        assert line[0] == names[row["run"]]
        assert line[-2:] == [str(row["seed"]), f"{row['train_seconds']:,.0f}"]


def test_the_tables_of_groups_equal_the_json(report):
    names, tables = short(report), report.page.tables
    lines = tables["Groups of runs that differ only in their seed"][1:]
    assert [line[0] for line in lines] == [names[group["name"]] for group in report.groups]
    assert [line[4] for line in lines] == ["1", "2", "2"]
    teacher, alone, kd_group = report.groups
    assert kd_group["alone"] == alone["name"]
    means = []
    for group in report.groups:
        values = [row["top1"] for row in report.rows if row["run"] in group["runs"]]
        means.append(f"{np.mean(values):.2f}" + (f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""))
    assert [line[3] for line in lines] == means
    assert lines[2][1] == f"{kd_group['difference']:+.2f}"
    assert lines[2][2] == "{:+.2f} to {:+.2f}".format(*kd_group["interval"])
    p = sorted({f"{test['p']:.2g}" for test in kd_group["mcnemar"]}, key=float)
    assert lines[2][5] == " to ".join(p)
    assert lines[2][6] == ("-" if kd_group["gap_closed"] is None else f"{kd_group['gap_closed']:.0f}")
    assert [lines[i][k] for i in (0, 1) for k in (1, 2, 5, 6)] == ["-"] * 8
    cost = tables["Accuracy against cost"][1:]
    for group, line in zip(report.groups, cost, strict=True):
        assert line[0] == names[group["name"]]
        assert line[1] == f"{group['spread']['top1']['mean']:.2f}"
        assert line[3:] == [f"{group['multiply_adds']:,}", f"{group['num_params']:,}",
                            "yes" if group["front"]["multiply_adds"] else "no"]  # fmt: skip
    head, *classes = tables["Accuracy of each class in percent"]
    assert head == ["class", *(names[g["name"]] for g in report.groups), f"gain of {names[kd_group['name']]}"]
    for line in classes:
        mean = [
            np.mean([row["per_class"][line[0]] for row in report.rows if row["run"] in group["runs"]])
            for group in report.groups
        ]
        assert line[1:4] == [f"{value:.1f}" for value in mean]
        assert line[4] == f"{mean[2] - mean[1]:+.1f}"
    assert len(classes) == 10
    corrupted = {(line[0], line[1]): line[2:] for line in tables["Accuracy in percent"][1:]}
    for name, values in report.rows[0]["corruptions"].items():
        assert corrupted[names[teacher["name"]], name][:5] == [f"{value:.2f}" for value in values]


def test_the_verdict_comes_first_on_the_page_and_in_markdown(report):
    (sentence,) = verdicts([{**group, "name": short(report)[group["name"]],
                             "baseline": group["baseline"] and short(report)[group["baseline"]]}
                            for group in report.groups])  # fmt: skip
    heading = report.page.root.all("main")[0].children[0]
    verdict = report.page.root.all("main")[0].children[1]
    assert (heading.tag, verdict.text) == ("h1", sentence)
    assert (report.folder / "report.md").read_text().splitlines()[2].startswith("**no difference shown between ")


def test_curves_reliability_and_confusion_equal_their_sources(report):
    names, tables = short(report), report.page.tables
    logged = []
    for row in report.rows:
        with open(f"{row['run']}/metrics.jsonl") as file:
            for line in map(json.loads, file):
                if "epoch/loss" in line:
                    numbers = [f"{line['val/accuracy']:.2f}", f"{line['epoch/loss']:.4f}"]
                    logged.append([names[row["run"]], str(line["epoch"]), *numbers])
    assert tables["Learning curves"][1:] == logged
    assert len(logged) == 8 + 4 * 2
    firsts = [next(row for row in report.rows if row["run"] == group["runs"][0]) for group in report.groups]
    bins = [
        [names[row["run"]], f"{part['low']:.2f} to {part['high']:.2f}", f"{part['count']:,}"]
        + [f"{part['confidence']:.2f}", f"{part['accuracy']:.2f}"]
        for row in firsts
        for part in row["reliability"]
        if part["count"]
    ]
    assert tables["Reliability"][1:] == bins
    for row in firsts:
        grid = tables[f"Confusion of {names[row['run']]}: a line a label"]
        assert [[int(cell) for cell in line[1:]] for line in grid[1:]] == row["confusion"]
        assert sum(map(sum, row["confusion"])) == 359


def test_plots_say_their_numbers_as_text(report):
    drawn = {figure.all("title")[0].text: figure for figure in report.page.root.all("svg")}
    text = {title: figure.text for title, figure in drawn.items()}
    names = short(report)
    for group in report.groups:
        assert names[group["name"]] in text["Learning curves"]
        assert names[group["name"]] in text["Accuracy against multiply-adds"]
        row = next(row for row in report.rows if row["run"] == group["runs"][0])
        assert f"ECE {row['calibration_error']:.2f} %" in text["Reliability diagrams"]
        counts = [node.text.strip() for node in drawn[f"Confusion of {names[row['run']]}"].all("text")]
        for count in {count for line in row["confusion"] for count in line if count}:
            assert str(count) in counts
    for figure in drawn.values():
        assert figure.all("desc")[0].text


def test_differing_images_are_those_the_networks_differ_on(report, data, teacher_run, runs):
    images = torch.from_numpy(data.test.store.images[data.test.places])
    labels = torch.from_numpy(data.test.labels)
    with torch.no_grad():
        theirs, mine = kd.load(teacher_run)(images), kd.load(runs[2])(images)
    (part,) = report.content["differences"]
    assert part["run"] == str(runs[2])
    only_mine, only_theirs = metrics.only_one_right(mine, theirs, labels)
    sizes = {"only_teacher_right": len(only_theirs), "only_student_right": len(only_mine)}
    assert {kind: part["counts"][kind] for kind in sizes} == sizes
    assert sum(part["counts"].values()) == (mine.argmax(1) != theirs.argmax(1)).sum()
    said = "; ".join(f"{words}: {part['counts'][kind]}" for kind, words in KINDS.items())
    assert f"Images where {said}." in report.page.by_id["differences"].text
    cards = next(n for n in report.page.nodes if n.attributes.get("class") == "cards").all("li")
    assert 0 < len(cards) == len(part["images"]) <= 24
    for said, card in zip(part["images"], cards, strict=True):
        place = said["image"]
        for who, logits in (("student", mine), ("teacher", theirs)):
            sure, best = logits[place].softmax(0).max(0)
            assert said[who] == {"class": str(best.item()), "probability": pytest.approx(sure.item(), rel=1e-4)}
            assert f"{who}: {best}, {100 * said[who]['probability']:.0f} %" in card.text
        assert said["label"] == str(labels[place].item())
        assert {"only_teacher_right": place in only_theirs, "only_student_right": place in only_mine}.get(
            said["kind"], place not in (*only_mine, *only_theirs)
        )
        picture = card.all("img")[0]
        assert str(place) in picture.attributes["alt"]
        decoded = Image.open(io.BytesIO(base64.b64decode(picture.attributes["src"].partition(",")[2])))
        assert np.array_equal(np.asarray(decoded).transpose(2, 0, 1)[:1], images[place].numpy()[:1])


def test_soft_targets_are_the_teachers_softened_answers(report, data, teacher_run):
    (part,) = report.content["soft_targets"]
    assert part["teacher"] == [str(teacher_run)]
    assert part["temperatures"] == [1, 2, 4, 8]
    images = torch.from_numpy(data.test.store.images[data.test.places])
    with torch.no_grad():
        logits = kd.load(teacher_run)(images).double()
    assert len({said["label"] for said in part["images"]}) == len(part["images"]) == 4
    for said in part["images"]:
        grid = report.page.tables[f"Soft targets for image {said['image']}, {said['label']}"]
        assert grid[0] == ["class", "T = 1", "T = 2", "T = 4", "T = 8"]
        assert said["classes"][0] == said["label"]
        for column, temperature in enumerate(part["temperatures"]):
            values = (logits[said["image"]] / temperature).softmax(0)
            expected = [values[int(name)].item() for name in said["classes"]]
            expected.append(1 - sum(expected))
            assert said["probabilities"][column] == pytest.approx(expected, abs=1e-5)
            assert [line[1 + column] for line in grid[1:]] == [f"{p:.2f}" for p in said["probabilities"][column]]


def test_cards_name_the_file_and_two_classes_have_neither_top_5_nor_others(call, tmp_path, monkeypatch):
    for kind, colour in (("ants", (200, 40, 40)), ("bees", (40, 40, 200))):
        for split, count in (("train", 12), ("test", 4)):
            for i in range(count):
                write_image(tmp_path / f"own/{split}/{kind}/{i} 5 %.png", colour, size=(28, 28), seed=i)
    few = ("--data.source", tmp_path / "own", "--data.resize", 28, "--data.batch_size", 8, "--epochs", 1)
    command = ("train_teacher", "--config", "recipes/digits/teacher.yaml", *few, "--output_dir", tmp_path / "t")
    result = call(*command)
    assert result.status == 0, result.err
    command = ("distill", "--config", "recipes/digits/kd.yaml", *few, "--teacher", tmp_path / "t")
    assert call(*command, "--output_dir", tmp_path / "kd").status == 0
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    result = call("evaluate", tmp_path / "t", tmp_path / "kd", "--report", tmp_path / "report")
    assert result.status == 0, result.err
    assert not list((tmp_path / "here").iterdir())  # what the source holds is looked up in the cache
    assert "top-5" not in result.out
    page = Page((tmp_path / "report/index.html").read_text())
    assert page.tables["Runs"][0][1:3] == ["top-1 %", "NLL"]
    images = json.loads((tmp_path / "report/results.json").read_text())["soft_targets"][0]["images"]
    assert images
    for image in images:
        kind = Path(image["file"])
        assert kind.parts[:2] == ("test", image["label"])
        grid = page.tables[f"Soft targets for {image['file']}, {image['label']}"]
        assert [line[0] for line in grid[1:]] == image["classes"]
        assert sum(line[0] for line in image["probabilities"][:1]) + image["probabilities"][0][1] == pytest.approx(1)
    alts = [node.attributes["alt"] for node in page.root.all("img")]
    assert all(alt.startswith("test/") for alt in alts)


def test_the_page_holds_all_it_needs_and_is_well_formed(report):
    page, text = report.page, (report.folder / "index.html").read_text()
    ids = [node.attributes["id"] for node in page.nodes if "id" in node.attributes]
    assert len(ids) == len(set(ids))
    for node in page.nodes:
        assert node.tag not in ("script", "link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in node.attributes)
        for name in ("href", "xlink:href"):
            if name in node.attributes:
                assert node.attributes[name][0] == "#"
                assert node.attributes[name][1:] in ids
        assert node.attributes.get("src", "data:image/").startswith("data:image/")
        for name in ("aria-labelledby", "aria-describedby"):
            assert node.attributes.get(name, ids[0]) in ids
    assert not re.search(r"@import|url\((?!#)", text)
    assert "default-src 'none'" in text
    assert all(node.attributes["alt"] for node in page.root.all("img"))
    levels = [int(node.tag[1]) for node in page.root.all("h1", "h2", "h3", "h4")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    sections = page.root.all("section")
    assert [node.attributes["id"] for node in sections] == SECTIONS
    for table in page.root.all("table"):
        assert all(cell.attributes["scope"] for cell in table.all("th"))
        assert all(row.children[0].tag == "th" for row in table.all("tr"))


def test_names_are_text_on_the_page_not_code(call, runs, tmp_path):
    folder = tmp_path / "<script>alert(1) $x^2$ & 'more\""
    shutil.copytree(runs[2], folder)
    result = call("evaluate", folder, "--latency", "false", "--report", tmp_path / "report")
    assert result.status == 0, result.err
    page = Page((tmp_path / "report/index.html").read_text())
    assert not page.root.all("script")
    assert page.tables["Runs"][1][0] == folder.name
    assert any(folder.name in node.text for node in page.root.all("svg"))


def test_nothing_is_asked_of_the_network_and_links_lead_to_their_sections(browser, report):
    browser.requests.clear()
    browser.errors.clear()
    browser.open(report.folder / "index.html")
    assert [url for url in browser.requests if not url.startswith("data:")] == [
        (report.folder / "index.html").resolve().as_uri()
    ]
    links = browser.ask("[...document.querySelectorAll('nav a')].map(link => link.getAttribute('href'))")
    assert links == [f"#{key}" for key in SECTIONS]
    for link in links:
        browser.ask(f"document.querySelector('nav a[href=\"{link}\"]').click()")
        assert browser.ask("location.hash") == link
        top = browser.ask("document.querySelector(location.hash).getBoundingClientRect().top")
        end = browser.ask("innerHeight + scrollY >= document.documentElement.scrollHeight - 1")
        assert abs(top) < 2 or (end and 0 < top < 900)
    assert browser.ask("[...document.images].every(image => image.complete && image.naturalWidth > 0)")
    assert browser.errors == []


def test_what_the_browser_shows_equals_the_json(browser, report):
    browser.open(report.folder / "index.html")
    shown = browser.ask(
        "Object.fromEntries([...document.querySelectorAll('table')].map(table => [table.caption.textContent,"
        " [...table.rows].map(row => [...row.cells].map(cell => cell.textContent))]))"
    )
    assert json.loads(json.dumps(shown).replace("\\u00a0", " ")) == report.page.tables
    seen = browser.ask("[...document.querySelector('#results tbody').rows].map(row => row.innerText.split('\\t')[1])")
    assert seen == [f"{row['top1']:.2f}" for row in report.rows]


@pytest.mark.parametrize("width", [320, 390])
def test_on_a_phone_only_tables_scroll_sideways(browser, report, width):
    browser.open(report.folder / "index.html", width, 800)
    browser.ask("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert browser.ask("document.documentElement.scrollWidth") == width
    outside = browser.ask(
        "[...document.querySelectorAll('main *')].filter(node => !node.closest('.scroll, svg'))"
        ".concat([...document.querySelectorAll('figure > svg, .scroll')])"
        f".filter(node => node.getBoundingClientRect().right > {width} + 1).map(node => node.outerHTML.slice(0, 80))"
    )
    assert outside == []
    assert browser.ask("getComputedStyle(document.body).fontSize") == "16px"


def test_a_phone_shows_the_gains_interval_and_that_a_table_continues(browser, report):
    browser.open(report.folder / "index.html", 390, 800)
    cell = "document.querySelector('#comparison tbody tr:last-child td:nth-child(3)').getBoundingClientRect().right"
    assert browser.ask(cell) <= 390
    assert "scroll" in browser.ask("getComputedStyle(document.querySelector('#results .scroll')).backgroundAttachment")


def test_a_desktop_shows_two_sections_side_by_side(browser, report):
    browser.open(report.folder / "index.html", 1280, 900)
    for left, right in (("cost", "curves"), ("reliability", "classes")):
        top, beside = (browser.ask(f"document.getElementById('{key}').getBoundingClientRect().top + ' ' +"
                                   f"document.getElementById('{key}').getBoundingClientRect().left").split()
                       for key in (left, right))  # fmt: skip
        assert top[0] == beside[0]
        assert float(top[1]) < 100
        assert float(beside[1]) > 600


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_in_light_and_in_dark(browser, report, dark):
    browser.open(report.folder / "index.html", dark=dark)
    # What is behind is Canvas, a colour of the browser's; a probe gives it as numbers.
    colours = browser.ask(
        "(() => { const probe = document.body.appendChild(document.createElement('p'));"
        " probe.style.background = 'Canvas'; const of = node => getComputedStyle(node);"
        " const said = [of(probe).backgroundColor, of(document.querySelector('td')).color,"
        " of(document.querySelector('nav a')).color, of(document.querySelector('svg text')).fill];"
        " probe.remove(); return said; })()"
    )
    behind, *before = [_luminance(colour) for colour in colours]
    assert (behind < 0.1) == dark
    for value in before:
        assert (max(value, behind) + 0.05) / (min(value, behind) + 0.05) >= 4.5  # WCAG 2.2, 1.4.3
    shapes = [_luminance(f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:], 16)})") for c in plots.COLOURS]
    for value in shapes:
        assert (max(value, behind) + 0.05) / (min(value, behind) + 0.05) >= 3  # 1.4.11


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_keyboard_reaches_everything(browser, report):
    browser.open(report.folder / "index.html", 390, 800)
    wanted = browser.ask(
        "(() => { const all = [...document.querySelectorAll('a, summary, .scroll')]"
        ".filter(node => node.tagName === 'SUMMARY' || !node.closest('details'));"
        " all.forEach((node, i) => node.dataset.place = i); return all.length; })()"
    )
    reached = []
    for _ in range(wanted):
        browser.press("Tab")
        reached.append(browser.ask("document.activeElement.dataset.place"))
        if len(reached) == 1:
            assert browser.ask("document.activeElement.textContent") == "Skip to the content"
            assert browser.ask("document.activeElement.getBoundingClientRect().top") >= 0
            assert browser.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        if browser.ask("document.activeElement.tagName") == "SUMMARY":
            browser.press("Enter")
            assert browser.ask("document.activeElement.parentNode.open")
            browser.press("Enter")
    assert [int(place) for place in reached] == list(range(wanted))
    browser.ask("document.querySelector('#results .scroll').focus()")
    browser.press("ArrowRight")
    moved = "document.querySelector('#results .scroll').scrollLeft"
    assert browser.ask(
        f"new Promise(done => {{ const look = () => {moved} > 0 ? done(true) : setTimeout(look, 20); look(); }})"
    )


def test_a_screen_reader_finds_landmarks_labels_headers_and_pictures(browser, report):
    browser.open(report.folder / "index.html")
    browser.ask("document.querySelectorAll('details').forEach(part => part.open = true)")
    found: dict[str, list[str]] = {}
    for node in browser.send("Accessibility.getFullAXTree")["nodes"]:
        if not node["ignored"]:
            name = node.get("name", {}).get("value", "").replace("\N{NO-BREAK SPACE}", " ")
            found.setdefault(node["role"]["value"], []).append(name)
    assert found["RootWebArea"] == ["5 runs: test of digits, 359 images"]
    assert len(found["main"]) == 1
    assert found["navigation"] == ["Sections"]
    headings = [report.page.by_id[f"{key}-heading"].text for key in SECTIONS]
    assert set(headings) | set(report.page.tables) == set(found["region"])
    tables = found["table"]
    assert sorted(tables) == sorted(report.page.tables)
    assert {"top-1 %", "p95 ms", "T = 8"} <= set(found["columnheader"])
    assert {short(report)[row["run"]] for row in report.rows} <= set(found["rowheader"])
    pictures = [name for role in ("image", "img", "graphics-document") for name in found.get(role, [])]
    count = len(report.page.root.all("img", "svg"))
    assert len(pictures) == count
    assert all(pictures)
    assert all(name for role in ("link", "DisclosureTriangle", "heading") for name in found[role])


def test_print_shows_the_numbers_and_cuts_nothing_off(browser, report, tmp_path):
    browser.open(report.folder / "index.html")
    browser.pdf(tmp_path / "report.pdf")
    assert (tmp_path / "report.pdf").read_bytes().startswith(b"%PDF")
    browser.open(report.folder / "index.html", 720, 1000)  # A4 without margins
    browser.send("Emulation.setEmulatedMedia", media="print")
    assert browser.ask("getComputedStyle(document.querySelector('.skip')).display") == "none"
    hidden = browser.ask(
        "[...document.querySelectorAll('table')].filter(table => table.getBoundingClientRect().height < 10).length"
    )
    wide = browser.ask(
        "[...document.querySelectorAll('table, figure > svg')].filter(node => node.getBoundingClientRect().right > 720)"
        ".map(node => node.textContent.slice(0, 60))"
    )
    browser.send("Emulation.setEmulatedMedia", media="")
    assert hidden == 0
    assert wide == []
