"""Runs that end before their last step, by time or by validation, and runs that are extended: all resume exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import children
import pytest
import yaml
from conftest import UNEVEN, assert_one_line, interrupted_at
from test_resume import assert_same_run, rows

from kd.run.config import seconds_of
from kd.train import checkpoint
from kd.train.checkpoint import Progress
from kd.train.ending import Ending
from kd.train.meter import Meter
from kd.util.processes import TIME_OVER, StopSignal

# 5 steps an epoch
RUN = (*UNEVEN, "--epochs", 3, "--log_every", 3, "--checkpoint_every", 4, "--select", "best", "--report_to", "none")
COSINE = (*RUN, "--optimizer.schedule", "cosine", "--optimizer.warmup_epochs", 0.5)
STILL = (*RUN, "--optimizer.lr", 1e-12, "--epochs", 6)  # validation never moves: epoch 1 is the best


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture
def a_second_per_step(monkeypatch):
    """Clocks that stand still but for a second in each step."""
    add, now = Meter.add, [100.0]

    def added(*arguments):
        now[0] += 1
        add(*arguments)

    monkeypatch.setattr(Meter, "add", added)
    monkeypatch.setattr("kd.train.recorder.time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr("kd.util.processes.time", SimpleNamespace(monotonic=lambda: now[0]))


def test_a_run_ends_when_its_time_is_over_and_resumes_as_if_it_had_not(call, tmp_path, a_second_per_step):
    whole, cut = ("--output_dir", tmp_path / "whole"), ("--output_dir", tmp_path / "cut")
    assert call("train_teacher", *COSINE, *whole).status == 0
    result = call("train_teacher", *COSINE, *cut, "--max_time", "7s")
    assert result.status == 0, result.err
    assert "max_time 7s is over: ended after step 7 of 15, in epoch 2 of 3; the cosine had not reached" in result.out
    assert "test accuracy" in result.out
    written = summary(tmp_path / "cut")
    assert (written["stopped_by"], written["steps"], written["seconds"]) == ("max_time", 7, 7)
    last, test = rows(tmp_path / "cut")[-2:]
    assert (last["step"], last["epoch"], last["val/accuracy"]) == (7, 2, written["last"]["val_accuracy"])
    assert test["test/accuracy"] == written["test_accuracy"]
    result = call("train_teacher", *COSINE, *cut, "--max_time", "7s")
    assert "is finished already, by max_time; nothing to do (a larger --max_time resumes it" in result.out
    result = call("train_teacher", *COSINE, *cut, "--max_time", "0.2m")
    assert "resuming after step 7" in result.out
    assert summary(tmp_path / "cut")["steps"] == 12
    assert call("train_teacher", *COSINE, *cut).status == 0
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    assert yaml.safe_load((tmp_path / "cut/config.yaml").read_text())["max_time"] is None


def test_a_run_whose_time_is_over_takes_no_step_after_a_kill(call, tmp_path, monkeypatch, a_second_per_step):
    command = (*RUN, "--output_dir", tmp_path, "--max_time", "7s")

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kd.train.conclude._measure", killed)
        assert call("train_teacher", *command).status == 130
    assert not (tmp_path / "summary.json").exists()
    assert call("train_teacher", *command).status == 0
    assert summary(tmp_path)["steps"] == 7


def test_time_that_is_over_in_the_first_epoch_leaves_a_whole_run(call, tmp_path, a_second_per_step):
    result = call("train_teacher", *RUN, "--output_dir", tmp_path, "--max_time", "2s")
    assert result.status == 0, result.err
    written = summary(tmp_path)
    assert (written["steps"], written["best"]["epoch"], written["best"]["val_accuracy"] >= 0) == (2, 1, True)


class TimeIsOverOnTheLast:
    """In several processes: the last one's time is over after its third step, that of the others never."""

    def __call__(self) -> None:
        if os.environ["RANK"] == "0":
            return
        add, init, made = Meter.add, StopSignal.__init__, []

        def recorded(self, *arguments):
            init(self, *arguments)
            made.append(self)

        def added(self, terms, num_images, step, *counts):
            add(self, terms, num_images, step, *counts)
            if step == 2:
                made[0]._deadline = 0.0

        StopSignal.__init__, Meter.add = recorded, added


@pytest.mark.slow
def test_all_processes_stop_after_the_same_step(tmp_path):
    command = (*RUN, "--output_dir", tmp_path, "--max_time", "1d")
    assert children.run_several("train_teacher", command, 2, TimeIsOverOnTheLast()) == [0, 0]
    assert (summary(tmp_path)["steps"], summary(tmp_path)["stopped_by"]) == (3, "max_time")


def test_a_signal_wins_over_time():
    with StopSignal(1, time_left=0) as stop:
        assert stop.agreed() == TIME_OVER
        stop.received = 15
        assert stop.agreed() == 15
    with StopSignal(1) as stop:
        assert stop.agreed() == 0


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("45m", 2700), ("1.5h", 5400), ("2d", 172800)])
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


# Early stopping


def test_early_stopping_is_exact_and_a_larger_patience_resumes(call, tmp_path):
    never, some = ("--output_dir", tmp_path / "never"), ("--output_dir", tmp_path / "some")
    assert call("train_teacher", *STILL, *never).status == 0
    assert "stopped_by" not in summary(tmp_path / "never")
    with interrupted_at(8, 12):  # in the epochs that are waited for
        for _ in range(2):
            assert call("train_teacher", *STILL, *some, "--patience", 2).status == 130
        result = call("train_teacher", *STILL, *some, "--patience", 2)
    assert "not got better for 2 epochs (patience): ended after step 15 of 30, in epoch 3 of 6" in result.out
    written = summary(tmp_path / "some")
    assert (written["stopped_by"], written["steps"], written["best"]["epoch"]) == ("patience", 15, 1)
    for same in (2, 1):
        result = call("train_teacher", *STILL, *some, "--patience", same)
        assert "is finished already, by patience; nothing to do (a larger --patience resumes it" in result.out
    assert call("train_teacher", *STILL, *some, "--patience", 3).status == 0
    assert summary(tmp_path / "some")["steps"] == 20
    assert call("train_teacher", *STILL, *some).status == 0
    assert_same_run(tmp_path / "some", tmp_path / "never")


def test_early_stopping_waits_for_the_last_network_that_gets_better():
    config = SimpleNamespace(patience=2)
    progress = Progress(step=20, best={"student": {"epoch": 1}, "mean": {"epoch": 3}})
    ending = Ending(config, progress, total=50, per_epoch=5)
    assert not ending.reached
    progress.step = 24
    assert not ending.reached  # validation is at the ends of epochs
    progress.step = 25
    assert ending.reached
    assert (ending.stopped_by, ending.signal) == ("patience", 0)
    config.patience = 0
    assert not ending.reached


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--max_time", "00:12:00:00"), ("max_time '00:12:00:00'", "a number and its unit", "45m")),
        (("--max_time", "0s"), ("max_time '0s'", "a number and its unit")),
        (("--max_time", 30), ("max_time '30'", "a number and its unit")),
        (("--patience", 3, "--data.val_fraction", 0), ("patience 3 needs data.val_fraction above 0",)),
        (("--patience", -1), ("patience -1 must be at least 0",)),
    ],
)
def test_ends_that_cannot_be_are_one_line(call, tmp_path, arguments, words):
    assert_one_line(call("train_teacher", *arguments, "--output_dir", tmp_path / "run"), *words)


# Extending

MEAN = ("--learner", "MeanTeacher", "--learner.decay", 0.9)
STEPS = ("--optimizer.schedule", "multistep", "--optimizer.milestones", "[2, 4]", "--optimizer.warmup_epochs", 1)


@pytest.mark.parametrize("more", [(), (*STEPS, *MEAN)], ids=["constant", "multistep"])
def test_a_longer_run_has_the_bytes_of_one_from_the_start(call, tmp_path, more):
    long, short = ("--output_dir", tmp_path / "long"), ("--output_dir", tmp_path / "short")
    assert call("train_teacher", *RUN, *more, *long, "--epochs", 5).status == 0
    assert call("train_teacher", *RUN, *more, *short).status == 0
    assert summary(tmp_path / "short")["steps"] == 15
    result = call("train_teacher", *RUN, *more, *short, "--epochs", 5)
    assert "resuming after step 15" in result.out
    assert_same_run(tmp_path / "short", tmp_path / "long")
    for other in ("mean",) if more else ():
        one, two = (tmp_path / name / other for name in ("short", "long"))
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
        assert summary(one)["epochs"] == 5
    assert yaml.safe_load((tmp_path / "short/config.yaml").read_text())["epochs"] == 5
    assert "finished already; nothing to do (--overw" in call("train_teacher", *RUN, *more, *short, "--epochs", 5).out


def test_an_extension_that_is_killed_at_any_moment_resumes(call, tmp_path, monkeypatch):
    long, short = ("--output_dir", tmp_path / "long"), ("--output_dir", tmp_path / "short")
    assert call("train_teacher", *RUN, *long, "--epochs", 4).status == 0
    assert call("train_teacher", *RUN, *short).status == 0

    def killed(*_):
        raise KeyboardInterrupt

    for place in ("kd.run.folder.delete", "kd.run.folder.write_atomic", "kd.train.meter.Meter.add"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            assert call("train_teacher", *RUN, *short, "--epochs", 4).status == 130
        assert (tmp_path / "short/summary.json").exists() == (place == "kd.run.folder.delete")
    assert call("train_teacher", *RUN, *short, "--epochs", 4).status == 0
    assert_same_run(tmp_path / "short", tmp_path / "long")


def test_a_run_that_is_not_finished_is_extended_too(call, tmp_path, monkeypatch):
    long, short = ("--output_dir", tmp_path / "long"), ("--output_dir", tmp_path / "short")
    assert call("train_teacher", *RUN, *long, "--epochs", 4).status == 0
    with monkeypatch.context() as patch:
        patch.setattr(StopSignal, "agreed", lambda self: 15)
        assert call("train_teacher", *RUN, *short).status == 143
    assert call("train_teacher", *RUN, *short, "--epochs", 4).status == 0
    assert_same_run(tmp_path / "short", tmp_path / "long")


@pytest.mark.parametrize(
    ("first", "then", "words"),
    [
        (
            ("--optimizer.schedule", "cosine"),
            (),
            ("3 epochs", "cannot be extended to 4", "schedule cosine", "number of"),
        ),
        (("--max_steps", 4), (), ("cannot be extended to 4", "max_steps 4 ends it earlier")),
        ((), ("--seed", 5), ("another config", "epochs (3 there, 4 here); seed (0 there, 5 here)")),
        ((), ("--epochs", 2), ("another config", "epochs (3 there, 2 here)")),
    ],
)
def test_what_cannot_be_extended_is_one_line_and_stays(call, tmp_path, first, then, words):
    command = (*RUN, *first, "--output_dir", tmp_path)
    assert call("train_teacher", *command).status == 0
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert_one_line(call("train_teacher", *command, "--epochs", 4, *then), "--overwrite true", *words)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_without_a_checkpoint_nothing_is_extended(call, tmp_path):
    command = (*RUN, "--output_dir", tmp_path)
    assert call("train_teacher", *command).status == 0
    for path in (tmp_path / "checkpoints").rglob("*.*"):
        path.unlink()
    for path in (tmp_path / "checkpoints").iterdir():
        path.rmdir()
    result = call("train_teacher", *command, "--epochs", 4)
    assert_one_line(result, "is finished and holds no whole checkpoint", "--overwrite true")
    assert "finished already" in call("train_teacher", *command).out


def test_the_average_costs_no_forward_pass_where_no_term_reads_it(call, tmp_path, teacher_run, monkeypatch):
    """`--learner MeanTeacher` is timm's `--model-ema`, for both scripts."""
    from kd.students import MeanTeacher

    forward, seen = MeanTeacher.forward, []

    def watched(self, batch):
        handle = self.mean.network.register_forward_hook(lambda *_: seen.append(1))
        outputs = forward(self, batch)
        handle.remove()
        return outputs

    monkeypatch.setattr(MeanTeacher, "forward", watched)
    for script, more in (("train_teacher", ()), ("distill", ("--teacher", teacher_run))):
        recipe = "student" if script == "train_teacher" else "kd"
        command = ("--config", f"recipes/digits/{recipe}.yaml", "--data.num_train", 200, "--epochs", 2, *MEAN, *more)
        result = call(script, *command, "--output_dir", tmp_path / script)
        assert result.status == 0, result.err
        assert "val mean" in result.out
        assert summary(tmp_path / script / "mean")["test_accuracy"] >= 0
    assert not seen
    taught = (
        "--losses+",
        "{class_path: Term, init_args: {teacher: mean, loss: KL}}",
        "--output_dir",
        tmp_path / "taught",
    )
    assert call(script, *command, *taught).status == 0
    assert seen


def test_a_finished_run_whose_checkpoint_is_damaged_is_not_trained_again(call, tmp_path):
    command = (*RUN, "--output_dir", tmp_path)
    assert call("train_teacher", *command).status == 0
    (newest,) = (tmp_path / "checkpoints").glob("step_*")
    (newest / "distiller.safetensors").write_bytes(b"x")
    before = (tmp_path / "summary.json").read_bytes(), (tmp_path / "config.yaml").read_bytes()
    result = call("train_teacher", *command, "--epochs", 5)
    assert_one_line(result, "is finished and holds no whole checkpoint", "--overwrite true")
    assert ((tmp_path / "summary.json").read_bytes(), (tmp_path / "config.yaml").read_bytes()) == before
    assert "is finished already" in call("train_teacher", *command).out


@pytest.mark.parametrize("word", ["data", "seed"])
def test_a_summary_that_names_another_end_is_damaged(call, tmp_path, word):
    command = (*RUN, "--output_dir", tmp_path)
    assert call("train_teacher", *command).status == 0
    (tmp_path / "summary.json").write_text(json.dumps({**summary(tmp_path), "stopped_by": word}))
    assert_one_line(call("train_teacher", *command, "--epochs", 5), "summary.json", "stopped_by", word)


@pytest.mark.parametrize(
    "changes",
    [{"step": 10**30}, {"metrics_bytes": "x"}, {"best": {"student": 5}}, {"standing": {"student": {}}}, {"sums": 5}],
)
def test_progress_of_other_types_is_a_damaged_checkpoint(call, tmp_path, changes):
    command = (*RUN, "--output_dir", tmp_path)
    assert call("train_teacher", *command).status == 0
    (newest,) = (tmp_path / "checkpoints").glob("step_*")
    content = json.loads((newest / "state.json").read_text())
    del content["sha256_of_this"]
    content["progress"] |= changes
    (newest / "state.json").write_text(json.dumps({**content, "sha256_of_this": checkpoint._digest(content)}))
    result = call("train_teacher", *command, "--epochs", 5)
    assert_one_line(result, "holds no whole checkpoint")
    assert "is damaged (state.json: " in result.out
