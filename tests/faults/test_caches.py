"""Caches that several jobs and processes build at once, whose builder is killed, or whose disk is full."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import children
import numpy as np
import pytest
from conftest import SMALL
from job import Disk, before

pytestmark = pytest.mark.slow


class BuilderDies:
    """In every process: note each build in a file, and kill the process that builds first, in the middle of it.

    Args:
        log: gets one line a build.
        module, build: of the function that builds under the lock.
        inside: of a function that it calls when a part is written.
    """

    def __init__(self, log: Path, module: str, build: str, inside: tuple[str, str]):
        self.log, self.module, self.build, self.inside = log, module, build, inside

    def __call__(self) -> None:
        before(self.module, self.build, self.note)
        before(*self.inside, self.die)

    def note(self, *_arguments) -> None:
        time.sleep(0.5)  # so that the others come while it builds
        with self.log.open("a") as file:
            file.write("built\n")

    def die(self, *_arguments) -> None:
        try:
            os.close(os.open(self.log.with_name("died"), os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)


STORE = ("kd.data.store", "build", ("kd.data.build", "_reserve"))
TABLE = ("kd.fixed_table", "_build", ("kd.fixed_table", "_digest"))


def builds(cache: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (cache / kind).iterdir() if path.suffix != ".lock")


def test_when_the_builder_of_a_store_dies_another_job_takes_over(image_folder, tmp_path):
    data = ("--data.source", image_folder, "--data.num_train", "null", "--data.resize", 28, "--data.crop", 28)
    command = (*SMALL, *data, "--report_to", "none", "--data.cache_dir", tmp_path / "cache")
    sabotage = BuilderDies(tmp_path / "log", *STORE)
    jobs = [
        children.start("train_teacher", (*command, "--output_dir", tmp_path / str(i)), None, sabotage) for i in range(2)
    ]
    several = children.start_several("train_teacher", (*command, "--output_dir", tmp_path / "several"), 2, sabotage)
    statuses = children.finish(*jobs, *several)
    assert statuses.count(-9) == 1
    assert (tmp_path / "log").read_text() == 2 * "built\n"
    # the jobs that lost no process are finished
    assert statuses[:2] == [0, 0] or (sorted(statuses[:2]) == [-9, 0] and statuses[2:] == [0, 0])
    (store,) = builds(tmp_path / "cache", "store")
    assert ".tmp" not in store
    alone = ("--data.cache_dir", tmp_path / "other", "--output_dir", tmp_path / "alone")
    assert children.run("train_teacher", (*command, *alone)) == 0
    for path in (tmp_path / "cache/store" / store).iterdir():
        assert path.read_bytes() == (tmp_path / "other/store" / store / path.name).read_bytes()


def test_when_the_builder_of_a_table_dies_another_job_takes_over(teacher_run, tmp_path):
    command = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 2, "--report_to", "none")
    command = (*command, "--teacher", teacher_run, "--data.cache_dir", tmp_path / "cache")
    sabotage = BuilderDies(tmp_path / "log", *TABLE)
    jobs = [children.start("distill", (*command, "--output_dir", tmp_path / str(i)), None, sabotage) for i in range(2)]
    several = children.start_several("distill", (*command, "--output_dir", tmp_path / "several"), 2, sabotage)
    statuses = children.finish(*jobs, *several)
    assert statuses.count(-9) == 1
    assert (tmp_path / "log").read_text() == 2 * "built\n"
    assert statuses[:2] == [0, 0] or (sorted(statuses[:2]) == [-9, 0] and statuses[2:] == [0, 0])
    (table,) = builds(tmp_path / "cache", "tables")
    assert ".tmp" not in table
    alone = ("--data.cache_dir", tmp_path / "other", "--output_dir", tmp_path / "alone")
    assert children.run("distill", (*command, *alone)) == 0
    for path in (tmp_path / "other/tables" / table).glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(tmp_path / "cache/tables" / table / path.name))


@pytest.fixture
def disk(tmp_path):
    if reason := Disk.missing():
        pytest.skip(reason)
    with Disk(tmp_path / "disk", megabytes=2) as disk:
        yield disk


def test_a_full_disk_while_a_store_is_built(image_folder, tmp_path, disk):
    data = ("--data.source", image_folder, "--data.num_train", "null", "--data.resize", 28, "--data.crop", 28)
    command = (*SMALL, *data, "--report_to", "none", "--output_dir", tmp_path / "run")
    command = (*command, "--data.cache_dir", disk.folder / "cache", "--data.store", "disk")
    disk.fill(8192)
    assert refused("train_teacher", command, tmp_path / "said", "no space for the decoded images", "data.cache_dir")
    assert builds(disk.folder / "cache", "store") == []
    disk.free()
    assert children.run("train_teacher", command) == 0


def test_a_full_disk_while_a_table_is_built(teacher_run, tmp_path, disk):
    command = ("--config", "recipes/digits/kd.yaml", "--data.num_train", 200, "--epochs", 2, "--report_to", "none")
    command = (*command, "--teacher", teacher_run, "--data.cache_dir", disk.folder / "cache")
    store = (*SMALL, "--max_steps", 1, "--report_to", "none", "--data.cache_dir", disk.folder / "cache")
    assert children.run("train_teacher", (*store, "--output_dir", tmp_path / "first")) == 0  # the images are there
    command = (*command, "--output_dir", tmp_path / "run")
    disk.fill()
    assert refused("distill", command, tmp_path / "said", "no space left on device", str(disk.folder / "cache"))
    assert builds(disk.folder / "cache", "tables") == []
    disk.free()
    assert children.run("distill", command) == 0


def refused(script: str, command: tuple, output: Path, *words: str) -> bool:
    """Whether the script ends with one line that has these words."""
    (status,) = children.finish(children.start(script, command, output=output))
    text = output.read_text()
    assert status in (1, 2), text
    assert "Traceback" not in text
    (line,) = [line for line in text.splitlines() if line.startswith("error")]
    return all(word in line for word in words)
