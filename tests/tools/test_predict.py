"""python -m kd.predict: what runs say about images, in four forms, and what happens with what is no image."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from conftest import assert_one_line, write_image
from PIL import Image

import kd
from kd.report.tables import short_names

COMMAND = "kd.tools.predict"


@pytest.fixture
def pictures(tmp_path):
    """A folder of digits, one of them in a subfolder, beside files that are no pictures."""
    from sklearn.datasets import load_digits

    digits, folder = load_digits(), tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b <&> b.png", "more/c.PNG")):
        pixels = np.round(digits.images[i] * (255 / 16)).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def other_run(teacher_run, tmp_path):
    """A copy of a run in the form that is published: no more than weights and config.json."""
    folder = tmp_path / "other"
    folder.mkdir()
    for name in ("model.safetensors", "config.json"):
        shutil.copy(teacher_run / name, folder)
    return folder


def test_all_forms_say_what_the_network_says(call, teacher_run, other_run, pictures):
    files = [pictures / name for name in ("a.png", "b <&> b.png", "more/c.PNG")]
    expected = kd.load(teacher_run).predict(files, top=2)
    arguments = (teacher_run, other_run, pictures, "--top", 2)

    said = call(COMMAND, *arguments, "--format", "json")
    assert said.status == 0, said.err
    content = json.loads(said.out)
    assert [image["image"] for image in content["images"]] == [str(file) for file in files]
    assert content["left_out"] == []
    for image, pairs in zip(content["images"], expected, strict=True):
        assert [part["run"] for part in image["predictions"]] == [str(teacher_run), str(other_run)]
        for part in image["predictions"]:
            assert [(entry["class"], entry["probability"]) for entry in part["classes"]] == pairs
            assert 0 < part["ms"] < 10_000

    rows = list(csv.DictReader(io.StringIO(call(COMMAND, *arguments, "--format", "csv").out)))
    assert len(rows) == 3 * 2 * 2
    assert [(row["class"], float(row["probability"])) for row in rows[:2]] == expected[0]
    assert [row["rank"] for row in rows[:4]] == ["1", "2", "1", "2"]

    *above, head, first, second, third, last = call(COMMAND, *arguments).out.splitlines()
    folder = above[0].removeprefix("in ").removesuffix(":") if above else "."
    assert head.split() == ["image", *(word for run in short_names([str(teacher_run), str(other_run)])
                                       for word in (run, "ms"))]  # fmt: skip
    for line, file, pairs in zip((first, second, third), files, expected, strict=True):
        assert line.startswith(os.path.relpath(file, folder) if above else str(file))
        assert line.count(", ".join(f"{name} {100 * p:.1f} %" for name, p in pairs)) == 2
    assert last == "all runs name the same class for 3 of 3 images"


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text = [], [], ""
        self.feed(text.replace("\N{NO-BREAK SPACE}", " "))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f"{data}\n"

    def all(self, name: str) -> list[dict]:
        return [attributes for tag, attributes in self.tags if tag == name]


def test_the_page_needs_nothing_else_and_equals_the_json(call, teacher_run, other_run, pictures, tmp_path):
    write_image(pictures / "photo.jpg", (200, 10, 10), size=(640, 480))
    (pictures / "broken.jpg").write_bytes(b"no image")
    file = tmp_path / "new folder" / "page.html"
    command = (COMMAND, teacher_run, pictures, other_run, "--html", file, "--format", "json")
    result = call(*command)
    assert result.status == 1  # something was left out
    content, text = json.loads(result.out), file.read_text()
    assert f"wrote {file}" in result.err
    page = Page(text)
    assert page.open == []
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    assert not re.search(r"https?:|url\(|@import|<script|<link", text)
    shown = {image["alt"].split(";")[0]: image for image in page.all("img")}
    least_sure_first = sorted(
        content["images"], key=lambda i: min(p["classes"][0]["probability"] for p in i["predictions"])
    )
    assert list(shown) == [os.path.relpath(image["image"], pictures) for image in least_sure_first]
    names = dict(zip([str(teacher_run), str(other_run)], short_names([str(teacher_run), str(other_run)]), strict=True))
    for image in content["images"]:
        tag = shown[os.path.relpath(image["image"], pictures)]
        kind, encoded = re.fullmatch(r"data:image/(\w+);base64,(.*)", tag["src"]).groups()
        picture = Image.open(io.BytesIO(base64.b64decode(encoded)))
        assert picture.format.lower() == kind == ("jpeg" if "photo" in image["image"] else "png")
        assert max(picture.size) <= 240
        for part in image["predictions"]:
            best = part["classes"][0]
            assert f"{names[part['run']]}: {best['class']}, {100 * best['probability']:.0f} %" in tag["alt"]
    percents = [f"{100 * p['classes'][0]['probability']:.1f} %" for i in least_sure_first for p in i["predictions"]]
    assert re.findall(r"[\d.]+ %", page.text) == percents
    assert f"{pictures / 'broken.jpg'}: not an image" in page.text
    assert "The runs name different classes for 0." in page.text


def test_where_runs_differ_the_page_leads_there(teacher_run, pictures):
    from kd.tools.predict import page, predict

    one, two = kd.load(teacher_run), kd.load(teacher_run)
    two.classes = [f"<{name}>" for name in two.classes]
    predictions, unreadable = predict({"one": one, "two": two}, [pictures / "a.png"], top=1, thumbnails=True)
    assert not unreadable
    shown = Page(page(["one", "two"], predictions, []).decode())
    assert {"href": "#image-1"} in shown.all("a")
    assert "image-1" in [tag.get("id") for tag in shown.all("li")]
    assert "The runs differ." in shown.text
    assert f"<{one.predict([pictures / 'a.png'])[0][0][0]}>" in shown.text


def test_the_page_begins_with_what_runs_differ_on_and_then_with_the_least_sure():
    from kd.tools.predict import Prediction, page

    def prediction(image: str, one: str, other: str, p: float) -> Prediction:
        best = {"runs/a": [(one, p)], "runs/b": [(other, 0.9)]}
        return Prediction(f"photos/{image}", best, {"runs/a": 1.0, "runs/b": 1.0}, "data:image/png;base64,")

    predictions = [prediction("sure", "x", "x", 0.8), prediction("unsure", "x", "x", 0.5)]
    predictions += [prediction("differ", "x", "y", 0.7), prediction("torn", "x", "y", 0.6)]
    shown = Page(page(["runs/a", "runs/b"], predictions, []).decode())
    assert [image["alt"].split(";")[0] for image in shown.all("img")] == ["torn", "differ", "unsure", "sure"]
    assert "photos/sure" not in shown.text
    assert shown.all("img")[0]["alt"] == "torn; predicted a: x, 60 %; b: y, 90 %"


def test_accuracy_is_said_where_folders_are_classes(call, teacher_run, pictures, tmp_path):
    (pictures / "0").mkdir()
    (pictures / "1").mkdir()
    shutil.copy(pictures / "a.png", pictures / "0/a.png")  # a nought
    shutil.copy(pictures / "a.png", pictures / "1/a.png")
    predicted = kd.load(teacher_run).predict([pictures / "a.png"])[0][0][0]
    words = f"{100 * (predicted in '01') / 2:.1f} % ({int(predicted in '01')})"
    result = call(COMMAND, teacher_run, pictures, "--html", tmp_path / "p.html")
    assert result.out.splitlines()[-1] == f"right of 2 whose folder is a class: run {words}"
    assert f"Right of 2 whose folder is a class: run {words}." in Page((tmp_path / "p.html").read_text()).text
    content = json.loads(call(COMMAND, teacher_run, pictures, "--format", "json").out)
    assert sorted(str(image["label"]) for image in content["images"]) == ["0", "1", "None", "None", "None"]


def test_what_is_no_image_is_left_out_in_one_line_each_and_nothing_else_is(call, teacher_run, pictures, tmp_path):
    (pictures / "broken.png").write_bytes(b"no image")
    whole = (pictures / "a.png").read_bytes()
    (pictures / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty").mkdir()
    result = call(COMMAND, teacher_run, tmp_path / "gone", pictures, tmp_path / "empty", "--format", "csv")
    assert result.status == 1
    assert len(list(csv.DictReader(io.StringIO(result.out)))) == 3
    lines = result.err.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("left out: ") for line in lines)
    for name, why in (
        ("gone", "no such file"),
        ("empty", "no images"),
        ("broken.png", "not an image"),
        ("cut.png", ""),
    ):
        assert any(name in line and why in line for line in lines)


def test_a_file_named_is_read_whatever_its_name_is(call, teacher_run, pictures, tmp_path):
    shutil.copy(pictures / "a.png", pictures / "picture")
    result = call(COMMAND, teacher_run, pictures / "picture")
    assert result.status == 0
    assert str(pictures / "picture") in result.out
    try:
        shutil.copy(pictures / "a.png", os.fsencode(pictures) + b"/caf\xe9.png")  # no UTF-8
    except OSError:
        return  # this disk refuses such names
    result = call(COMMAND, teacher_run, pictures, "--html", tmp_path / "p.html")
    assert result.status == 0
    assert "caf\N{REPLACEMENT CHARACTER}.png" in result.out


def test_mistakes_are_one_line(call, teacher_run, pictures, tmp_path):
    picture = pictures / "a.png"
    before = picture.read_bytes()
    assert_one_line(call(COMMAND, picture), "run ", "no such folder")
    assert_one_line(call(COMMAND, tmp_path / "gone", picture), "gone", "no such folder")
    assert_one_line(call(COMMAND, teacher_run), "no image is given")
    assert_one_line(call(COMMAND, teacher_run, tmp_path / "gone"), "gone", "no such file or folder")
    assert_one_line(call(COMMAND, teacher_run, picture, "--top", 0), "--top", "PositiveInt", "'0'")
    assert_one_line(call(COMMAND, teacher_run, picture, "--format", "jsno"), "jsno", "'json'")
    assert_one_line(call(COMMAND, teacher_run, picture, "--html", picture), "a.png", ".html")
    assert_one_line(call(COMMAND, teacher_run, picture, "--tpo", 3), "--tpo", "--help")
    assert picture.read_bytes() == before
