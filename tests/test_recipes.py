"""The tutorial's recipes: one command runs them all, and students that are compared start from the same weights."""

from __future__ import annotations

import functools
import shlex
import subprocess

import numpy as np
import pytest
from conftest import ROOT

from kd.data import Data, Split
from kd.data.store import Store
from kd.run.config import DistillConfig, TeacherConfig
from kd.run.parse import parse
from kd.train.setup import build_trained


@functools.cache
def first_weights(recipe: str) -> tuple[list[bytes], tuple]:
    """A recipe's weights before its first step, and what else must be equal in a comparison."""
    content = (ROOT / f"recipes/{recipe}.yaml").read_text()
    config = parse(DistillConfig if "student:" in content else TeacherConfig, ["--config", f"recipes/{recipe}.yaml"])
    store = Store(np.zeros((20, 3, 32, 32), np.uint8), np.arange(20) % 10)
    split = Split(store, np.arange(20))
    data = Data([f"class {i}" for i in range(10)], split, None, split)
    name = config.student if isinstance(config, DistillConfig) else config.model
    weights = [tensor.numpy().tobytes() for tensor in build_trained(name, data, config).state_dict().values()]
    return weights, (config.data, config.optimizer, config.epochs, config.seed)


@pytest.mark.parametrize("recipe", ["kd", "cosine", "regressor"])
def test_students_that_are_compared_start_from_the_same_weights(recipe):
    assert first_weights(f"cifar10/{recipe}") == first_weights("cifar10/student")


def test_without_dropout_the_first_weights_are_the_same():
    assert first_weights("cifar10/student_nodropout") == first_weights("cifar10/student")
    assert first_weights("cifar10/teacher_nodropout") == first_weights("cifar10/teacher")
    assert first_weights("cifar10/teacher")[0] != first_weights("cifar10/student")[0]


@pytest.mark.slow
def test_one_command_runs_the_tutorial_for_each_seed(tmp_path):
    """The commands that make gives the shell, with a stand-in for each program that writes its arguments down."""
    commands = tmp_path / "commands"
    for program in ("accelerate", "python"):
        path = tmp_path / "bin" / program
        path.parent.mkdir(exist_ok=True)
        path.write_text(f'#!/bin/sh\necho {program} "$@" >> {shlex.quote(str(commands))}\n')
        path.chmod(0o755)
    (tmp_path / ".installed").touch()
    arguments = [f"VENV={tmp_path}", "SEEDS=42 43", "DATA=folder", "ARGS=--epochs 1"]
    subprocess.run(["make", "cifar10", *arguments], cwd=ROOT, check=True, capture_output=True)
    *runs, comparison = (line.split() for line in commands.read_text().splitlines())
    names = [path.stem for path in (ROOT / "recipes/cifar10").glob("*.yaml")]
    folders = []
    for program, launch, quiet, script, *argv in runs:
        assert (program, launch, quiet) == ("accelerate", "launch", "--quiet")
        config = parse({"train_teacher.py": TeacherConfig, "distill.py": DistillConfig}[script], argv)
        assert (config.data.source, config.epochs) == ("folder", 1)
        for earlier in (getattr(config, "teacher", None), config.init_from):
            assert earlier is None or earlier in folders
        assert config.output_dir.startswith(f"runs/cifar10/seed_{config.seed}/")
        folders.append(config.output_dir)
    assert sorted(folders) == sorted(f"runs/cifar10/seed_{seed}/{name}" for seed in (42, 43) for name in names)
    assert comparison == ["python", "evaluate.py", *folders, "--report", "runs/cifar10/report"]
