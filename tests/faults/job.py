"""A run that faults are injected into, and what they need: a slow step, a torn write, a small disk, a jumping clock."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import children
from conftest import UNEVEN
from filelock import FileLock
from test_resume import assert_same_run

from kd.train.checkpoint import load_newest

# 200 digits in batches of 48: 5 steps an epoch, the last one uneven; dropout, flips and crops are all drawn.
ARGUMENTS = (
    *UNEVEN,
    *("--data.pad_crop", 1, "--epochs", 3, "--checkpoint_every", 2, "--log_every", 1, "--report_to", "none"),
)
STEPS = 15
STATED = 60  # seconds in which the others end after one process was killed; they take 5 and this machine may be busy


class Job:
    """One run in a folder of its own on one process or several.

    Args:
        folder: the run is in `folder/run`, what it prints in `folder/output`.
        count: number of processes.
        draw: whatever a fault leaves to chance is drawn from it.
        kind: which of the kinds of a fault is injected.
        whole: gives the run of as many processes that was never interrupted.
    """

    def __init__(
        self, folder: Path, count: int, draw: random.Random, kind: str, whole: Callable[[int], tuple[Path, float]]
    ):
        self.folder, self.count, self.draw, self.kind = folder, count, draw, kind
        self.run_folder, self.output = folder / "run", folder / "output"
        self.uninterrupted, self.seconds = whole(count)

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    def command(self, *more) -> tuple:
        return (*ARGUMENTS, "--output_dir", self.run_folder, *more)

    def start(self, *more, sabotage=None, count: int | None = None, environment: dict | None = None) -> list:
        """Start its processes; the sabotage is in the last of them, or in all if it is a function."""
        self.output.unlink(missing_ok=True)
        if self.count == 1 and count is None:
            return [children.start("train_teacher", self.command(*more), environment, sabotage, self.output)]
        count = count or self.count
        return children.start_several("train_teacher", self.command(*more), count, sabotage, environment, self.output)

    def run(self, *more, **how) -> list[int]:
        return children.finish(*self.start(*more, **how))

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    def wait_for(self, words: str, alive: Callable[[], bool], seconds: float = 300) -> None:
        """Wait until these words are printed; they must be before the run ends."""
        end = time.monotonic() + seconds
        while words not in self.said:
            assert alive(), self.said
            assert time.monotonic() < end, self.said
            time.sleep(0.01)

    def errors(self) -> list[str]:
        """The lines of an error; asserts that there is no traceback."""
        assert "Traceback" not in self.said, self.said
        assert "Exception ignored" not in self.said, self.said
        return [line for line in self.said.splitlines() if line.startswith("error")]

    def saved_step(self) -> int:
        return load_newest(self.checkpoints)[0].step

    def resumes(self, *said: str) -> None:
        """Started again it ends well, says these words, and has the bytes of the run that was never interrupted."""
        assert self.run() == [0] * self.count, self.said
        for words in said:
            assert words in self.said, self.said
        assert_same_run(self.run_folder, self.uninterrupted)

    def wait_until_free(self) -> None:
        """Until no process holds the folder any more: those that outlive their launcher are not our children."""
        with FileLock(self.run_folder / ".lock", timeout=STATED):
            pass


def kill_all(processes: list, number: int = signal.SIGKILL) -> None:
    """Send a signal to all that have not ended."""
    for process in processes:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


class Slowly:
    """In every process: a pause at each step, so that a fault from outside finds it training."""

    def __init__(self, seconds: float = 0.1):
        self.seconds = seconds

    def __call__(self) -> None:
        before("kd.train.meter", "Meter.add", lambda *_: time.sleep(self.seconds))


class TornWrite:
    """In every process: SIGKILL inside the n-th file that a checkpoint writes, after a share of its bytes."""

    def __init__(self, count: int, share: float):
        self.count, self.share, self.calls = count, share, 0

    def __call__(self) -> None:
        before("kd.train.checkpoint", "write_synced", self.tear)

    def tear(self, path: Path, content: bytes) -> None:
        self.calls += 1
        if self.calls == self.count:
            path.write_bytes(content[: int(self.share * len(content))])
            os.kill(os.getpid(), signal.SIGKILL)


class FillDisk:
    """In the first process, the one that writes: the disk becomes full when a function is called the n-th time."""

    def __init__(self, disk: Disk, module: str, name: str, count: int, left: int = 0):
        self.disk, self.place, self.count, self.left, self.calls = disk, (module, name), count, left, 0

    def __call__(self) -> None:
        if os.environ.get("RANK", "0") == "0":
            before(*self.place, self.fill)

    def fill(self, *_arguments) -> None:
        self.calls += 1
        if self.calls == self.count:
            self.disk.fill(self.left)


class NotANumber:
    """In every process: on one of them the loss of the n-th step is not a number."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step, self.done = rank, step, 0

    def __call__(self) -> None:
        from kd.losses import CrossEntropy

        first = CrossEntropy.forward

        def forward(loss, *inputs):
            bad = self.done == self.step - 1 and os.environ.get("RANK", "0") == str(self.rank)
            return first(loss, *inputs) * (float("nan") if bad else 1)

        CrossEntropy.forward = forward
        before("kd.train.meter", "Meter.add", self.count)

    def count(self, *_step) -> None:
        self.done += 1


class JumpingClock:
    """In every process: the time of day is another by up to ten years, forth or back, each time it is asked for."""

    def __init__(self, seed: int):
        self.seed = seed

    def __call__(self) -> None:
        draw, now, now_ns, year = random.Random(self.seed), time.time, time.time_ns, 365 * 86400
        time.time = lambda: now() + draw.uniform(-10, 10) * year
        time.time_ns = lambda: now_ns() + draw.randint(-10, 10) * year * 10**9


def before(module: str, name: str, do: Callable) -> None:
    """Let `do` be called with a function's arguments before it is."""
    import importlib

    owner, _, attribute = name.rpartition(".")
    holder = importlib.import_module(module)
    holder = getattr(holder, owner) if owner else holder
    first = getattr(holder, attribute)

    def wrapped(*arguments, **named):
        do(*arguments)
        return first(*arguments, **named)

    setattr(holder, attribute, wrapped)


class Disk:
    """A disk of its own, in memory, small: mounted as long as the context is open. Needs root on Linux."""

    def __init__(self, folder: Path, megabytes: int = 16):
        self.folder, self.megabytes = folder, megabytes

    @staticmethod
    def missing() -> str:
        """Why there cannot be one; empty if there can."""
        if os.geteuid() != 0 or shutil.which("mount") is None:
            return "a small disk can be mounted by root only"
        probe = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/mnt"]
        return "" if subprocess.run(probe, capture_output=True).returncode == 0 else "this root may not mount"

    def __enter__(self) -> Disk:
        self.folder.mkdir(parents=True)
        self._mount("-t", "tmpfs", "-o", f"size={self.megabytes}m", "none")
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["umount", "--lazy", self.folder], check=True)

    def read_only(self, yes: bool) -> None:
        self._mount("-o", "remount,ro" if yes else "remount,rw")

    def _mount(self, *options) -> None:
        subprocess.run(["mount", *options, self.folder], check=True)

    def fill(self, left: int = 0) -> None:
        """Use it up, but for so many bytes."""
        status = os.statvfs(self.folder)
        os.makedirs(self.folder / ".full", exist_ok=True)
        size = status.f_bavail * status.f_frsize - left
        with open(self.folder / ".full" / "file", "wb") as file:
            os.posix_fallocate(file.fileno(), 0, max(size - 4096, 1))
        if not left:
            with open(self.folder / ".full" / "rest", "wb") as file:
                with suppress(OSError):
                    for _ in range(64):
                        os.write(file.fileno(), bytes(4096))

    def free(self) -> None:
        shutil.rmtree(self.folder / ".full")
