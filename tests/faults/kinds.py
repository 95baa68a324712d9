"""The faults: each function injects one into a `Job` and asserts that nothing is lost.

`FAULTS` says on how many processes each is injected, and what kinds of it there are.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import children
import pytest
from conftest import ROOT
from job import (
    STATED,
    STEPS,
    Disk,
    FillDisk,
    Job,
    JumpingClock,
    NotANumber,
    Slowly,
    TornWrite,
    kill_all,
)

from kd.train.checkpoint import checkpoints

# Signals


def signal_to_one(job: Job) -> None:
    number, step = signal.Signals[job.kind], job.draw.randint(1, STEPS - 1)
    statuses = job.run(sabotage=(f"kd.train.meter.Meter.add:{number.name}", step))
    assert statuses == [128 + number] * job.count, job.said
    assert job.saved_step() == step
    assert f"stopped by {number.name} after step {step}" in job.said
    assert not job.errors()
    job.resumes(f"resuming after step {step}")


def signal_to_all(job: Job) -> None:
    number = signal.Signals[job.kind]
    processes = job.start(sabotage=Slowly())
    job.wait_for("network: ", lambda: all(process.is_alive() for process in processes))
    time.sleep(job.draw.uniform(0, 1.5))
    kill_all(processes, number)
    assert children.finish(*processes) == [128 + number] * job.count, job.said
    assert f"stopped by {number.name}" in job.said
    job.resumes()


@contextmanager
def launched(job: Job):
    """The job under `accelerate launch`, once it trains."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/cpu_2proc.yaml"]
    command += ["tests/faults/launched.py", *map(str, job.command("--num_threads", 1))]
    path = os.pathsep.join(str(ROOT / folder) for folder in ("", "tests", "tests/faults", "tests/train"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    job.output.unlink(missing_ok=True)
    with job.output.open("ab") as output:
        launcher = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=output)
    try:
        job.wait_for("epoch 1/", lambda: launcher.poll() is None)
        yield launcher
    finally:
        launcher.kill()
        launcher.wait()


def signal_to_launcher(job: Job) -> None:
    """Of SIGUSR1 and SIGKILL a launcher dies; its processes are then sent SIGTERM by the system."""
    with launched(job) as launcher:
        launcher.send_signal(signal.Signals[job.kind])
        assert launcher.wait(STATED) != 0
    job.wait_until_free()
    assert "stopped by" in job.said, job.said
    step = job.saved_step()
    assert step >= 5
    job.resumes(f"resuming after step {step}")


# Killed


def killed_at_a_random_moment(job: Job) -> None:
    """All its processes, at any moment from its start to its end; drawn again where it has ended before."""
    for _ in range(20):
        processes = job.start(sabotage=Slowly(0.05))
        time.sleep(job.draw.uniform(0, job.seconds + 0.05 * STEPS))
        kill_all(processes)
        if children.finish(*processes) == [-9] * job.count and not (job.run_folder / "summary.json").exists():
            break
        subprocess.run(["rm", "-r", job.run_folder], check=True)
    else:
        raise AssertionError("it always ended before it was killed")
    job.resumes()


def killed_inside_a_checkpoint(job: Job) -> None:
    """After a random share of one of its files; the others of several processes lose the one that writes."""
    sabotage = TornWrite(job.draw.randint(1, 24), job.draw.random())
    first, *others = job.run(sabotage=sabotage)
    assert first == -9
    assert 0 not in others
    assert list(job.checkpoints.glob("*.tmp-*"))
    job.resumes()


def one_process_killed(job: Job) -> None:
    victim = job.draw.randrange(job.count)
    processes = job.start(sabotage=Slowly())
    job.wait_for("network: ", lambda: all(process.is_alive() for process in processes))
    time.sleep(job.draw.uniform(0.5, 1.5))
    processes[victim].kill()
    statuses = children.finish(*processes, timeout=STATED)
    assert statuses == [-9 if rank == victim else 1 for rank in range(job.count)], job.said
    assert any(f"process {victim} of {job.count} (counted from 0) does not answer" in line for line in job.errors())
    job.resumes()


def one_process_of_a_launcher_killed(job: Job) -> None:
    victim = job.draw.randrange(job.count)
    with launched(job) as launcher:
        os.kill(_process_of_rank(launcher.pid, victim), signal.SIGKILL)
        assert launcher.wait(STATED) != 0
    job.wait_until_free()
    assert f"process {victim} of {job.count} (counted from 0) does not answer" in job.said, job.said
    job.resumes()


def _process_of_rank(launcher: int, rank: int) -> int:
    for process in Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split():
        if f"\0RANK={rank}\0" in Path(f"/proc/{process}/environ").read_text():
            return int(process)
    raise AssertionError("the launcher has no such process")


def one_process_hangs(job: Job) -> None:
    """It is stopped, not killed: its connections stay open, and only `peer_timeout` tells."""
    victim = job.draw.randrange(job.count)
    processes = job.start("--peer_timeout", 5, sabotage=Slowly())
    job.wait_for("network: ", lambda: all(process.is_alive() for process in processes))
    time.sleep(job.draw.uniform(0.5, 1.5))
    os.kill(processes[victim].pid, signal.SIGSTOP)
    others = [process for rank, process in enumerate(processes) if rank != victim]
    try:
        assert children.finish(*others, timeout=2 * STATED) == [1] * (job.count - 1), job.said
    finally:
        processes[victim].kill()
        processes[victim].join()
    assert f"process {victim} of {job.count} (counted from 0) does not answer" in "".join(job.errors()), job.said
    job.resumes()


# Damaged checkpoints


def damaged_checkpoint(job: Job) -> None:
    step = job.draw.randint(5, STEPS - 1)
    job.run(sabotage=("kd.train.meter.Meter.add", step))
    newest, before = checkpoints(job.checkpoints)
    file = job.draw.choice(sorted(newest.iterdir()))
    content = bytearray(file.read_bytes())
    if job.kind == "flipped":
        content[job.draw.randrange(len(content))] ^= 1 << job.draw.randrange(8)
        file.write_bytes(content)
    elif job.kind == "truncated":
        file.write_bytes(content[: job.draw.randrange(len(content))])
    else:
        file.unlink()
    job.resumes(f"{newest} is damaged", f"resuming after step {int(before.name.removeprefix('step_'))}")


# Disks


@contextmanager
def small_disk(job: Job):
    if reason := Disk.missing():
        pytest.skip(reason)
    with Disk(job.folder / "disk") as disk:
        job.run_folder = disk.folder / "run"
        yield disk


def disk_full_in_a_checkpoint(job: Job) -> None:
    with small_disk(job) as disk:
        number = job.draw.randint(4, 24)  # a checkpoint is three files, later four
        statuses = job.run(
            sabotage=FillDisk(disk, "kd.train.checkpoint", "write_synced", number, job.draw.choice([0, 8192]))
        )
        assert statuses[0] == 1
        assert 0 not in statuses
        (line,) = [line for line in job.errors() if line.startswith("error: ")]
        assert "no space left on device" in line
        assert str(job.checkpoints) in line
        assert "run the same command" in line
        assert not list(job.checkpoints.glob("*.tmp*"))
        step = job.saved_step()
        disk.free()
        job.resumes(f"resuming after step {step}")


def disk_full_in_a_log_line(job: Job) -> None:
    with small_disk(job) as disk:
        assert (
            job.run("--checkpoint_every", 1000, sabotage=("kd.train.meter.Meter.add:SIGTERM", 4)) == [143] * job.count
        )
        fill = FillDisk(disk, "kd.track", "Tracker.log", 1)
        statuses = job.run("--checkpoint_every", 1000, sabotage=fill)
        assert statuses[0] == 1
        assert 0 not in statuses
        (line,) = [line for line in job.errors() if line.startswith("error: ")]
        assert "no space left on device" in line
        assert "metrics.jsonl" in line
        assert job.saved_step() == 4
        disk.free()
        job.resumes("resuming after step 4")


def read_only_output(job: Job) -> None:
    with small_disk(job) as disk:
        step = job.draw.randint(1, STEPS - 1)
        job.run(sabotage=("kd.train.meter.Meter.add:SIGTERM", step))
        disk.read_only(True)
        statuses = job.run()
        assert statuses[0] == 1
        assert 0 not in statuses
        (line,) = [line for line in job.errors() if line.startswith("error: ")]
        assert "read-only file system" in line
        assert str(job.run_folder) in line
        disk.read_only(False)
        job.resumes(f"resuming after step {step}")


def output_becomes_read_only(job: Job) -> None:
    """The folder of the checkpoints may no longer be written into, while it trains."""
    if os.geteuid() != 0:
        pytest.skip("a folder is made immutable by root only")
    processes = job.start("--checkpoint_every", 1, sabotage=Slowly())
    job.wait_for("epoch 1/", lambda: all(process.is_alive() for process in processes))
    time.sleep(job.draw.uniform(0, 0.5))
    if subprocess.run(["chattr", "+i", job.checkpoints], capture_output=True).returncode:
        children.finish(*processes)
        pytest.skip("no folder can be made immutable on this disk")
    try:
        statuses = children.finish(*processes)
    finally:
        subprocess.run(["chattr", "-i", job.checkpoints], check=True)
    assert statuses[0] == 1, job.said
    assert 0 not in statuses
    (line,) = [line for line in job.errors() if line.startswith("error: ")]
    assert "operation not permitted" in line
    assert str(job.checkpoints) in line
    job.resumes(f"resuming after step {job.saved_step()}")


# Numbers, clocks, other runs


def not_a_number_on_one(job: Job) -> None:
    rank, step = job.draw.randrange(job.count), job.draw.randint(3, STEPS)
    assert job.run(sabotage=NotANumber(rank, step)) == [2] * job.count, job.said
    (line,) = [line for line in job.errors() if line.startswith("error: ")]
    kept = (step - 1) // 2 * 2
    assert f"the loss is not finite at step {step}" in line
    assert f"the checkpoint of step {kept} is kept" in line
    assert (f"on process {rank} of {job.count}" in line) == (job.count > 1)
    assert all(f"not finite at step {step}" in error for error in job.errors())
    assert job.saved_step() == kept
    job.resumes(f"resuming after step {kept}")


def jumping_clock(job: Job) -> None:
    """In two starts; and what the first has written is of another time than the second."""
    seed = job.draw.getrandbits(32)
    jumping = JumpingClock(seed)
    processes = job.start(sabotage=jumping)
    time.sleep(job.draw.uniform(0, job.seconds))
    kill_all(processes, signal.SIGTERM)
    children.finish(*processes)
    for path in job.run_folder.rglob("*"):
        os.utime(path, times=(job.draw.uniform(0, 4e9),) * 2)
    assert job.run(sabotage=jumping) == [0] * job.count, job.said
    job.resumes("finished already")


def two_runs_on_one_folder(job: Job) -> None:
    """One trains and the other is refused."""
    first = job.start(sabotage=Slowly())
    if job.kind == "one later":
        job.wait_for("network: ", lambda: all(process.is_alive() for process in first))
    other = Job.__new__(Job)
    other.__dict__.update(job.__dict__, output=job.folder / "other")
    second = other.start("--overwrite", "true", sabotage=Slowly())
    statuses = [children.finish(*processes) for processes in (first, second)]
    winner, loser = (job, other) if statuses[0] == [0] * job.count else (other, job)
    refused = statuses[0 if winner is other else 1]
    assert [0] * job.count in statuses, winner.said + loser.said
    assert refused[0] == 2
    assert 0 not in refused
    assert "is in use by" in loser.errors()[0]
    job.resumes("finished already")


class Fault(NamedTuple):
    """A fault.

    inject: the function above.
    counts: the numbers of processes that it is injected on; the first of them in a short sample too.
    kinds: what `Job.kind` can be; each is in a short sample.
    """

    inject: Callable[[Job], None]
    counts: tuple[int, ...]
    kinds: tuple[str, ...] = ("",)


SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")

FAULTS = {
    "signal to one process": Fault(signal_to_one, (2, 1, 4), SIGNALS),
    "signal to all processes": Fault(signal_to_all, (2, 1, 4), SIGNALS),
    "signal to the launcher": Fault(signal_to_launcher, (2,), (*SIGNALS, "SIGKILL")),
    "killed at a random moment": Fault(killed_at_a_random_moment, (1, 2, 4)),
    "killed inside a checkpoint": Fault(killed_inside_a_checkpoint, (2, 1, 4)),
    "one process killed": Fault(one_process_killed, (4, 2)),
    "one process of a launcher killed": Fault(one_process_of_a_launcher_killed, (2,)),
    "one process hangs": Fault(one_process_hangs, (2,)),
    "newest checkpoint damaged": Fault(damaged_checkpoint, (1, 2), ("flipped", "truncated", "missing")),
    "disk full in a checkpoint": Fault(disk_full_in_a_checkpoint, (2, 1)),
    "disk full in a log line": Fault(disk_full_in_a_log_line, (1, 2)),
    "output is read-only": Fault(read_only_output, (1, 2)),
    "output becomes read-only": Fault(output_becomes_read_only, (1, 2)),
    "loss not a number on one process": Fault(not_a_number_on_one, (2, 1)),
    "clock jumps": Fault(jumping_clock, (1, 2)),
    "two runs on one folder": Fault(two_runs_on_one_folder, (1, 2), ("one later", "at once")),
}
