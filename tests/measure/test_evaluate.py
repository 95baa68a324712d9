"""evaluate.py: the numbers of a run, the comparison with its teacher, the report."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import os
import runpy
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_one_line, write_image
from PIL import Image

import kd
from kd.data import load_data
from kd.data.corrupt import STRENGTHS, corrupt
from kd.data.decode import read_image
from kd.measure import metrics
from kd.run.config import DataConfig


@pytest.fixture
def student_run(call, teacher_run, tmp_path):
    """A student that is as large as its teacher, in parameters and in multiply-adds."""
    command = ("--config", "recipes/digits/kd.yaml", "--student", "mnist_teacher", "--data.num_train", 200)
    command = (*command, "--epochs", 2, "--teacher", teacher_run, "--output_dir", tmp_path / "student")
    result = call("distill", *command)
    assert result.status == 0, result.err
    return tmp_path / "student"


def test_on_train_only_the_images_whose_label_was_read_count(call, teacher_run, tmp_path):
    few = ("--config", "recipes/digits/few_labels.yaml", "--data.num_labels", 20, "--max_steps", 2)
    assert call("distill", *few, "--teacher", teacher_run, "--output_dir", tmp_path / "few").status == 0
    result = call("evaluate", tmp_path / "few", "--split", "train", "--latency", "false", "--json", tmp_path / "r.json")
    assert result.status == 0, result.err
    (row,) = json.loads((tmp_path / "r.json").read_text())["runs"]
    network, known = kd.load(tmp_path / "few"), load_data(DataConfig(num_train=20)).train
    with torch.no_grad():
        logits = network(torch.from_numpy(known.store.images[known.places]))
    assert sum(part["count"] for part in row["reliability"]) == 20
    assert row["top1"] == pytest.approx(metrics.accuracy(logits, torch.from_numpy(known.labels)))


def test_what_is_said_of_the_same_images_is_said_once(call, teacher_run, tmp_path):
    arguments = ("--config", "recipes/digits/student.yaml", "--data.num_train", 100, "--max_steps", 1)
    assert call("train_teacher", *arguments, "--output_dir", tmp_path / "other").status == 0
    result = call("evaluate", teacher_run, tmp_path / "other", "--latency", "false")
    assert result.status == 0, result.err
    lines = [line for line in result.err.splitlines() if line.startswith("data: ")]
    assert len(lines) == len(set(lines)) == 1


@pytest.mark.slow
def test_numbers_are_those_of_the_network_on_the_test_split(call, teacher_run, student_run, tmp_path):
    result = call("evaluate", teacher_run, student_run, "--json", tmp_path / "r.json", "--report", tmp_path / "report")
    assert result.status == 0, result.err
    assert "top-1 %" in result.out
    teacher, student = json.loads((tmp_path / "r.json").read_text())["runs"]
    data = load_data(DataConfig(source="digits", num_train=200))
    images = torch.from_numpy(data.test.store.images[data.test.places])
    labels = torch.from_numpy(data.test.labels)
    val = torch.from_numpy(data.val.store.images[data.val.places])
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
        assert row["brier"] == pytest.approx(metrics.brier_score(logits, labels), rel=1e-5)
        assert row["calibration_error"] == pytest.approx(metrics.calibration_error(logits, labels), abs=1e-3)
        assert [part["count"] for part in row["reliability"]] == [
            part["count"] for part in metrics.reliability(logits, labels)
        ]
        assert row["wrong"] == [i for i in range(359) if logits[i].argmax() != labels[i]]
        with torch.no_grad():
            temperature = metrics.fit_temperature(network(val), torch.from_numpy(data.val.labels))
        assert row["temperature"] == pytest.approx(temperature, rel=1e-4)
        scaled = logits.double() / temperature
        assert row["nll_scaled"] == pytest.approx(metrics.negative_log_likelihood(scaled, labels), rel=1e-4)
        assert row["nll_scaled"] < row["nll"]
        assert row["calibration_error_scaled"] == pytest.approx(metrics.calibration_error(scaled, labels), abs=0.2)
        assert list(row["per_class"].values()) == pytest.approx(metrics.per_class_accuracy(logits, labels))
        assert row["confusion"] == metrics.confusion_matrix(logits, labels).tolist()
        assert row["num_images"] == 359
        assert row["bytes"] == (run / "model.safetensors").stat().st_size
        assert row["latency_ms"] == row["speed"][0]["p50_ms"] > 0
        assert [part["batch_size"] for part in row["speed"]] == [1, 8, 64]
        for part in row["speed"]:
            assert part["p50_ms"] <= part["p95_ms"]
            assert part["images_per_second"] > 0
            assert part["peak_memory_bytes"] > 4 * row["num_params"]
    assert teacher["agreement"] is None
    assert student["agreement"] == pytest.approx(metrics.agreement(said[1], said[0]))
    assert student["agreement_top5"] == pytest.approx(metrics.agreement(said[1], said[0], top=5))
    assert student["teacher_top1"] == teacher["top1"]
    assert student["kl"] == pytest.approx(metrics.kl_divergence(*said), rel=1e-4)
    only = metrics.only_one_right(said[1], said[0], labels)
    assert (student["only_student_right"], student["only_teacher_right"]) == only
    assert set(student["wrong"]) - set(teacher["wrong"]) == set(only[1])
    assert teacher["num_params"] == student["num_params"] == 221_962
    larger, dearer = student["notes"]
    assert "is not larger: 221,962 against 221,962 parameters" in larger
    assert "is not more expensive: 0.00754 against 0.00754 billion multiply-adds" in dearer
    assert all(f"note: {note}" in result.err for note in student["notes"])
    report = tmp_path / "report"
    names = {"index.html", "report.md", "results.json", "accuracy_vs_cost.png"}
    assert {path.name for path in report.iterdir()} == names
    assert (report / "accuracy_vs_cost.png").read_bytes()[:4] == b"\x89PNG"
    assert "(accuracy_vs_cost.png)" in (report / "report.md").read_text()
    content = json.loads((report / "results.json").read_text())
    assert content["runs"] == [teacher, student]
    differing = (said[0].argmax(1) != said[1].argmax(1)).sum().item()
    assert sum(content["differences"][0]["counts"].values()) == differing
    page = (report / "index.html").read_text()
    for row in (teacher, student):
        cells = (f"{row['top1']:.2f}", f"{row['nll']:.4f}", f"{row['num_params']:,}", f"{row['multiply_adds']:,}")
        assert all(f"<td>{cell}</td>" in page for cell in cells)
    assert all(f'<section id="{key}"' in page for key in ("cost", "curves", "reliability", "confusion", "differences"))


@pytest.mark.slow
def test_a_student_whose_teacher_is_gone_is_measured_without_it(call, student_run, tmp_path):
    config = student_run / "config.yaml"
    config.write_text(config.read_text().replace("teacher: ", "teacher: gone/"))
    result = call("evaluate", student_run, "--json", tmp_path / "r.json", "--latency", "false")
    assert result.status == 0
    row = json.loads((tmp_path / "r.json").read_text())["runs"][0]
    assert row["agreement"] is None
    assert "cannot be compared with" in row["notes"][0]


def test_validation_split_and_other_images(call, teacher_run, tmp_path):
    call("evaluate", teacher_run, "--split", "val", "--json", tmp_path / "val.json", "--latency", "false")
    row = json.loads((tmp_path / "val.json").read_text())["runs"][0]
    assert row["num_images"] == 143
    assert row["top1"] == json.loads((teacher_run / "summary.json").read_text())["val_accuracy"]
    for split in ("train", "test"):
        for digit in range(10):
            write_image(tmp_path / "own" / split / str(digit) / "a.png", (25 * digit,) * 3, size=(8, 8))
    result = call(
        "evaluate", teacher_run, "--source", tmp_path / "own", "--json", tmp_path / "own.json", "--latency", "false"
    )
    assert result.status == 0, result.err
    assert json.loads((tmp_path / "own.json").read_text())["runs"][0]["num_images"] == 10


def test_classes_are_matched_by_name(call, teacher_run, tmp_path):
    for digit in range(9):
        for split in ("train", "test"):
            write_image(tmp_path / "nine" / split / str(digit) / "a.png", (25 * digit,) * 3, size=(8, 8))
    result = call("evaluate", teacher_run, "--source", tmp_path / "nine")
    assert result.status == 2
    assert "different classes (9, ...)" in result.err


@pytest.mark.slow
def test_seeds_are_compared_with_the_student_alone(call, teacher_run, runs, tmp_path):
    result = call("evaluate", teacher_run, *runs, "--latency", "false", "--format", "json")
    assert result.status == 0, result.err
    content = json.loads(result.out)
    teacher, alone, kd = content["groups"]
    assert [group["n"] for group in (teacher, alone, kd)] == [1, 2, 2]
    assert kd["baseline"] == kd["alone"] == alone["name"] == f"{runs[0].parent}/alone*"
    rows = {row["run"]: row for row in content["runs"]}
    means = [sum(rows[run]["top1"] for run in group["runs"]) / 2 for group in (alone, kd)]
    assert kd["difference"] == pytest.approx(means[1] - means[0])
    assert kd["interval"][0] <= kd["difference"] <= kd["interval"][1]
    for test, (one, other) in zip(kd["mcnemar"], ((runs[2], runs[0]), (runs[3], runs[1])), strict=True):
        mine, theirs = (set(rows[str(run)]["wrong"]) for run in (one, other))
        assert (test["only_run_right"], test["only_baseline_right"]) == (len(theirs - mine), len(mine - theirs))
    assert len({row["images"] for row in rows.values()}) == 1


@pytest.mark.slow
def test_what_is_no_run_is_passed_over_and_all_runs_are_opened_before_the_first_is_measured(call, runs, tmp_path):
    (tmp_path / "report").mkdir()
    (tmp_path / "report/results.json").write_text("{}")
    result = call("evaluate", runs[0], tmp_path / "report", runs[2], "--latency", "false")
    assert result.status == 0, result.err
    lines = result.err.splitlines()
    assert f"note: {tmp_path / 'report'} is passed over: it holds no run" in lines
    measured = [line for line in lines if line.startswith("measure: ")]
    assert measured == [f"measure: {runs[0]} (1 of 2)", f"measure: {runs[2]} (2 of 2)"]
    assert "(95 %: " in result.out.splitlines()[-1]
    shutil.copytree(runs[2], tmp_path / "unfinished")
    (tmp_path / "unfinished/summary.json").unlink()
    result = call("evaluate", runs[0], tmp_path / "unfinished")
    assert_one_line(result, "unfinished", "is not finished")
    assert "measure: " not in result.err


def test_ctrl_c_has_words_of_its_own(monkeypatch, runs):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("kd.measure.evaluation.Evaluator.measure", interrupted)
    monkeypatch.setattr("sys.argv", ["evaluate.py", str(runs[0])])
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors), pytest.raises(SystemExit) as ended:
        runpy.run_path("evaluate.py", run_name="__main__")
    assert ended.value.code == 130
    *_, last = errors.getvalue().splitlines()
    assert last == "error: stopped by SIGINT; the runs are as they were, the same command measures them again"


@pytest.mark.slow
def test_every_format_holds_the_same_numbers_and_stdout_nothing_else(call, teacher_run, runs, tmp_path):
    arguments = (teacher_run, *runs, "--latency", "false")
    content = json.loads(call("evaluate", *arguments, "--format", "json").out)
    table = call("evaluate", *arguments)
    assert all(len(line) <= 120 for line in table.out.splitlines()), table.out
    assert table.out.startswith("test of digits, 359 images\n")
    assert "set aside as test" in table.err
    relative = os.path.relpath(runs[0])
    assert call("evaluate", relative, runs[2], "--latency", "false", "--report", tmp_path / "report").status == 0
    lines = call("evaluate", *arguments, "--format", "csv").out.splitlines()
    rows = list(csv.DictReader(lines))
    markdown = call("evaluate", *arguments, "--format", "markdown").out
    assert "| runs" in markdown
    assert "±" in markdown
    for row, line in zip(content["runs"], rows, strict=True):
        assert float(line["top1"]) == row["top1"]
        assert float(line["nll"]) == row["nll"]
        assert line["run"] == row["run"]
        assert f"{row['top1']:.2f}" in table.out
        assert f"{row['nll']:.4f}" in markdown
    for group in content["groups"]:
        for line in (line for line in rows if line["run"] in group["runs"]):
            assert line["group_name"] == group["name"]
            assert float(line["group_top1_mean"]) == group["spread"]["top1"]["mean"]
            assert line["group_difference"] == ("" if group["difference"] is None else str(group["difference"]))
        if group["difference"] is not None:
            assert f"{group['difference']:+.2f}" in table.out


@pytest.mark.slow
def test_cka_of_tapped_layers_is_that_of_the_features(call, runs, teacher_run):
    result = call(
        "evaluate",
        runs[2],
        "--latency",
        "false",
        "--format",
        "json",
        "--taps",
        "[classifier.0:features.0, features.3:features.3]",
    )
    assert result.status == 0, result.err
    found = json.loads(result.out)["runs"][0]["cka"]
    assert [(part["student"], part["teacher"]) for part in found] == [
        ("classifier.0", "features.0"),
        ("features.3", "features.3"),
    ]
    data = load_data(DataConfig(source="digits", num_train=200))
    images = torch.from_numpy(data.test.store.images[data.test.places])
    networks = kd.load(runs[2]), kd.load(teacher_run)
    networks[0].tap(["classifier.0", "features.3"])
    networks[1].tap(["features.0", "features.3"])
    with torch.no_grad():
        mine, theirs = (network.outputs({"image": images}).features for network in networks)
    for part in found:
        rows = [metrics.pooled(feature).double() for feature in (mine[part["student"]], theirs[part["teacher"]])]
        x, y = (feature - feature.mean(0) for feature in rows)
        k, m = x @ x.T, y @ y.T
        assert part["cka"] == pytest.approx(((k * m).sum() / (k.norm() * m.norm())).item(), rel=1e-4)
    assert "features.3" in call("evaluate", runs[2], "--latency", "false").out


@pytest.mark.slow
def test_features_are_not_compared_with_several_teachers(call, student_run, teacher_run, tmp_path):
    again = ("--config", student_run / "config.yaml", "--teacher", f"[{teacher_run}, {teacher_run}]", "--max_steps", 2)
    assert call("distill", *again, "--output_dir", tmp_path / "two").status == 0
    result = call("evaluate", tmp_path / "two", "--latency", "false", "--taps", "[features.3:features.3]")
    assert result.status == 0, result.err
    assert "is several: features are compared with one teacher only" in result.err


@pytest.mark.slow
@pytest.mark.parametrize(("name", "severity"), [("gaussian_noise", 3), ("jpeg", 1)])
def test_one_corruption_is_a_view_of_all_numbers(call, runs, teacher_run, name, severity):
    arguments = ("--corruption", name, "--severity", severity, "--latency", "false")
    result = call("evaluate", teacher_run, runs[2], *arguments, "--format", "json")
    assert result.status == 0, result.err
    teacher, row = json.loads(result.out)["runs"]
    data = load_data(DataConfig(source="digits", num_train=200))
    places = torch.from_numpy(data.test.places)
    images = corrupt(torch.from_numpy(data.test.store.images[data.test.places]), places, name, severity)
    with torch.no_grad():
        logits = kd.load(runs[2])(images)
    labels = torch.from_numpy(data.test.labels)
    assert row["top1"] == pytest.approx(metrics.accuracy(logits, labels))
    assert row["nll"] == pytest.approx(metrics.negative_log_likelihood(logits, labels), rel=1e-5)
    assert row["teacher_top1"] == teacher["top1"]
    assert (row["corruption"], row["severity"]) == (name, severity)
    clean = json.loads(call("evaluate", runs[2], "--latency", "false", "--format", "json").out)["runs"][0]
    assert row["temperature"] == clean["temperature"]
    assert row["images"] != clean["images"]
    assert f"{name} of severity {severity}" in call("evaluate", runs[2], *arguments).out


@pytest.mark.slow
def test_all_corruptions_are_a_table_beside_the_clean_numbers(call, runs, tmp_path):
    def measured(*arguments) -> tuple[dict, str]:
        result = call("evaluate", *arguments, "--latency", "false", "--json", tmp_path / "r.json")
        assert result.status == 0, result.err
        return json.loads((tmp_path / "r.json").read_text()), result.out

    content, text = measured(runs[0], "--corruption", "all")
    row = content["runs"][0]
    assert list(row["corruptions"]) == list(STRENGTHS)
    every = [value for values in row["corruptions"].values() for value in values]
    assert len(every) == 25
    assert row["corruption_mean"] == pytest.approx(sum(every) / 25)
    single, _ = measured(runs[0], "--corruption", "blur", "--severity", 5)
    assert single["runs"][0]["top1"] == row["corruptions"]["blur"][4]
    summary = json.loads((runs[0] / "summary.json").read_text())
    assert row["top1"] == summary["test_accuracy"]
    assert all(f"{value:.2f}" in text for value in (*every, row["corruption_mean"]))
    content, table = measured(*runs[:2], "--corruption", "all")
    means = content["groups"][0]["spread"]["corruption_mean"]["mean"]
    assert f"{means:.2f}" in next(line for line in table.splitlines() if " all " in line).split()[-1]


@pytest.mark.slow
def test_a_run_of_nans_is_measured_and_its_json_stays_json(call, runs, tmp_path):
    from kd.models import load_classifier

    shutil.copytree(runs[0], tmp_path / "broken")
    classifier = load_classifier(tmp_path / "broken")
    for parameter in classifier.parameters():
        parameter.data.fill_(float("nan"))
    for name, content in classifier.files().items():
        (tmp_path / "broken" / name).write_bytes(content)
    result = call("evaluate", tmp_path / "broken", runs[2], "--latency", "false", "--format", "json")
    assert result.status == 0, result.err
    row = json.loads(result.out, parse_constant=lambda constant: pytest.fail(constant))["runs"][0]
    assert row["nll"] is row["temperature"] is None
    assert call("evaluate", tmp_path / "broken", "--latency", "false").status == 0


def test_other_images_are_prepared_as_predict_prepares_files(call, teacher_run, tmp_path):
    """Of any size and shape; the network was trained on 8x8 pixels."""
    from sklearn.datasets import load_digits

    digits, files = load_digits(), []
    for i in range(40):
        for split in ("train", "test"):
            path = tmp_path / "large" / split / str(digits.target[i]) / f"{i:02d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = Image.fromarray((digits.images[i] * 255 / 16).astype(np.uint8))
            pixels.resize((50 + i % 2, 40), Image.Resampling.BICUBIC).save(path)
        files.append(path)
    network, files = kd.load(teacher_run), sorted(files)
    right = [name == path.parent.name for path, [(name, _)] in zip(files, network.predict(files), strict=True)]
    result = call("evaluate", teacher_run, "--source", tmp_path / "large", "--format", "json", "--latency", "false")
    assert result.status == 0, result.err
    row = json.loads(result.out)["runs"][0]
    assert row["top1"] == pytest.approx(100 * np.mean(right))
    assert row["wrong"] == [i for i, each in enumerate(right) if not each]


def test_arrays_of_another_size_are_brought_to_it():
    data = load_data(DataConfig(channels=1, mean=[0.5], std=[0.5]))
    small = load_data(DataConfig(channels=1, mean=[0.5], std=[0.5]), size=(5, 4))
    assert small.image_shape == (1, 5, 4)
    found, plain = (each.test.on_host(np.arange(9))[0]["image"] for each in (small, data))
    for image, expected in zip(found, plain, strict=True):
        assert np.array_equal(image, read_image(expected[0].numpy(), 1, (5, 4)))
