"""What the corpus of bad input shares: runs of a tenth of a second, and scripts that must refuse in one line."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import ROOT, assert_one_line

CONFIG = {"train_teacher": "recipes/digits/student.yaml", "distill": "recipes/digits/kd.yaml"}
# Two steps on 20 digits, measured on 50: a tenth of a second.
QUICK = ("--data.num_train", 20, "--data.batch_size", 12, "--data.val_fraction", 0, "--data.test_fraction", 0.03)
QUICK = (*QUICK, "--max_steps", 2, "--log_every", 1, "--report_to", "none")
NOTES = b"the user's own\n"


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    """On images this small a second thread only waits, and on a busy machine it doubles the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """A folder with two finished runs, `student` and `teacher`; tests work on copies."""
    return _trained(tmp_path_factory.getbasetemp() / "corpus")


@functools.cache
def _trained(folder: Path) -> Path:
    """Once for all files: each that imports the fixture has one of its own."""
    import train_teacher

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        for name in ("student", "teacher"):
            arguments = ("--config", f"recipes/digits/{name}.yaml", *QUICK, "--output_dir", folder / name)
            assert train_teacher.main([str(argument) for argument in arguments]) == 0
    return folder


@pytest.fixture
def teacher(runs, tmp_path) -> Path:
    """A finished teacher's folder that a test may damage."""
    return Path(shutil.copytree(runs / "teacher", tmp_path / "teacher"))


@pytest.fixture
def out(tmp_path) -> Path:
    """An output folder with a file of the user's, hidden so that the folder still counts as empty."""
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / ".notes").write_bytes(NOTES)
    return folder


@pytest.fixture
def finished(runs, out) -> Path:
    """The output folder with the finished run of `train()` in it."""
    return Path(shutil.copytree(runs / "student", out, dirs_exist_ok=True))


@pytest.fixture
def train(call, out):
    """A training script, two steps on few digits: `train("--model", "x")`, `train(..., script="distill")`."""

    def run(*arguments, script: str = "train_teacher"):
        return call(script, "--config", CONFIG[script], *QUICK, "--output_dir", out, *arguments)

    return run


@pytest.fixture
def refused(train, out):
    """Run a script that must refuse in one line with these words and leave no results and no loss."""

    def run(arguments, words, script: str = "train_teacher") -> None:
        assert_one_line(train(*arguments, script=script), *words)
        assert (out / ".notes").read_bytes() == NOTES
        assert not (out / "summary.json").exists()
        assert not (out / "model.safetensors").exists()

    return run


@pytest.fixture
def during(monkeypatch):
    """Do something in the second step of the next run: `during(function)`."""
    from kd.train.meter import Meter

    def arrange(act) -> None:
        add, calls = Meter.add, []

        def patched(*arguments):
            calls.append(None)
            if len(calls) == 2:
                act()
            return add(*arguments)

        monkeypatch.setattr(Meter, "add", patched)

    return arrange


@pytest.fixture
def stopped(train, during):
    """Start a run that a signal stops after two of its four steps: `stopped("--overwrite", "true")`."""

    def run(*arguments) -> None:
        during(lambda: os.kill(os.getpid(), signal.SIGTERM))
        assert train("--max_steps", 4, *arguments).status == 128 + signal.SIGTERM

    return run


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and time, without those by which a live run holds the folder."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name not in (".lock", ".owner")]
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def losses(*terms: tuple[str, dict]) -> str:
    return json.dumps([{"class_path": name, "init_args": arguments} for name, arguments in terms])
