"""Accuracy in training: counted from the logits that the step computes anyway, and read with the terms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from conftest import SMALL
from test_step import ALONE

import kd
from kd.data import load_data
from kd.outputs import Outputs
from kd.run.recorded import recorded_data
from kd.train.meter import Meter, count_right
from kd.util.contents import read_config


def rows(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def right(outputs: dict[str, Outputs | None], labels) -> dict[str, int]:
    return {name: count.item() for name, count in count_right(outputs, torch.tensor(labels)).items()}


def test_images_named_right_are_counted_for_each_kept_network_with_logits():
    logits = torch.eye(4)[[0, 1, 2, 3, 3]]
    outputs = {"student": Outputs(logits), "second": Outputs(logits.flip(1)), "bare": Outputs(None), "unused": None}
    assert right(outputs, [0, 1, 0, 3, -1]) == {"student": 3, "second": 0}
    few = Outputs(logits[:, :2], classes=torch.tensor([3, 1]))  # columns of two of the classes
    assert right({"student": few}, [3, 1, 0, 0, -1]) == {"student": 2}
    mixed = [[0.5, 0.5, 0.0, 0.0]] * 5
    assert right(outputs, mixed) == {}


def test_the_mean_is_over_the_images_with_a_label_and_does_not_depend_on_when_it_is_read():
    steps = [(number % 3, number % 4, 4) for number in range(20)]  # named right, with a label, images
    flushed = []
    for every in (1, 6, 100):
        meter = Meter(["CE"], ["student", "mean"], ALONE, {}, 0.1)
        for number, (named, labelled, images) in enumerate(steps):
            counts = {"student": torch.tensor(min(named, labelled)), "mean": torch.tensor(0)}
            meter.add({"CE": torch.tensor(1.0)}, images, number, counts, labelled)
            if number % every == 0:
                meter = Meter(["CE"], ["student", "mean"], ALONE, meter.state(), 0.1)
        flushed.append(meter.flush(torch.tensor(1.0)))
        assert meter.end_epoch()["epoch/accuracy"] == flushed[-1]["train/accuracy"]
    total, labels = sum(min(named, labelled) for named, labelled, _ in steps), sum(step[1] for step in steps)
    assert {row["train/accuracy"] for row in flushed} == {100 * total / labels}
    assert {row["train/mean/accuracy"] for row in flushed} == {0.0}
    assert {row["train/CE"] for row in flushed} == {1.0}


def test_an_interval_without_a_label_has_no_accuracy():
    meter = Meter(["CE"], ["student"], ALONE, {}, 0.1)
    meter.add({"CE": torch.tensor(1.0)}, 4, 0, {"student": torch.tensor(0)}, 0)
    assert "train/accuracy" not in meter.flush(torch.tensor(1.0))


def test_the_first_step_of_a_run_has_the_accuracy_of_the_network_that_it_begins_with(call, teacher_run, tmp_path):
    """In batches of all images and with a step that changes nothing, it is that of `kd.load` on the training split."""
    arguments = ("--config", "recipes/digits/teacher.yaml", "--data.num_train", 200)
    arguments += ("--weights", teacher_run / "model.safetensors", "--data.batch_size", 200, "--epochs", 1)
    result = call("train_teacher", *arguments, "--optimizer.lr", 1e-12, "--output_dir", tmp_path / "run")
    assert result.status == 0, result.err
    data = load_data(recorded_data(read_config(tmp_path / "run")["data"], "run"))
    inputs, labels = data.train.read(np.arange(200), torch.device("cpu"))[:2]
    expected = 100 * (kd.load(tmp_path / "run").logits(inputs).argmax(1) == labels).double().mean().item()
    step, epoch = rows(tmp_path / "run")[:2]
    assert step["train/accuracy"] == epoch["epoch/accuracy"] == pytest.approx(expected)
    assert expected > 50
    assert f"train {expected:.2f} %" in result.out


def test_mixed_images_have_no_accuracy_and_other_networks_have_theirs(call, tmp_path):
    mixed = call("train_teacher", *SMALL, "--data.mixup", 0.2, "--output_dir", tmp_path / "mixed")
    assert mixed.status == 0, mixed.err
    assert not [key for row in rows(tmp_path / "mixed") for key in row if key.startswith(("train/acc", "epoch/acc"))]
    two = ("--config", "recipes/digits/mutual.yaml", "--data.num_train", 200, "--epochs", 1, "--log_every", 1)
    assert call("distill", *two, "--output_dir", tmp_path / "two").status == 0
    found = rows(tmp_path / "two")
    assert {"train/accuracy", "train/peer2/accuracy"} <= found[0].keys()
    (epoch,) = [row for row in found if "epoch/loss" in row]
    assert {"epoch/accuracy", "epoch/peer2/accuracy", "val/accuracy", "val/peer2/accuracy"} <= epoch.keys()
    assert {"test/accuracy", "test/peer2/accuracy"} <= found[-1].keys()


def test_validation_and_checkpoints_do_not_count_for_the_speed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("kd.train.meter.time.perf_counter", lambda: now[0])
    meter = Meter(["CE"], [], ALONE, {}, 0.1)
    for _ in range(2):
        meter.add({"CE": torch.tensor(1.0)}, 30, 0, {}, 0)
        now[0] += 1
        with meter.aside():
            now[0] += 100
        meter.add({"CE": torch.tensor(1.0)}, 30, 1, {}, 0)
        now[0] += 2
        assert meter.flush(torch.tensor(1.0))["images_per_second"] == 20
    with meter.aside():
        now[0] += 100
    assert meter.end_epoch()["epoch/images_per_second"] == 20
