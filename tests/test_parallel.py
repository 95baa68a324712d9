"""Several processes: images and losses as with one, each image evaluated once, resume at another number."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import children
import pytest
import yaml
from conftest import ROOT, SMALL, UNEVEN
from test_resume import rows

# SGD: Adam divides by the size of tiny gradients and so magnifies rounding. 200 digits in batches of 48: the epoch's
# last batch has 8 images. light_nn has dropout, whose masks do not depend on the number of processes either.
ARGUMENTS = (
    *UNEVEN,
    "--optimizer.name",
    "sgd",
    "--optimizer.lr",
    0.05,
    "--checkpoint_every",
    4,
    "--report_to",
    "none",
)


def close(one: list[dict], other: list[dict], tolerance: float) -> None:
    assert len(one) == len(other)
    for row, same in zip(one, other, strict=True):
        assert row.keys() == same.keys()
        for key, value in row.items():
            assert same[key] == pytest.approx(value, rel=tolerance), (row["step"], key)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    assert children.run("train_teacher", (*ARGUMENTS, "--output_dir", folder)) == 0
    return folder


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_give_the_losses_of_one(alone, tmp_path, count):
    assert children.run_several("train_teacher", (*ARGUMENTS, "--output_dir", tmp_path / "run"), count) == [0] * count
    close(rows(alone), rows(tmp_path / "run"), 1e-4)
    one, several = (json.loads((folder / "summary.json").read_text()) for folder in (alone, tmp_path / "run"))
    assert several["num_processes"] == count
    assert several["test_accuracy"] == one["test_accuracy"]
    assert several["test_nll"] == pytest.approx(one["test_nll"], rel=1e-4)


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_bytes(tmp_path):
    for name, sabotage in (("whole", None), ("cut", ("kd.meter.Meter.add:SIGTERM", 6))):
        status = children.run_several("train_teacher", (*ARGUMENTS, "--output_dir", tmp_path / name), 2, sabotage)
        # the signal reaches the second process only; both stop after the same step, and the first one saves it
        assert status == ([0, 0] if sabotage is None else [143, 143])
    assert children.run_several("train_teacher", (*ARGUMENTS, "--output_dir", tmp_path / "cut"), 2) == [0, 0]
    assert (tmp_path / "cut/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(alone, tmp_path):
    command = (*ARGUMENTS, "--output_dir", tmp_path / "run")
    assert children.run_several("train_teacher", command, 2, ("kd.meter.Meter.add:SIGTERM", 3)) == [143, 143]
    assert children.run("train_teacher", command) == 0
    close(rows(alone), rows(tmp_path / "run"), 1e-4)


@pytest.mark.slow
def test_distillation_and_evaluation_on_two_processes(teacher_run, tmp_path):
    command = (
        "--config",
        "recipes/digits/kd.yaml",
        "--data.num_train",
        200,
        "--epochs",
        2,
        "--log_every",
        1,
        "--optimizer.name",
        "sgd",
        "--teacher",
        teacher_run,
        "--report_to",
        "none",
        "--output_dir",
    )
    assert children.run("distill", (*command, tmp_path / "one")) == 0
    assert children.run_several("distill", (*command, tmp_path / "two"), 2) == [0, 0]
    close(rows(tmp_path / "one"), rows(tmp_path / "two"), 1e-4)
    for count in (1, 2):
        evaluate = (tmp_path / "one", "--json", tmp_path / f"{count}.json", "--latency", "false")
        assert children.run_several("evaluate", evaluate, count) == [0] * count
    numbers = [json.loads((tmp_path / f"{count}.json").read_text())[0] for count in (1, 2)]
    assert numbers[0]["num_images"] == numbers[1]["num_images"] == 359
    for key in ("top1", "agreement", "confusion", "per_class"):
        assert numbers[0][key] == numbers[1][key]
    assert numbers[0]["nll"] == pytest.approx(numbers[1]["nll"], rel=1e-6)


@pytest.mark.slow
def test_a_failure_on_one_process_is_said_and_ends_both(tmp_path, image_folder):
    (image_folder / "train/red/03.png").write_bytes(b"no image")
    command = ("--model", "light_nn", "--data.source", image_folder, "--output_dir", tmp_path / "run")
    statuses = children.finish(*children.start_several("train_teacher", command, 2), timeout=60)
    assert all(status != 0 for status in statuses)


@pytest.mark.parametrize("name", ["cpu", "cpu_2proc", "single_gpu", "multi_gpu"])
def test_launch_configs_are_read_by_accelerate(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert config.num_processes == {"cpu": 1, "cpu_2proc": 2, "single_gpu": 1, "multi_gpu": 8}[name]
    assert config.use_cpu == name.startswith("cpu")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cpu", "cpu_2proc"])
def test_accelerate_launch(tmp_path, name):
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        f"accelerate_configs/{name}.yaml",
        "train_teacher.py",
        *map(str, SMALL),
        "--output_dir",
        str(tmp_path / "run"),
        "--report_to",
        "none",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["num_processes"] == (2 if name == "cpu_2proc" else 1)
    assert result.stdout.count("test accuracy") == 1
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["model"] == "mnist_student"
