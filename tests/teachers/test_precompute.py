"""What is frozen is computed once: a table gives the run of the network, is reused, refused where it does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_image
from test_resume import rows
from torch import nn

from kd.models import build_network, code_hash

TAPS = "[{class_path: CosineEmbedding, init_args: {student_tap: features.5, teacher_tap: features.4}}, KL]"


def tables() -> set[Path]:
    import os

    return set(Path(os.environ["KD_CACHE"], "tables").glob("*-*/meta.json"))


@pytest.fixture
def distil(call, teacher_run, tmp_path):
    """Distil into `tmp_path/name` on 150 digits for 3 epochs; the result, and the tables it made."""

    def run(name, *arguments, teacher=teacher_run):
        before = tables()
        command = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 150, "--epochs", 3, "--log_every", 1)
        result = call("distill", *command, "--teacher", teacher, "--output_dir", tmp_path / name, *arguments)
        assert result.status == 0, result.err
        return result, tables() - before

    return run


def assert_close(one: Path, other: Path, tolerance: float) -> None:
    for row, same in zip(rows(one), rows(other), strict=True):
        for key, value in row.items():
            if not key.startswith("val/"):
                assert same[key] == pytest.approx(value, rel=tolerance), (row["step"], key)


@pytest.mark.first_tier(1)
@pytest.mark.parametrize("losses", [TAPS, "[KL, CrossEntropy]"])
def test_a_teachers_table_gives_the_run_of_the_teacher(distil, tmp_path, losses):
    sgd = ("--optimizer.name", "sgd", "--losses", losses, "--seed", 5)
    live, made = distil("live", *sgd, "--precompute", "never")
    assert "teacher: computed at each step" in live.out
    assert not made
    table, _ = distil("table", *sgd)
    assert "for 150 images" in table.out
    assert_close(tmp_path / "live", tmp_path / "table", 1e-5)


@pytest.mark.slow
def test_a_table_is_reused_by_other_students_seeds_and_losses_and_gives_the_same_bytes(distil, tmp_path):
    split = ("--data.split_seed", 11)
    first, made = distil("first", *split)
    assert "computed once for 150 images" in first.out
    assert len(made) == 1
    again, more = distil("again", *split, "--seed", 0)
    assert "looked up for 150 images" in again.out
    assert not more
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "again")]
    assert weights[0] == weights[1]
    for name, other in (
        ("seed", ("--seed", 3)),
        ("student", ("--student", "mnist_teacher")),
        ("t", ("--losses", "[KL]")),
    ):
        result, more = distil(name, *split, *other)
        assert "looked up" in result.out
        assert not more


@pytest.mark.slow
def test_other_images_views_teachers_and_taps_have_other_tables(distil, teacher_run, tmp_path, call):
    seed = ("--data.split_seed", 12)
    assert len(distil("base", *seed)[1]) == 1
    assert len(distil("images", "--data.split_seed", 13)[1]) == 1
    assert len(distil("taps", *seed, "--losses", TAPS)[1]) == 1
    command = ("--config", "recipes/digits/teacher.yaml", "--data.num_train", 200, "--epochs", 1, "--seed", 4)
    assert call("train_teacher", *command, "--output_dir", tmp_path / "other").status == 0
    assert len(distil("teacher", *seed, teacher=tmp_path / "other")[1]) == 1


@pytest.mark.slow
def test_a_damaged_table_is_rebuilt(distil, tmp_path):
    seed = ("--data.split_seed", 14)
    _, made = distil("first", *seed)
    file = made.pop().parent / "0.npy"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    result, _ = distil("second", *seed)
    assert "is damaged" in result.out
    assert "computed once for 150 images" in result.out
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("first", "second")]
    assert weights[0] == weights[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "limit"),
    [(("--data.pad_crop", 3), None), (("--epochs", 1), None), ((), 10)],
)
def test_no_table_is_made_where_views_hardly_repeat_images_are_seen_once_or_it_would_be_too_large(
    distil, monkeypatch, arguments, limit
):
    if limit:
        monkeypatch.setattr("kd.teachers.tables.LIMIT_BYTES", limit)
    result, made = distil("run", "--data.split_seed", 15, *arguments)
    assert "teacher: computed at each step" in result.out
    assert not made


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "tolerance"),
    [
        ("resnet18", "no", 2e-4),
        ("resnet18", "bf16", 2e-2),
        ("mobilenet_v3_small", "no", 2e-4),
        ("squeezenet1_1", "no", 2e-4),
    ],
)
def test_a_frozen_backbones_features_give_the_run_of_the_network(call, tmp_path, name, precision, tolerance):
    torch.manual_seed(0)
    network = build_network(name, 10)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # statistics as of a trained network, so that features differ
            module.running_mean.normal_(0, 0.1)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    command = (*SMALL, "--data.num_train", 60, "--model", name, "--weights", tmp_path / "w.pth", "--epochs", 2,
               "--freeze_backbone", "true", "--optimizer.name", "sgd", "--data.batch_size", 32,
               "--mixed_precision", precision)  # fmt: skip
    live = call("train_teacher", *command, "--precompute", "never", "--output_dir", tmp_path / "live")
    table = call("train_teacher", *command, "--output_dir", tmp_path / "table")
    assert live.status == table.status == 0, live.err + table.err
    # squeezenet's head is a convolution before a pooling: its features do not give the logits by the head alone
    assert ("backbone: computed once for 60 images" in table.out) == (name != "squeezenet1_1")
    assert "backbone:" not in live.out
    assert_close(tmp_path / "live", tmp_path / "table", tolerance)
    one, other = (json.loads((tmp_path / run / "summary.json").read_text()) for run in ("live", "table"))
    assert one["test_accuracy"] == pytest.approx(other["test_accuracy"], abs=0.3)
    assert one["multiply_adds"] == other["multiply_adds"]


def test_rows_are_columns_of_the_images_that_they_are_of(teacher_run):
    from kd.data import Split
    from kd.data.store import Store
    from kd.models import load_classifier
    from kd.outputs import Batch
    from kd.teachers import Teachers

    store = Store(np.zeros((10, 1, 2, 2), np.uint8), np.zeros(10, np.int64))
    tables = {"teacher.logits": np.eye(3, dtype=np.float32), "teacher.features.map": np.arange(3.0)[:, None]}
    split = Split(store, np.array([2, 5, 9]), rows=tables)
    inputs, labels, index = split.read(np.array([2, 0, 2]), torch.device("cpu"))
    assert index.tolist() == [9, 2, 9]
    classifier = load_classifier(teacher_run)
    outputs = Teachers({"teacher": classifier}, classifier.classes)(Batch(inputs, labels, index))["teacher"]
    assert outputs.logits.tolist() == [[0, 0, 1], [1, 0, 0], [0, 0, 1]]
    assert outputs.features["map"].tolist() == [[2], [0], [2]]


def test_the_code_of_an_own_network_is_part_of_what_a_table_is_known_by(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    code = "from torch import nn\nclass Net(nn.Linear):\n    def forward(self, x):\n        return super().forward(x)\n"
    (tmp_path / "net_of_mine.py").write_text(code)
    from net_of_mine import Net

    net = Net(2, 3)
    before = code_hash(nn.Sequential(net))
    assert before == code_hash(nn.Sequential(Net(2, 3), nn.ReLU()))
    (tmp_path / "net_of_mine.py").write_text(code.replace("return", "return -"))
    assert code_hash(nn.Sequential(net)) != before
    assert code_hash(nn.Linear(2, 3)) == code_hash(build_network("mnist_student", 3))


def test_a_teacher_that_sees_another_size_than_in_training_is_told(call, teacher_run, tmp_path):
    for digit in range(10):
        for i in range(3):
            write_image(tmp_path / "own" / "train" / str(digit) / f"{i}.png", (25 * digit,) * 3, size=(12, 12))
    few = ("--data.source", tmp_path / "own", "--data.num_train", "null", "--data.val_fraction", 0, "--max_steps", 1)
    few = (*few, "--data.test_fraction", 0.4, "--report_to", "none", "--output_dir", tmp_path / "kd")
    result = call("distill", "--config", "recipes/digits/kd.yaml", "--teacher", teacher_run, *few)
    assert result.status == 0, result.err
    line = "mnist_teacher was made for images of 8x8 and sees these at 12x12"
    assert f"note: the teacher {line}" in result.out
    assert line in call("evaluate", tmp_path / "kd", "--latency", "false").err
