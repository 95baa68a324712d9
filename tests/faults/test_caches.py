"""Caches that several jobs and processes build at once, whose builder is killed, or whose disk is full."""

from __future__ import annotations

import gzip
import http.server
import os
import signal
import threading
import time
from pathlib import Path

import children
import numpy as np
import pytest
from conftest import SMALL
from job import Disk, before
from test_named_sets import md5, pixels, write_mnist

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
TABLE = ("kd.teachers.tables", "_build", ("kd.teachers.tables", "file_sha256"))


def builds(cache: Path, kind: str) -> list[str]:
    return sorted(path.name for path in (cache / kind).iterdir() if path.suffix != ".lock")


def one_dies_and_another_takes_over(script: str, command: tuple, sabotage, folder: Path) -> None:
    """Run two jobs and one of two processes at once, whose first builder is killed; the other jobs finish."""
    jobs = [children.start(script, (*command, "--output_dir", folder / str(i)), None, sabotage) for i in range(2)]
    several = children.start_several(script, (*command, "--output_dir", folder / "several"), 2, sabotage)
    statuses = children.finish(*jobs, *several)
    assert statuses.count(-9) == 1
    # the jobs that lost no process are finished
    assert statuses[:2] == [0, 0] or (sorted(statuses[:2]) == [-9, 0] and statuses[2:] == [0, 0])


def test_when_the_builder_of_a_store_dies_another_job_takes_over(image_folder, tmp_path):
    data = ("--data.source", image_folder, "--data.num_train", "null", "--data.resize", 28, "--data.crop", 28)
    command = (*SMALL, *data, "--report_to", "none", "--data.cache_dir", tmp_path / "cache")
    sabotage = BuilderDies(tmp_path / "log", *STORE)
    one_dies_and_another_takes_over("train_teacher", command, sabotage, tmp_path)
    assert (tmp_path / "log").read_text() == 2 * "built\n"
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
    one_dies_and_another_takes_over("distill", command, sabotage, tmp_path)
    assert (tmp_path / "log").read_text() == 2 * "built\n"
    (table,) = builds(tmp_path / "cache", "tables")
    assert ".tmp" not in table
    alone = ("--data.cache_dir", tmp_path / "other", "--output_dir", tmp_path / "alone")
    assert children.run("distill", (*command, *alone)) == 0
    for path in (tmp_path / "other/tables" / table).glob("*.npy"):
        assert np.array_equal(np.load(path), np.load(tmp_path / "cache/tables" / table / path.name))


class FetcherDies:
    """In every process: MNIST comes from a server of the test's, and whoever fetches first is killed with half a file.

    Args:
        url: of the folder that holds the archives.
        md5: of each archive.
        moment: `download`, the first archive is half there; `unpack`, what is out of the last one is.
    """

    def __init__(self, url: str, md5: dict[str, str], moment: str, died: Path):
        self.url, self.md5, self.moment, self.died = url, md5, moment, died

    def __call__(self) -> None:
        from torchvision.datasets import MNIST, utils

        MNIST.mirrors, MNIST.resources = [self.url], list(self.md5.items())
        name = {"download": "_urlretrieve", "unpack": "extract_archive"}[self.moment]
        first = getattr(utils, name)

        def halved(source, target, *more):
            first(source, target, *more)
            if self.moment == "unpack" and Path(source).name != list(self.md5)[-1]:
                return
            try:
                os.close(os.open(self.died, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                return
            written = Path(target) if self.moment == "download" else Path(target) / Path(source).stem
            os.truncate(written, written.stat().st_size // 2)
            time.sleep(0.5)  # so that the others come
            os.kill(os.getpid(), signal.SIGKILL)

        setattr(utils, name, halved)


@pytest.mark.parametrize("moment", ["download", "unpack"])
def test_when_the_fetcher_of_a_data_set_dies_another_job_takes_over(tmp_path, moment):
    served, fetched = tmp_path / "served", []
    files = write_mnist(served, 120)
    for file in files:
        (served / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments):
            super().__init__(*arguments, directory=served)

        def log_message(self, *_):
            fetched.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        md5s = {f"{file.name}.gz": md5(served / f"{file.name}.gz") for file in files}
        sabotage = FetcherDies(f"http://127.0.0.1:{server.server_address[1]}/", md5s, moment, tmp_path / "died")
        data = ("--data.source", "mnist", "--data.num_train", "null", "--data.download_dir", tmp_path / "sets")
        command = (*SMALL, *data, "--report_to", "none", "--data.cache_dir", tmp_path / "cache")
        one_dies_and_another_takes_over("train_teacher", command, sabotage, tmp_path)
        server.shutdown()
    for file in files:
        assert (tmp_path / "sets/MNIST/raw" / file.name).read_bytes() == file.read_bytes()
    assert not list((tmp_path / "sets").glob(".*.unfinished"))
    # an archive that was whole is not fetched once more
    first, *others = (fetched.count(f"/{file.name}.gz") for file in files)
    assert first == others[0] * (2 if moment == "download" else 1)
    assert len(set(others)) == 1
    (store,) = builds(tmp_path / "cache", "store")
    stored = np.load(tmp_path / "cache/store" / store / "train-images.npy")
    assert np.array_equal(stored[:, 0], pixels(120, 28, 28))


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
