"""A tracker whose server, service or network is gone: training goes on, and the numbers are on disk."""

from __future__ import annotations

import json
import os
import signal
import socket
from pathlib import Path

import children
import pytest
from conftest import SMALL

pytestmark = pytest.mark.slow


class Online:
    """In the process: a key of W&B's, and where its server is.

    Args:
        url: of the server.
        patience: seconds that a start may take; W&B's own are 90.
    """

    def __init__(self, url: str, patience: int = 10):
        self.url, self.patience = url, patience

    def __call__(self) -> None:
        os.environ.update(WANDB_API_KEY="0" * 40, WANDB_BASE_URL=self.url, WANDB_INIT_TIMEOUT=str(self.patience))


class ServiceDies:
    """In the process: the service that W&B's client talks to is killed before the n-th row."""

    def __init__(self, row: int):
        self.row, self.rows = row, 0

    def __call__(self) -> None:
        from kd import track

        first = track.Tracker.log

        def log(tracker, row):
            self.rows += 1
            if self.rows == self.row:
                for process in services():
                    os.kill(process, signal.SIGKILL)
            first(tracker, row)

        track.Tracker.log = log


def services() -> list[int]:
    """Processes below this one that are W&B's service."""
    below, found = [os.getpid()], []
    for process in below:
        for thread in Path(f"/proc/{process}/task").iterdir():
            below += [int(child) for child in (thread / "children").read_text().split()]
        if "wandb-core" in Path(f"/proc/{process}/cmdline").read_text():
            found.append(process)
    assert found
    return found


class Refused:
    """In the process: whatever a tracker is sent after the n-th row, its client raises."""

    def __init__(self, row: int):
        self.row, self.rows = row, 0

    def __call__(self) -> None:
        from accelerate import Accelerator

        first = Accelerator.log

        def log(accelerator, *values, **more):
            self.rows += 1
            if self.rows > self.row:
                raise ConnectionError("the server is gone")
            first(accelerator, *values, **more)

        Accelerator.log = log


def train(folder: Path, tracker: str, sabotage=None, environment: dict | None = None) -> tuple[str, list[dict]]:
    """Train with a tracker; what was printed, and the rows of metrics.jsonl."""
    command = (*SMALL, "--report_to", tracker, "--output_dir", folder / "run")
    (status,) = children.finish(
        children.start("train_teacher", command, environment, sabotage, folder / "said"), timeout=300
    )
    said = (folder / "said").read_text()
    assert status == 0, said
    assert "Traceback" not in said
    assert (folder / "run/summary.json").is_file()
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert sum("train/loss" in row for row in rows) == json.loads((folder / "run/summary.json").read_text())["steps"]
    return said, rows


@pytest.mark.parametrize("server", ["gone", "silent"])
def test_the_server_is_gone_when_a_run_begins(tmp_path, server):
    """Nobody listens, as without a network; or somebody does and never answers."""
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if server == "silent":
            listening.listen()
        said, _ = train(tmp_path, "wandb", Online(f"http://127.0.0.1:{listening.getsockname()[1]}"))
    assert "this run is logged offline" in said
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


def test_the_service_of_the_tracker_is_killed_while_it_trains(tmp_path):
    train(tmp_path, "wandb", ServiceDies(3), {"WANDB_MODE": "offline"})


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_the_tracker_refuses_rows_while_it_trains(tmp_path, tracker):
    said, _ = train(tmp_path, tracker, Refused(3))
    assert said.count("the tracker failed (ConnectionError: the server is gone)") == 1
