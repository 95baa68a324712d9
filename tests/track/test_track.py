"""The record of a run: metrics.jsonl is the truth, a tracker's record equals it, one tracker run a job."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import children
import pytest
import torch
import yaml
from accelerate import PartialState
from conftest import SMALL, assert_one_line
from records import MEDIA, tensorboard_scalars, trackio_scalars, truth, wandb_records, wandb_scalars
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_resume import TIMES, rows

from kd.data import load_data
from kd.measure.predict import predict
from kd.models import load_classifier
from kd.run.config import DataConfig
from kd.run.parse import read_yaml
from kd.track import choose_tracker, hardest


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "none"),
        ({"WANDB_MODE": "offline"}, "wandb"),
        ({"WANDB_API_KEY": "x" * 40}, "wandb"),
        ({"WANDB_API_KEY": "x" * 40, "WANDB_MODE": "disabled"}, "none"),
    ],
)
def test_wandb_is_the_default_where_a_key_is_or_it_is_set_offline(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert choose_tracker("auto") == expected
    for name in ("wandb", "tensorboard", "none"):
        assert choose_tracker(name) == name


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("WANDB_MODE", "bogus", ("WANDB_MODE 'bogus'", "offline")),
        ("WANDB_FINISH_TIMEOUT", "abc", ("WANDB_FINISH_TIMEOUT 'abc'", "seconds")),
    ],
)
def test_a_wrong_setting_of_wandb_is_one_line(call, tmp_path, monkeypatch, name, value, words):
    monkeypatch.setenv(name, value)
    result = call("train_teacher", *SMALL, "--report_to", "wandb", "--output_dir", tmp_path / "run")
    assert_one_line(result, *words)


def test_a_key_in_netrc_counts(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_tracker("auto") == "wandb"


def test_metrics_have_every_term_once_a_step(call, tmp_path):
    assert call("train_teacher", *SMALL, "--output_dir", tmp_path / "run").status == 0
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in written if "train/loss" in row]
    epochs = [row for row in written if "epoch/loss" in row]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    place = {"step": 8, "epoch": 2, "images_seen": 400}
    assert written[-1] == {**place, **{f"test/{name}": summary[f"test_{name}"] for name in ("accuracy", "nll", "ece")}}
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["images_seen"] for row in steps] == [64, 128, 192, 200, 264, 328, 392, 400]
    assert [row["epoch"] for row in epochs] == [1, 2]
    for row in steps:
        assert row["train/loss"] == row["train/CrossEntropy"]
        assert row["images_per_second"] > 0
    sizes = [64, 64, 64, 8]
    mean = sum(row["train/loss"] * size for row, size in zip(steps[:4], sizes, strict=True)) / 200
    assert epochs[0]["epoch/loss"] == pytest.approx(mean, rel=1e-12)


DISTIL = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 2, "--log_every", 1)
WRITTEN = ("train/KL", "train/CrossEntropy", "train/loss", "epoch/KL", "lr", "gradient_norm", "images_per_second")
WRITTEN += ("peak_memory_mb", "val/accuracy", "val/nll", "epoch", "images_seen")


def test_the_gradient_norm_is_that_of_the_steps_gradient(call, tmp_path):
    """Of plain gradient descent the step's length is the learning rate times the gradient's norm."""
    command = (*SMALL, "--optimizer.name", "sgd", "--optimizer.momentum", 0, "--optimizer.lr", 0.1)
    for steps in (1, 2):
        folder = tmp_path / f"run{steps}"
        assert call("train_teacher", *command, "--max_steps", steps, "--output_dir", folder).status == 0
    clipped = call("train_teacher", *command, "--optimizer.clip_norm", 1e-6, "--output_dir", tmp_path / "clipped")
    assert clipped.status == 0
    first, second = (load_file(tmp_path / f"run{steps}" / "model.safetensors") for steps in (1, 2))
    length = sum((second[name] - first[name]).double().square().sum() for name in first).sqrt().item()
    norms = [row["gradient_norm"] for row in rows(tmp_path / "run2") if "train/loss" in row]
    assert length == pytest.approx(0.1 * norms[1], rel=1e-4)
    assert rows(tmp_path / "clipped")[0]["gradient_norm"] == norms[0]  # before it is clipped


@pytest.mark.slow
def test_tensorboard_has_the_same_numbers_over_all_three_axes(call, teacher_run, tmp_path):
    run = tmp_path / "run"
    result = call("distill", *DISTIL, "--teacher", teacher_run, "--output_dir", run, "--report_to", "tensorboard")
    assert result.status == 0
    assert {name for _, name in truth(run)} >= set(WRITTEN)
    assert tensorboard_scalars(run / "tensorboard") == truth(run)
    epochs = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    epochs = [row for row in epochs if "epoch/loss" in row]
    for axis in ("epoch", "images_seen"):
        over = tensorboard_scalars(run / "tensorboard" / f"over_{axis}")
        assert {name for _, name in over} == {key for key in epochs[0] if key.startswith(("epoch/", "val/"))}
        assert over == {
            (row[axis], key): row[key] for row in epochs for key in row if key.startswith(("epoch/", "val/"))
        }
    record = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0, "tensors": 0}).Reload()
    table = record.Tensors("test/hardest/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "teacher_prediction" in table
    assert len(table.splitlines()) == 2 + 32
    assert {"test/confusion", "test/hardest/00", "test/hardest/31"} <= set(record.Tags()["images"])


def test_the_hardest_images_are_those_of_the_highest_loss(teacher_run):
    config = DataConfig(**read_yaml(teacher_run / "config.yaml")["data"])
    data, network = load_data(config), load_classifier(teacher_run)
    logits, labels = predict(network, data.test, 64, PartialState())
    found = hardest(data.test, logits, labels, data.classes, network, torch.device("cpu"), count=5)
    losses = [-logits[i].double().log_softmax(0)[labels[i]].item() for i in range(len(labels))]
    order = sorted(range(len(labels)), key=lambda i: -losses[i])[:5]
    assert [row["position"] for row in found] == order
    assert [row["loss"] for row in found] == pytest.approx([losses[i] for i in order], rel=1e-12)
    for row in found:
        scores = logits[row["position"]].softmax(0)
        assert row["label"] == data.classes[labels[row["position"]]]
        assert (row["prediction"], row["teacher_prediction"]) == (data.classes[scores.argmax()],) * 2
        assert row["probability"] == pytest.approx(scores.max().item(), rel=1e-5)
        assert row["image"].shape == (64, 64, 3)
    alone = hardest(data.test, logits, labels, data.classes, None, torch.device("cpu"), count=1)
    assert not any(key.startswith("teacher") for key in alone[0])


def test_a_tracker_that_is_not_installed_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = call("train_teacher", *SMALL, "--output_dir", tmp_path / "run", "--report_to", "trackio")
    assert_one_line(result, "trackio", "pip install trackio", "--report_to none")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def wandb_home(tmp_path) -> dict:
    """An environment whose home folder is the test's own."""
    return {
        "HOME": str(tmp_path / "home"),
        **dict.fromkeys(("XDG_DATA_HOME", "XDG_CACHE_HOME"), str(tmp_path / "home")),
    }


@pytest.mark.slow
def test_wandb_offline_has_the_same_numbers_what_made_them_and_where_they_come_from(tmp_path, wandb_home):
    teacher, student = tmp_path / "digits/teacher", tmp_path / "digits/kd"
    assert children.run("train_teacher", (*SMALL, "--output_dir", teacher, "--report_to", "wandb"), wandb_home) == 0
    extra = (
        "--teacher",
        teacher,
        "--output_dir",
        student,
        "--report_to",
        "wandb",
        "--tags",
        '["mine"]',
        "--notes",
        "why",
    )
    assert children.run("distill", (*DISTIL, *extra), wandb_home) == 0
    records = {run: wandb_records(run) for run in (teacher, student)}
    scalars = wandb_scalars(records[student])
    assert {key: value for key, value in scalars.items() if not key[1].startswith(MEDIA)} == truth(student)

    run = next(record.run for record in records[student] if record.WhichOneof("record_type") == "run")
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("kd", "digits", "distill", "digits/kd")
    assert run.notes == "why"
    assert set(run.tags) == {"digits", "mnist_student", "KL", "CrossEntropy", "mine"}
    config = {item.key: json.loads(item.value_json) for item in run.config.update}
    resolved = yaml.safe_load((student / "config.yaml").read_text())
    assert {key: config[key] for key in resolved} == resolved
    assert config["objective"] == "0.9 * KL(temperature=4.0) + 0.1 * CrossEntropy(label_smoothing=0.0)"
    assert config["hardware"]["num_processes"] == 1
    assert config["hardware"]["device"].startswith("cpu")
    assert set(config["git"]) == {"commit", "branch"}

    metrics = {record.metric.name: record.metric for record in records[student] if record.HasField("metric")}
    assert metrics["val/accuracy"].summary.max
    assert metrics["val/nll"].summary.min
    assert metrics["train/loss"].summary.min
    assert metrics["val/accuracy"].step_metric == "epoch"
    globs = {record.metric.glob_name: record.metric.step_metric for record in records[student]}
    assert globs["epoch/*"] == globs["val/*"] == "epoch"
    summary = {}
    for record in records[student]:
        summary |= {item.key: json.loads(item.value_json) for item in record.summary.update if item.key}
    assert summary["test_accuracy"] == json.loads((student / "summary.json").read_text())["test_accuracy"]

    models = {
        run: {record.artifact.name: record.artifact for record in found if record.artifact.type == "model"}
        for run, found in records.items()
    }
    assert list(models[teacher]) == ["digits-teacher"]
    assert list(models[student]) == ["digits-teacher", "digits-kd"]
    made, used = models[teacher]["digits-teacher"], models[student]["digits-teacher"]
    assert made.digest == used.digest  # the same files are one version of it, which joins the two runs
    assert (made.use_after_commit, used.use_after_commit) == (False, True)
    assert {entry.path for entry in made.manifest.contents} == {"model.safetensors", "config.json"}
    assert all(Path(entry.local_path).parent == teacher for entry in used.manifest.contents)

    staged = [
        Path(entry.local_path)
        for record in records[student]
        if record.WhichOneof("record_type") == "artifact"
        for entry in record.artifact.manifest.contents
    ]
    assert all(path.is_file() and {teacher, student} & set(path.parents) for path in staged)  # none in the home folder
    assert not [path for path in (tmp_path / "home").rglob("*") if path.suffix in (".json", ".png", ".safetensors")]

    (table,) = student.glob("wandb/offline-run-*/files/media/table/test/hardest*.json")
    table = json.loads(table.read_text())
    assert len(table["data"]) == 32
    assert {"image", "label", "prediction", "probability", "teacher_prediction"} <= set(table["columns"])
    (chart,) = student.glob("wandb/offline-run-*/files/media/table/test/confusion_table*.json")
    assert sum(row[2] for row in json.loads(chart.read_text())["data"]) == 359


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "tensorboard", "trackio"])
def test_a_killed_run_resumes_in_the_same_record_which_lacks_nothing(tmp_path, wandb_home, monkeypatch, name):
    if name == "trackio":
        pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    environment = {**wandb_home, "TRACKIO_DIR": str(tmp_path / "trackio")}
    run = tmp_path / "run"
    command = (*SMALL, "--output_dir", run, "--report_to", name, "--checkpoint_every", 3)
    assert children.run("train_teacher", command, environment, ("kd.train.meter.Meter.add", 6)) == -9
    identity = json.loads((run / "tracker.json").read_text())
    assert children.run("train_teacher", command, environment) == 0
    assert json.loads((run / "tracker.json").read_text()) == identity
    if name == "wandb":
        (folder,) = run.glob("wandb/offline-run-*")
        assert folder.name.endswith(identity["wandb_id"])
        written = wandb_scalars(wandb_records(run))
    else:
        written = tensorboard_scalars(run / "tensorboard") if name == "tensorboard" else trackio_scalars("kd")
    written = {key: value for key, value in written.items() if not key[1].startswith(MEDIA)}
    expected = truth(run)
    if name == "trackio":  # it keeps what it had of the steps after the checkpoint, and so their clock's times
        written, expected = ({k: v for k, v in d.items() if k[1] not in TIMES} for d in (written, expected))
    assert written == expected


@pytest.mark.slow
def test_trackio_has_the_same_numbers(tmp_path, teacher_run, monkeypatch):
    pytest.importorskip("trackio", reason="trackio is not installed")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run = tmp_path / "run"
    command = (*DISTIL, "--teacher", teacher_run, "--output_dir", run, "--report_to", "trackio")
    environment = {"TRACKIO_DIR": str(tmp_path / "trackio")}
    assert children.run("distill", command, environment, no_network) == 0
    assert trackio_scalars("kd") == truth(run)
    with sqlite3.connect(tmp_path / "trackio/kd.db") as database:
        (config,) = database.execute("SELECT config FROM configs").fetchone()
        media = "".join(str(json.loads(text)) for (text,) in database.execute("SELECT metrics FROM metrics"))
    assert json.loads(config)["objective"].startswith("0.9 * KL")
    assert media.count("trackio.image") == 33
    assert "teacher_prediction" in media


def no_network() -> None:
    """Let every connection and every server of this process be an error."""

    def refuse(*_):
        raise AssertionError("the network is used")

    socket.socket.connect = socket.socket.bind = refuse


@pytest.mark.slow
def test_wandb_is_one_run_of_two_processes_also_of_a_sweeps_trial_that_is_preempted(tmp_path, wandb_home):
    command = (*SMALL, "--output_dir", tmp_path / "run", "--report_to", "wandb", "--checkpoint_every", 2)
    sweep = {**wandb_home, "WANDB_SWEEP_ID": "sweep", "WANDB_RUN_ID": "trial"}
    stopped = children.run_several("train_teacher", command, 2, ("kd.train.meter.Meter.add:SIGTERM", 3), sweep)
    assert stopped == [143, 143]
    records = wandb_records(tmp_path / "run")
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [143]
    assert any(record.HasField("preempting") for record in records)  # the sweep's server hands the trial out again
    assert children.run_several("train_teacher", command, 2, environment=sweep) == [0, 0]
    identity = json.loads((tmp_path / "run/tracker.json").read_text())["wandb_id"]
    records = wandb_records(tmp_path / "run")
    runs = [record.run for record in records if record.WhichOneof("record_type") == "run"]
    assert {(run.run_id, run.sweep_id) for run in runs} == {("trial", "sweep")}
    assert identity == "trial"
    assert [record.exit.exit_code for record in records if record.HasField("exit")] == [0]
    assert not any(record.HasField("preempting") for record in records)
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert folder.name.endswith(identity)
    written = wandb_scalars(wandb_records(tmp_path / "run"))
    assert {key: value for key, value in written.items() if not key[1].startswith(MEDIA)} == truth(tmp_path / "run")
    sync = [sys.executable, "-m", "wandb", "sync", "--dry-run", str(folder)]
    found = subprocess.run(sync, capture_output=True, text=True, env={**os.environ, **wandb_home})
    assert identity in found.stdout + found.stderr
