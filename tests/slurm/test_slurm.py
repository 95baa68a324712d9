"""The files of slurm/ on a real SLURM of two nodes: whatever ends a job, the run ends with the same bytes.

A job takes half a minute, most of it imports, so what can be seen in one job is.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import children
import pytest
from cluster import Cluster, missing
from conftest import ROOT

pytestmark = [pytest.mark.slurm, pytest.mark.slow]

# 200 digits in batches of 48 are 5 steps an epoch, 60 in all; a checkpoint at each epoch's end.
TRAINING = (
    *("--config", "recipes/digits/student.yaml", "--data.num_train", 200, "--data.batch_size", 48, "--epochs", 12),
    *("--log_every", 1, "--num_threads", 1, "--report_to", "none", "--losses+=pause.Pause"),
)
STEPS = 60


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def submit(cluster, tmp_path_factory):
    """Submit a job and return its number: `submit("slurm/train.sbatch", "train_teacher.py", ...)`."""
    folder = tmp_path_factory.mktemp("jobs")

    def run(*words, program: str = "slurm/submit.sh", pause: str = "0") -> str:
        options = ("--parsable", f"--output={folder}/%j.out") if program == "slurm/submit.sh" else ()
        return cluster.run(
            *(program, *options, *words),
            KD_PYTHON=sys.executable,
            KD_ACTIVATE="",
            KD_SCRATCH=str(folder),
            KD_TIME="20",
            KD_CPUS_PER_NODE="2",
            KD_TEST_PAUSE=pause,
            PYTHONPATH=str(Path(__file__).parent),
            OMP_NUM_THREADS="1",
        )

    return run


@pytest.fixture(scope="module")
def train(submit):
    """Submit a run of the training above on two nodes."""

    def run(folder: Path, *options, pause: str = "0") -> str:
        command = ("slurm/train.sbatch", "train_teacher.py", *TRAINING, "--output_dir", folder)
        return submit("--nodes=2", *options, *command, pause=pause)

    return run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> Path:
    """The same run on two processes without SLURM."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    assert children.run_several("train_teacher", (*TRAINING, "--output_dir", folder), 2) == [0, 0]
    return folder


@pytest.fixture(scope="module", autouse=True)
def limited(train, tmp_path_factory) -> tuple[str, Path]:
    """A job whose time limit comes while it trains, and its folder. SLURM sends the signal 60 to 90 seconds before the
    limit of 2 minutes, so the job starts before all others; it ends before one of them takes a node from it."""
    folder = tmp_path_factory.mktemp("limited") / "run"
    return train(folder, "--time=2", "--signal=B:USR1@60", pause="3 0"), folder


def reached(folder: Path, step: int) -> bool:
    """Whether a run has logged a step."""
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return bool(lines) and json.loads(lines[-1])["step"] >= step


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def in_order(text: str, *parts: str) -> None:
    """All parts are in a text, each after the one before it."""
    start = 0
    for part in parts:
        found = text.find(part, start)
        assert found >= 0, f"{part!r} is not in, or not in its place:\n{text}"
        start = found + len(part)


def test_a_preempted_run_goes_back_into_the_queue_and_ends_with_the_same_bytes(cluster, train, uninterrupted, tmp_path):
    job = train(tmp_path / "run", pause="0.3 0")
    cluster.wait(job, "step 3", lambda: reached(tmp_path / "run", 3))
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    cluster.end(job, "COMPLETED")
    log, state = cluster.log(job), cluster.job(job)
    in_order(
        log,
        "start 1 on node[1-2]",
        "SIGUSR1 is passed on",
        "stopped by SIGUSR1 after step",
        "ended with status 138",
        "back into the queue",
        "start 2 on node[1-2]",
        "resuming after step",
        "test accuracy",
        "ended with status 0",
    )
    assert (state["Restarts"], state["ExitCode"]) == ("1", "0:0")
    assert json.loads((tmp_path / "run/summary.json").read_text())["num_processes"] == 2
    assert weights(tmp_path / "run") == weights(uninterrupted)
    assert not list(ROOT.glob(f".kd-{job}-*"))


def test_the_time_limit(cluster, limited, uninterrupted):
    job, folder = limited
    cluster.end(job, "COMPLETED")
    in_order(
        cluster.log(job),
        "start 1 on node[1-2]",
        "SIGUSR1 is passed on",
        "stopped by SIGUSR1 after step",
        "back into the queue",
        "start 2 on node[1-2]",
        "resuming after step",
        "ended with status 0",
    )
    assert weights(folder) == weights(uninterrupted)


def test_requeue_preemption_dead_node_and_scancel(cluster, train, uninterrupted, tmp_path):
    """One run through all of them, and to the end in a job of its own."""
    folder = tmp_path / "run"
    job = train(folder, pause="0.3")

    def is_at(start: int, step: int) -> None:
        cluster.wait(job, f"start {start}", lambda: f"start {start} on" in cluster.log(job))
        cluster.wait(job, "its resuming", lambda: cluster.log(job).count("resuming after step") == start - 1)
        cluster.wait(job, f"step {step}", lambda: reached(folder, step))

    is_at(1, 3)
    cluster.run("scontrol", "requeue", job)
    is_at(2, 12)
    urgent = cluster.run("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=sleep 3")
    is_at(3, 22)
    cluster.run("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    cluster.wait(job, "its end on the dead node", lambda: cluster.job(job)["JobState"] != "RUNNING")
    cluster.run("scontrol", "update", "nodename=node2", "state=resume", check=False)  # it may be back by itself
    is_at(4, 32)
    cluster.run("scancel", job)
    cluster.end(job, "CANCELLED")

    stopped = "stopped by SIGTERM after step"
    starts = (
        "start 1 on",
        stopped,
        "start 2 on",
        stopped,
        "start 3 on",
        "start 4 on",
        stopped,
        "ended with status 143",
    )
    in_order(cluster.log(job), *starts)
    assert cluster.job(job)["Restarts"] == "3"
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert list((folder / "checkpoints").glob("step_*"))
    assert not (folder / "summary.json").exists()

    job = train(folder)
    cluster.end(job, "COMPLETED")
    in_order(cluster.log(job), "start 1 on", "resuming after step", "test accuracy", "ended with status 0")
    assert weights(folder) == weights(uninterrupted)


def test_a_failure_is_not_started_again_and_a_finished_run_ends_at_once(
    cluster, train, submit, uninterrupted, tmp_path
):
    finished = train(uninterrupted, "--gpus-per-node=2")  # which are not there: the processes compute on the CPU
    shutil.copytree(uninterrupted, tmp_path / "run")
    other_seed = ("train_teacher.py", *TRAINING, "--seed", 5, "--output_dir", tmp_path / "run")
    failing = submit("--nodes=2", "slurm/train.sbatch", *other_seed)  # only the main process knows why
    cluster.end(finished, "COMPLETED")
    in_order(cluster.log(finished), "2 processes per node", "is finished already; nothing to do", "ended with status 0")
    cluster.end(failing, "FAILED")
    state, log = cluster.job(failing), cluster.log(failing)
    assert (state["ExitCode"], state["Restarts"]) == ("2:0", "0")
    assert "holds a run of another config; it differs in seed" in log
    in_order(log, "error: ", "ended with status 2")


def test_pipeline(cluster, submit, tmp_path):
    """A teacher that is preempted, two seeds of a student of which one is preempted, and their comparison."""
    printed = submit(
        *("-t", "recipes/digits/teacher.yaml", "-d", "recipes/digits/kd.yaml", "-s", "0 1", "-o", tmp_path, "--"),
        *("--data.num_train", 200, "--epochs", 6, "--log_every", 1, "--num_threads", 1, "--report_to", "none"),
        "--losses+=pause.Pause",
        program="slurm/pipeline.sh",
        pause="0.5 0",
    )
    teacher, students, report = (line.split()[1] for line in printed.splitlines())
    cluster.wait(teacher, "its start", lambda: "start 1 on" in cluster.log(teacher))
    cluster.run("scancel", "--batch", "--signal=USR1", teacher)  # while everything is still being imported
    cluster.wait(teacher, "its second start", lambda: "start 2 on" in cluster.log(teacher))
    in_order(cluster.log(teacher), "ended with status 138", "back into the queue")
    assert cluster.job(students)["JobState"] == cluster.job(report)["JobState"] == "PENDING"

    tasks = [f"{students}_1", f"{students}_2"]
    for number, task in enumerate(tasks):
        cluster.wait(task, "step 2", lambda number=number: reached(tmp_path / f"kd_s{number}", 2))
    # one of the tasks has the array's own number, which alone would stand for all of them
    (first,) = [task for task in tasks if cluster.job(task)["JobId"] == students]
    cluster.run("scancel", "--batch", "--signal=USR1", first)
    cluster.end(report, "COMPLETED", timeout=600)
    for job in (teacher, *tasks):
        state = cluster.job(job)
        assert (state["JobState"], state["ExitCode"]) == ("COMPLETED", "0:0")
        assert state["Restarts"] == ("1" if job in (teacher, first) else "0"), cluster.log(job)
    results = json.loads((tmp_path / "report/results.json").read_text())["runs"]
    assert [Path(result["run"]).name for result in results] == ["teacher", "kd_s0", "kd_s1"]
