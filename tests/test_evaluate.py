"""evaluate.py: the numbers of a run, the comparison with its teacher, the report."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import write_image

import kd
from kd import metrics
from kd.config import DataConfig
from kd.data import load_data


@pytest.fixture
def student_run(call, teacher_run, tmp_path):
    """A student that is larger than its teacher in multiply-adds and in parameters."""
    command = (
        "--config",
        "recipes/digits/kd.yaml",
        "--student",
        "light_nn",
        "--data.resize",
        32,
        "--data.num_train",
        200,
    )
    command = (*command, "--epochs", 2, "--teacher", teacher_run, "--output_dir", tmp_path / "student")
    result = call("distill", *command)
    assert result.status == 0, result.err
    return tmp_path / "student"


def test_numbers_are_those_of_the_network_on_the_test_split(call, teacher_run, student_run, tmp_path):
    result = call("evaluate", teacher_run, student_run, "--json", tmp_path / "r.json", "--report", tmp_path / "report")
    assert result.status == 0, result.err
    assert "top-1 %" in result.out
    teacher, student = json.loads((tmp_path / "r.json").read_text())
    data = load_data(DataConfig(source="digits", num_train=200))
    images = torch.from_numpy(data.test.store.images[data.test.places])
    labels = torch.from_numpy(data.test.labels)
    said = []
    for run, row in ((teacher_run, teacher), (student_run, student)):
        network = kd.load(run)
        with torch.no_grad():
            logits = network(images)
        said.append(logits)
        summary = json.loads((run / "summary.json").read_text())
        assert row["top1"] == summary["test_accuracy"] == pytest.approx(metrics.accuracy(logits, labels))
        assert row["top5"] == pytest.approx(metrics.accuracy(logits, labels, 5))
        assert row["nll"] == pytest.approx(metrics.negative_log_likelihood(logits, labels), rel=1e-5)
        assert row["calibration_error"] == pytest.approx(metrics.calibration_error(logits, labels), abs=1e-3)
        assert list(row["per_class"].values()) == pytest.approx(metrics.per_class_accuracy(logits, labels))
        assert row["confusion"] == metrics.confusion_matrix(logits, labels).tolist()
        assert row["num_images"] == 359
        assert row["bytes"] == (run / "model.safetensors").stat().st_size
        assert row["latency_ms"] > 0
    assert teacher["agreement"] is None
    assert student["agreement"] == pytest.approx(metrics.agreement(*said))
    assert (teacher["num_params"], student["num_params"]) == (221_962, 267_738)
    # light_nn on 32x32 has 5.0 against the teacher's 4.1 million multiply-adds: both notes are due
    assert sum("is not larger: 267,738 against 221,962 parameters" in note for note in student["notes"]) == 1
    assert len(student["notes"]) == (2 if student["multiply_adds"] >= teacher["multiply_adds"] else 1)
    assert all(f"note: {note}" in result.out for note in student["notes"])
    names = {path.name for path in (tmp_path / "report").iterdir()}
    assert {"report.md", "results.json", "accuracy_vs_cost.png"} < names
    assert sum(name.startswith("confusion_") for name in names) == 2
    for name in names:
        if name.endswith(".png"):
            assert (tmp_path / "report" / name).read_bytes()[:4] == b"\x89PNG"
            assert f"({name})" in (tmp_path / "report/report.md").read_text()


def test_a_student_whose_teacher_is_gone_is_measured_without_it(call, student_run, tmp_path):
    config = student_run / "config.yaml"
    config.write_text(config.read_text().replace("teacher: ", "teacher: gone/"))
    result = call("evaluate", student_run, "--json", tmp_path / "r.json")
    assert result.status == 0
    row = json.loads((tmp_path / "r.json").read_text())[0]
    assert row["agreement"] is None
    assert "cannot be compared with" in row["notes"][0]


def test_validation_split_and_other_images(call, teacher_run, tmp_path):
    call("evaluate", teacher_run, "--split", "val", "--json", tmp_path / "val.json", "--latency", "false")
    row = json.loads((tmp_path / "val.json").read_text())[0]
    assert row["num_images"] == 143
    assert row["top1"] == json.loads((teacher_run / "summary.json").read_text())["val_accuracy"]
    for split in ("train", "test"):
        for digit in range(10):
            write_image(tmp_path / "own" / split / str(digit) / "a.png", (25 * digit,) * 3, size=(8, 8))
    result = call("evaluate", teacher_run, "--source", tmp_path / "own", "--json", tmp_path / "own.json")
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "own.json").read_text())[0]["num_images"] == 10


def test_classes_are_matched_by_name(call, teacher_run, tmp_path):
    for digit in range(9):
        for split in ("train", "test"):
            write_image(tmp_path / "nine" / split / str(digit) / "a.png", (25 * digit,) * 3, size=(8, 8))
    result = call("evaluate", teacher_run, "--source", tmp_path / "nine")
    assert result.status == 2
    assert "different classes (9, ...)" in result.err
