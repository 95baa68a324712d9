"""The record of a run: metrics.jsonl is the truth, a tracker's record equals it, one tracker run a job."""

from __future__ import annotations

import json

import children
import pytest
from conftest import SMALL
from test_resume import rows

from kd.track import choose_tracker


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


def test_a_key_in_netrc_counts(monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert choose_tracker("auto") == "wandb"


def test_metrics_have_every_term_once_a_step(call, tmp_path):
    assert call("train_teacher", *SMALL, "--output_dir", tmp_path / "run").status == 0
    written = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = [row for row in written if "train/loss" in row]
    epochs = [row for row in written if "epoch/loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [row["images_seen"] for row in steps] == [64, 128, 192, 200, 264, 328, 392, 400]
    assert [row["epoch"] for row in epochs] == [1, 2]
    for row in steps:
        assert row["train/loss"] == row["train/CrossEntropy"]
        assert row["images_per_second"] > 0
    sizes = [64, 64, 64, 8]
    mean = sum(row["train/loss"] * size for row, size in zip(steps[:4], sizes, strict=True)) / 200
    assert epochs[0]["epoch/loss"] == pytest.approx(mean, rel=1e-12)


def test_tensorboard_records_the_same_numbers(call, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = call("train_teacher", *SMALL, "--output_dir", tmp_path / "run", "--report_to", "tensorboard")
    assert result.status == 0
    record = EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    for row in rows(tmp_path / "run"):
        for key in ("train/loss", "lr", "val/accuracy"):
            if key in row:
                points = {event.step: event.value for event in record.Scalars(key)}
                assert points[row["step"]] == pytest.approx(row[key], rel=1e-6)


@pytest.mark.slow
def test_wandb_offline_without_a_prompt_is_one_run_also_after_a_restart(tmp_path):
    command = (*SMALL, "--output_dir", tmp_path / "run", "--report_to", "wandb", "--checkpoint_every", 2)
    statuses = children.run_several("train_teacher", command, 2, ("kd.meter.Meter.add:SIGTERM", 3))
    assert statuses == [143, 143]
    assert children.run_several("train_teacher", command, 2) == [0, 0]
    identity = json.loads((tmp_path / "run/tracker.json").read_text())["wandb_id"]
    folders = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) in (1, 2)  # one a start, two starts in the same second share a folder
    assert {folder.name.rpartition("-")[2] for folder in folders} == {identity}
    for folder in folders:
        assert (folder / f"run-{identity}.wandb").stat().st_size > 0
    assert [row["step"] for row in rows(tmp_path / "run") if "train/loss" in row] == list(range(1, 9))
