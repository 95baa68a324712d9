"""A sweep's file means the same to W&B's agent and here; trials are chosen, stopped and resumed as it says."""

from __future__ import annotations

import functools
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import children
import pytest
import yaml
from conftest import ROOT, assert_one_line

pytest.importorskip("optuna", reason="optuna is not installed")

import optuna

from kd.tools import sweep
from kd.tools.sweep import SweepFile, read_parameter
from kd.util.errors import UserError

SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
MODULE = "kd.tools.sweep"


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Write a sweep of fake runs over these learning rates, as a grid if nothing else is said; its path.

    The working folder is one whose `distill.py` is the fake.
    """
    monkeypatch.setattr(sweep, "SECONDS", 0.02)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_RUN_ID", "")  # a search sets it for good
    shutil.copy(ROOT / "tests/tools/fake_run.py", tmp_path / "distill.py")

    def write(rates=(0.001,), **changes) -> str:
        flags = [f"--config={ROOT}/recipes/digits/kd.yaml", "--epochs=4"]
        content = {
            "program": "distill.py",
            "method": "grid",
            "metric": {"name": "val/accuracy", "goal": "maximize"},
            "parameters": {"optimizer.lr": {"values": list(rates)}},
            "command": ["${program}", *flags, "--output_dir=trials/$WANDB_RUN_ID", "${args}"],
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump({**content, **changes}))
        return str(tmp_path / "sweep.yaml")

    return write


def journal(tmp_path) -> list:
    storage = optuna.storages.JournalStorage(
        optuna.storages.journal.JournalFileBackend(str(tmp_path / "trials/study.journal"))
    )
    return optuna.load_study(study_name="sweep", storage=storage).trials


def states(tmp_path) -> list[str]:
    return [trial.state.name for trial in journal(tmp_path)]


@pytest.mark.slow
@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_the_files_of_sweeps_give_each_trial_what_wandbs_agent_would(file):
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    read = SweepFile(file)
    for name, (distribution, _) in read.parameters.items():
        for choice in getattr(distribution, "choices", [read.first[name]]):
            values = {**read.first, name: choice}
            command, config = read.trial("trial", values)
            assert config.output_dir == f"runs/sweeps/{file.stem}/trial"
            assert config.data.val_fraction > 0
            assert config.epochs > yaml.safe_load(file.read_text())["early_terminate"]["min_iter"]
    theirs = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})
    assert command[-len(values) :] == theirs["args"]
    assert command[:2] == [sys.executable, "distill.py"]
    assert yaml.safe_load(file.read_text())["command"][:4] == ["${env}", "accelerate", "launch", "--quiet"]
    assert f"python -m kd.sweep sweeps/{file.name}" in file.read_text()


def test_a_losss_argument_is_what_the_sweep_says():
    read = SweepFile(ROOT / "sweeps/digits_kl.yaml")
    _, config = read.trial("trial", {**read.first, "losses.KL.temperature": 7.5, "losses.KL.weight": 1e-05})
    assert [(type(loss).__name__, loss.weight) for loss in config.losses] == [("KL", 1e-05), ("CrossEntropy", 0.1)]
    assert config.losses[0].temperature == 7.5


@pytest.mark.parametrize(
    ("spec", "low", "middle", "high"),
    [
        ({"min": 1, "max": 8}, 1, 4.5, 8),
        ({"min": 1.0, "max": 8}, 1, 4.5, 8),
        ({"distribution": "log_uniform_values", "min": 0.001, "max": 10}, 0.001, 0.1, 10),
        ({"distribution": "log_uniform", "min": 0, "max": 2}, 1, 2.71828, 7.389),
        ({"distribution": "q_uniform", "min": 0, "max": 10, "q": 0.5}, 0, 5, 10),
    ],
)
def test_what_is_drawn_follows_wandbs_distributions(make, spec, low, middle, high):
    read = SweepFile(make(method="random", parameters={"optimizer.lr": spec}))
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    drawn = [study.ask({"optimizer.lr": read.parameters["optimizer.lr"][0]}).params for _ in range(300)]
    given = [float(read.values(each)["optimizer.lr"]) for each in drawn]
    assert low <= min(given) < max(given) <= high
    assert 0.4 < sum(value < middle for value in given) / 300 < 0.6
    if spec.get("distribution") is None and isinstance(spec["min"], int):
        assert set(given) == set(range(1, 9))
    if "q" in spec:
        assert {value % 0.5 for value in given} == {0}


def test_a_list_is_given_as_the_text_that_a_flag_takes():
    assert read_parameter(values=["[KL]", ["KL", {"x": 1}]])[0].choices == ("[KL]", '["KL", {"x": 1}]')


def test_a_missing_optuna_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    monkeypatch.delitem(sys.modules, "kd.tools.sweep")
    with pytest.raises(UserError, match="needs the package optuna"):
        importlib.import_module("kd.tools.sweep")


@pytest.mark.slow
def test_a_grid_is_run_whole_and_the_best_on_validation_wins(call, make, tmp_path):
    result = call(MODULE, make([0.1, 0.001, 0.01]))
    assert result.status == 0, result.err
    assert states(tmp_path) == ["COMPLETE"] * 3
    assert [trial.params["optimizer.lr"] for trial in journal(tmp_path)] == [0.1, 0.001, 0.01]
    table = [line.split() for line in result.out.splitlines() if line.startswith("trial_") and ":" not in line]
    assert [(row[0], float(row[2])) for row in table] == [("trial_0001", 90), ("trial_0002", 70), ("trial_0000", 50)]
    assert "launch distill.py --config trials/trial_0001/config.yaml --seed 1 --output_dir trials/trial_0001_seed1" in (
        result.out
    )
    again = call(MODULE, make([0.1, 0.001, 0.01]))
    assert again.status == 0
    assert "trials: 3 complete" in again.out
    assert len(journal(tmp_path)) == 3
    assert_one_line(call(MODULE, make([0.1, 0.2])), "trials holds another sweep", "name another output_dir")


@pytest.mark.slow
def test_a_trial_that_lags_behind_is_stopped_and_told_why(call, make, tmp_path):
    early = {"type": "hyperband", "min_iter": 2, "eta": 2}
    result = call(MODULE, make([0.001, 0.1, 0.01], early_terminate=early))
    assert states(tmp_path) == ["COMPLETE", "PRUNED", "PRUNED"]
    assert "trial_0001: stopped after epoch 2: val/accuracy 25 lags behind 45 of trial_0000" in result.out
    assert "stopped by SIGTERM" in (tmp_path / "trials/trial_0001.log").read_text()
    assert not (tmp_path / "trials/trial_0001/summary.json").exists()


@pytest.mark.slow
def test_one_that_diverges_is_the_worst_and_three_that_fail_in_a_row_end_the_sweep(call, make, tmp_path):
    result = call(MODULE, make([0.5, 0.25, 0.001]))
    assert result.status == 0
    assert states(tmp_path) == ["PRUNED", "FAIL", "COMPLETE"]
    assert "trial_0000: diverged: error: the loss is not finite at step 7" in result.out
    assert "trial_0001: failed: error: no such teacher" in result.out
    failing = make(method="random", parameters={"optimizer.lr": {"value": 0.25}, "seed": {"values": [1, 2]}})
    Path(failing).write_text(Path(failing).read_text().replace("trials/", "failing/"))
    result = call(MODULE, failing, "--trials", 9)
    assert result.status == 2
    assert "error: 3 trials failed one after another; the last: trial_0002 failed: error: no such teacher" in result.err


@pytest.mark.slow
def test_without_validation_images_nothing_is_selected(call, make, tmp_path, monkeypatch):
    monkeypatch.setattr("kd.tools.sweep.measured", lambda folder, metric: {})
    result = call(MODULE, make())
    assert "no val/accuracy" in result.out
    assert "data.val_fraction" in result.out
    assert states(tmp_path) == ["FAIL"]


@pytest.mark.slow
def test_what_is_drawn_does_not_depend_on_how_often_the_sweep_was_stopped(call, make, tmp_path):
    rate = {"distribution": "log_uniform_values", "min": 0.0001, "max": 0.1}
    file = make(method="random", parameters={"optimizer.lr": rate})
    assert call(MODULE, file, "--trials", 3).status == 0
    whole = [trial.params for trial in journal(tmp_path)]
    (tmp_path / "trials").rename(tmp_path / "whole")
    for count in (1, 3):
        assert call(MODULE, file, "--trials", count).status == 0
    assert [trial.params for trial in journal(tmp_path)] == whole
    assert len({tuple(params.values()) for params in whole}) == 3


def worker(file: str):
    """A worker in a process of its own, in the working folder; it prints into `said` beside the file."""
    here = functools.partial(os.chdir, os.getcwd())
    return children.start(MODULE, [file], {"PYTHONPATH": str(ROOT)}, here, Path(file).with_name("said"))


def wait_for(condition, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("torn", ["at the end", "in the middle"])
def test_a_torn_line_of_the_journal_loses_no_trial(call, make, tmp_path, torn):
    file = make([0.1, 0.001, 0.01])
    assert call(MODULE, file, "--trials", 2).status == 0
    study = tmp_path / "trials/study.journal"
    lines = study.read_bytes().splitlines(keepends=True)
    half = lines[-1][: len(lines[-1]) // 2]
    study.write_bytes(b"".join([*lines, half] if torn == "at the end" else [*lines[:5], half + b"\n", *lines[5:]]))
    result = call(MODULE, file)
    assert result.status == 0, result.err
    assert states(tmp_path) == ["COMPLETE"] * 3


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_that_ends_leaves_its_trial_to_the_next(call, make, tmp_path, number):
    file = make([0.125, 0.001])
    first = worker(file)
    wait_for((tmp_path / "trials/trial_0000/metrics.jsonl").is_file)
    os.kill(first.pid, number)
    assert children.finish(first) == [-9 if number == signal.SIGKILL else 143], (tmp_path / "said").read_text()
    assert number == signal.SIGKILL or "stopped by SIGTERM" in (tmp_path / "trials/trial_0000.log").read_text()
    assert states(tmp_path)[0] == "RUNNING"
    (tmp_path / "trials/go").touch()
    result = call(MODULE, file)
    assert result.status == 0, result.err
    assert states(tmp_path) == ["COMPLETE", "COMPLETE"]
    rows = [json.loads(line) for line in (tmp_path / "trials/trial_0000/metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.slow
def test_two_workers_share_the_trials(call, make, tmp_path):
    file = make([0.125, 0.001, 0.01])
    first = worker(file)
    wait_for((tmp_path / "trials/trial_0000/metrics.jsonl").is_file)
    result = call(MODULE, file)
    assert result.status == 0
    assert "trial_0000:" not in result.out
    assert "trials: 1 running, 2 complete" in result.out
    (tmp_path / "trials/go").touch()
    children.finish(first)
    assert "trials: 3 complete" in (tmp_path / "said").read_text()
    assert states(tmp_path) == ["COMPLETE"] * 3


@pytest.mark.slow
def test_a_real_run_is_stopped_with_its_sweep_and_resumes_with_it(tmp_path, teacher_run):
    base = [f"--teacher={teacher_run}", "--data.num_train=200", "--epochs=2", "--num_threads=1", "--report_to=none"]
    base.append(f"--output_dir={tmp_path}/s/$WANDB_RUN_ID")
    content = yaml.safe_load((ROOT / "sweeps/digits_kl.yaml").read_text())
    command = [word for word in content["command"] if not word.startswith("--output_dir")]
    content |= {"command": [*command[:-1], *base, "${args}"], "run_cap": 1}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(content))
    run = tmp_path / "s/trial_0000"
    first = worker(str(tmp_path / "sweep.yaml"))
    wait_for((run / "config.yaml").is_file)
    first.terminate()
    assert children.finish(first) == [143]
    assert not (run / "summary.json").exists()
    command = [sys.executable, "-m", "kd.sweep", tmp_path / "sweep.yaml"]
    second = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert second.returncode == 0, second.stderr
    losses = yaml.safe_load((run / "config.yaml").read_text())["losses"]
    drawn = [losses[0]["init_args"][name] for name in ("temperature", "weight")]
    value = json.loads((run / "summary.json").read_text())["val_accuracy"]
    assert re.search(
        rf"trial_0000  val/accuracy {value:.4f} .*temperature={drawn[0]:.4g} .*weight={drawn[1]:.4g} ", second.stdout
    )
