"""Runs whose files were edited by hand, damaged or written by another program: one line, wherever they are read."""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest
import yaml
from conftest import assert_one_line
from refusing import _one_thread, contents, during, finished, out, runs, stopped, teacher, train  # noqa: F401

import kd
from kd.util.errors import UserError

pytestmark = pytest.mark.first_tier(1, every=5)

ODD = (5, {"a": 5}, None)
# (file, the field in it, the odd values that it may have)
FIELDS = [
    ("config.json", ("model",), ()),
    ("config.json", ("model_args",), ()),
    ("config.json", ("classes",), ()),
    ("config.json", ("preprocess",), ()),
    ("config.json", ("preprocess", "mean"), ()),
    ("config.json", ("preprocess", "resize"), (None, 5)),
    ("config.json", ("preprocess", "channels"), ()),
    ("config.json", ("preprocess", "source_size"), (None,)),
    ("config.json", ("sha256",), ()),
    ("config.yaml", ("data",), ()),
    ("config.yaml", ("data", "source"), ("x",)),
    ("config.yaml", ("data", "num_train"), (None, 5)),
    ("config.yaml", ("data", "val_fraction"), ()),
    ("config.yaml", ("data", "split_seed"), (5,)),
    ("config.yaml", ("losses",), ()),
    ("config.yaml", ("losses", 0), ()),
    ("config.yaml", ("losses", 0, "class_path"), ("x",)),
    ("config.yaml", ("losses", 0, "init_args"), (None, {"a": 5})),
    ("config.yaml", ("losses", 0, "init_args", "weight"), (5,)),
    ("config.yaml", ("epochs",), (5,)),
    ("config.yaml", ("output_dir",), ("x",)),
    ("config.yaml", ("seed",), (5,)),
    ("summary.json", ("seed",), (5,)),
    ("summary.json", ("seconds",), (5,)),
    ("summary.json", ("test_accuracy",), (5,)),
    ("summary.json", ("images",), ()),
    ("summary.json", ("num_params",), (5,)),
    ("summary.json", ("inputs",), (None, {"a": 5})),
    ("summary.json", ("inputs", "data"), ()),
    ("summary.json", ("inputs", "data", "test"), ()),
    ("summary.json", ("inputs", "data", "test", "looks"), ()),
]


def edit(file, field, value) -> None:
    """Put a value at a place of a JSON or YAML file."""
    load, dump = (json.loads, json.dumps) if file.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
    content = load(file.read_text())
    inner = content
    for name in field[:-1]:
        inner = inner[name]
    inner[field[-1]] = value
    file.write_text(dump(content))


CASES = [
    pytest.param(file, field, value, id=f"{file}:{'.'.join(map(str, field))}={value}")
    for file, field, known in FIELDS
    for value in ODD
    if not any(value == one and type(value) is type(one) for one in known)
]


@pytest.mark.parametrize(("file", "field", "value"), CASES)
def test_a_field_of_an_odd_type(call, teacher, file, field, value):
    edit(teacher / file, field, value)
    before = contents(teacher)
    result = call("evaluate", teacher, "--latency", "false")
    assert_one_line(result, str(teacher))
    if file == "config.json":
        with pytest.raises(UserError):
            kd.load(teacher)
    assert contents(teacher) == before


@pytest.mark.parametrize("name", ["config.json", "config.yaml", "summary.json"])
@pytest.mark.parametrize("content", ["", "[]", "5", "null", '"x"', "{}", "[" * 3000, "\x00", "NaN"])
def test_a_file_that_holds_something_else(call, teacher, name, content):
    (teacher / name).write_text(content)
    assert_one_line(call("evaluate", teacher, "--latency", "false"), name if name != "config.json" else str(teacher))
    if name != "config.json":
        assert not kd.runs(teacher.parent) or name == "summary.json"


@pytest.mark.parametrize("odd", [{"channels": 1, "mean": [0.5], "std": [0.5]}, {"resize": None, "crop": 28}])
def test_a_network_that_does_not_take_its_images(call, train, teacher, runs, out, tmp_path, odd):
    view = json.loads((teacher / "config.json").read_text())["preprocess"]
    edit(teacher / "config.json", ("preprocess",), {**view, "source_size": None, **odd})
    words = "mnist_teacher does not take the data's images (1x8x8): "
    assert_one_line(train("--teacher", teacher, script="distill"), words)
    assert_one_line(call("evaluate", teacher, "--latency", "false"), f"run '{teacher}' does not take the data's images")
    student = shutil.copytree(runs / "student", tmp_path / "student")
    edit(student / "config.yaml", ("teacher",), str(teacher))
    edit(student / "config.yaml", ("teacher_mean",), "logits")
    result = call("evaluate", student, "--latency", "false")
    assert result.status == 0, result.err
    assert f"its teacher {teacher} cannot be compared with: the teacher {words}" in result.err
    if "channels" in odd:
        result = call("kd.tools.predict", teacher, "docs/speed.png")
        assert_one_line(result, f"run '{teacher}' does not take images as its config.json prepares them: ")


# What is read when a run resumes


@pytest.mark.parametrize("content", ["", "[]", "5", '{"view table": 5}'])
def test_damaged_choices(train, during, teacher, out, content):
    arguments = ("--teacher", teacher, "--max_steps", 4, "--data.flip", "true", "--data.views_per_image", 2)
    during(lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert train(*arguments, script="distill").status == 128 + signal.SIGTERM
    assert (out / ".choices.json").is_file()
    (out / ".choices.json").write_text(content)
    assert_one_line(train(*arguments, script="distill"), str(out), ".choices.json")


@pytest.mark.parametrize("content", ["", "[]", "5", '{"tensorboard_id": 5}', '{"tensorboard_id": "../x"}'])
def test_a_damaged_record_of_the_tracker(train, stopped, out, content):
    stopped()
    (out / "tracker.json").write_text(content)
    assert_one_line(train("--max_steps", 4, "--report_to", "tensorboard"), str(out), "tracker.json", "delete the file")
    assert (out / "checkpoints").is_dir()


@pytest.mark.parametrize("bad", ["nonsense", "[]", "5", '{"step": "x"}', "\x00"])
def test_a_bad_line_of_the_metrics_is_left_out_and_said(train, stopped, out, bad):
    stopped("--report_to", "tensorboard")
    file = out / "metrics.jsonl"
    lines = file.read_text().splitlines()
    wanted = len(lines[0])
    file.write_text("\n".join([bad.ljust(wanted), *lines[1:]]) + "\n")
    result = train("--max_steps", 4, "--report_to", "tensorboard")
    assert result.status == 0, result.err
    assert "metrics.jsonl is damaged: line 1; it is left out of the tracker" in result.out


def test_a_shortened_record_of_metrics_is_not_continued_in_the_middle_of_a_line(train, stopped, out):
    stopped()
    file = out / "metrics.jsonl"
    file.write_bytes(file.read_bytes()[:-5])
    assert train("--max_steps", 4).status == 0
    steps = [json.loads(line)["step"] for line in file.read_text().splitlines()]
    assert steps == sorted(steps)
