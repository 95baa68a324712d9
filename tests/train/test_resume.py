"""Killed at any moment and started again with the same command, a run ends with the bytes of one never interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
from conftest import ROOT, UNEVEN

from kd.train.checkpoint import Progress, checkpoints, load_newest, save_checkpoint
from kd.util.errors import run_script

# 200 digits in batches of 48: 5 steps an epoch, the last one uneven; dropout, flips and crops are all drawn.
ARGUMENTS = (*UNEVEN, "--data.pad_crop", 1, "--epochs", 3, "--checkpoint_every", 2, "--log_every", 3)
ARGUMENTS = (*ARGUMENTS, "--report_to", "none")
TIMES = ("images_per_second", "epoch/images_per_second", "peak_memory_mb")


def rows(folder: Path) -> list[dict]:
    """metrics.jsonl without what was measured of the machine."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{key: value for key, value in json.loads(line).items() if key not in TIMES} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()
    assert rows(one) == rows(other)
    assert len(checkpoints(one / "checkpoints")) == 1
    assert not list((one / "checkpoints").glob("*.tmp*"))
    summaries = [json.loads((folder / "summary.json").read_text()) for folder in (one, other)]
    assert summaries[0].keys() == summaries[1].keys()
    for key in ("test_accuracy", "val_accuracy", "best", "last", "steps"):
        assert summaries[0][key] == summaries[1][key]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert children.run("train_teacher", (*ARGUMENTS, "--output_dir", folder)) == 0
    return folder


ADD, WRITE, RESULT = "kd.train.meter.Meter.add", "kd.train.checkpoint.write_synced", "kd.run.folder.write_atomic"


@pytest.mark.first_tier(1)
@pytest.mark.parametrize(
    "moments",
    [
        [(ADD, 4), (ADD, 3), (ADD, 6)],  # three times
        [(ADD, 1)],  # before the first checkpoint
        [(WRITE, 2)],  # inside a checkpoint's files
        [(WRITE, 2), (WRITE, 5)],  # twice there
        [("kd.util.files.os.rename", 3)],  # the checkpoint is whole but not renamed
        [("kd.train.checkpoint.delete", 1)],  # while an old one is deleted
        [(RESULT, 3), (RESULT, 2)],  # between the results' files
    ],
    ids=lambda moments: "+".join(f"{name.rpartition('.')[2]}{n}" for name, n in moments),
)
def test_killed_and_resumed(uninterrupted, tmp_path, moments):
    command = (*ARGUMENTS, "--output_dir", tmp_path / "run")
    for moment in moments:
        assert children.run("train_teacher", command, sabotage=moment) == -9
        assert not (tmp_path / "run" / "summary.json").exists()
    assert children.run("train_teacher", command) == 0
    assert_same_run(tmp_path / "run", uninterrupted)


def test_what_a_kill_left_half_written_is_deleted_though_its_step_is_not_saved_again(tmp_path):
    (tmp_path / ".tmp-step_00000005").mkdir()
    (tmp_path / ".tmp-step_00000005" / "distiller.safetensors").write_bytes(b"half")
    saved = save_checkpoint(tmp_path, Progress(step=6), {})
    assert list(tmp_path.iterdir()) == [saved]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_stopped_by_a_signal_saves_where_it_is(uninterrupted, tmp_path, name):
    command = (*ARGUMENTS, "--output_dir", tmp_path / "run", "--checkpoint_every", 1000)
    status = children.run("train_teacher", command, sabotage=(f"kd.train.meter.Meter.add:{name}", 7))
    assert status == 128 + {"SIGTERM": 15, "SIGINT": 2, "SIGUSR1": 10}[name]
    progress, _ = load_newest(tmp_path / "run" / "checkpoints")
    assert progress.step == 7
    assert children.run("train_teacher", command) == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == (uninterrupted / "model.safetensors").read_bytes()
    assert rows(tmp_path / "run") == rows(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize("after", ["", "epoch 1/"])
def test_a_signal_that_is_sent_again_and_again_changes_nothing(tmp_path, after):
    """In a Python of its own, to its very end: while it ends it forgets handlers, and the signal would kill."""
    arguments = (*ARGUMENTS, "--epochs", 500, "--log_every", 1000, "--output_dir", tmp_path / "run")
    with subprocess.Popen(
        [sys.executable, "train_teacher.py", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGUSR1, signal.SIG_IGN),  # as slurm/train.sbatch starts the launcher
    ) as process:
        while after and not process.stdout.readline().startswith(after):
            assert process.poll() is None, process.stderr.read()
        while process.poll() is None:
            process.send_signal(signal.SIGUSR1)
            time.sleep(0.002)
        out, err = process.communicate()
    assert process.returncode == 128 + signal.SIGUSR1, err
    assert "Traceback" not in err
    said = "stopped by SIGUSR1 after step" if after else "stopped by SIGUSR1; the same command resumes"
    assert said in out + err


def test_a_signal_that_a_module_swallows_while_it_is_imported_stops_the_script_still(capsys, monkeypatch):
    def main():
        with contextlib.suppress(BaseException):
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    monkeypatch.setattr("kd.util.errors.SECONDS_TO_CATCH", 0.1)
    with pytest.raises(SystemExit) as ended:
        run_script(main)
    assert ended.value.code == 128 + signal.SIGTERM
    assert "stopped by SIGTERM" in capsys.readouterr().err


@pytest.mark.slow
def test_distillation_is_resumed_too(teacher_run, tmp_path):
    command = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 2, "--checkpoint_every", 1)
    command = (*command, "--select", "best", "--teacher", teacher_run, "--report_to", "none", "--output_dir")
    assert children.run("distill", (*command, tmp_path / "whole")) == 0
    assert children.run("distill", (*command, tmp_path / "cut"), sabotage=("kd.train.meter.Meter.add", 6)) == -9
    assert children.run("distill", (*command, tmp_path / "cut")) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


@pytest.mark.slow
def test_losses_that_learn_draw_and_remember_are_resumed_too(teacher_run, tmp_path):
    last, stages = ("features.5", "features.4"), (["features.3", "features.5"], ["features.2", "features.4"])
    one, several = ("student_tap", "teacher_tap"), ("student_taps", "teacher_taps")
    losses = [
        {"class_path": "CRD", "init_args": {**dict(zip(one, last, strict=True)), "negatives": 64}},
        {"class_path": "MGD", "init_args": dict(zip(one, last, strict=True))},
        {"class_path": "ReviewKD", "init_args": {**dict(zip(several, stages, strict=True)), "weight": 1.0}},
        {"class_path": "OFD", "init_args": dict(zip(several, stages, strict=True))},
        {"class_path": "CTKD"},
    ]
    command = ("--student", "mnist_student", "--teacher", teacher_run, "--data.resize", 28, "--data.num_train", 200)
    command += ("--epochs", 2, "--checkpoint_every", 1, "--log_every", 1, "--losses", json.dumps(losses))
    command += ("--report_to", "none", "--output_dir")
    assert children.run("distill", (*command, tmp_path / "whole")) == 0
    for moment in (3, 4):
        assert (
            children.run("distill", (*command, tmp_path / "cut"), sabotage=("kd.train.meter.Meter.add", moment)) == -9
        )
    assert children.run("distill", (*command, tmp_path / "cut")) == 0
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")
    steps = [checkpoints(tmp_path / name / "checkpoints")[0] for name in ("whole", "cut")]
    learned = [(step / "distiller.safetensors").read_bytes() for step in steps]
    assert learned[0] == learned[1]
