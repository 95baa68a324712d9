"""A tracker whose server, service or network is gone: training continues, and the numbers are on disk."""

from __future__ import annotations

import gzip
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import children
import pytest
from conftest import ROOT, SMALL
from job import before
from records import MEDIA, truth, wandb_records, wandb_scalars

pytestmark = pytest.mark.slow


class Online:
    """In the process: a key of W&B's, and where its server is.

    Args:
        url: of the server.
        patience: seconds that a start may take; W&B's own are 90.
    """

    def __init__(self, url: str, patience: int = 4):
        self.url, self.patience = url, patience

    def __call__(self) -> None:
        os.environ.update(WANDB_API_KEY="0" * 40, WANDB_BASE_URL=self.url, WANDB_INIT_TIMEOUT=str(self.patience))


class Server(http.server.ThreadingHTTPServer):
    """As much of W&B's as a client asks when its run begins; gone for good when it was sent the first loss.

    `asked` has the names of what was asked of it.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.asked: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def vanish(self) -> None:
        self.shutdown()
        self.server_close()


class _Answers(http.server.BaseHTTPRequestHandler):
    """Answers each request over a connection of its own, and says nothing."""

    server: Server

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        name, asked = self.path.rpartition("/")[2], {}
        if name == "graphql":
            query = json.loads(body)
            name, asked = query["operationName"], query.get("variables", {})
        self.server.asked.append(name)
        project = {"id": "p", "name": "kd", "entity": {"id": "e", "name": "me"}}
        answers = {
            "Viewer": {"viewer": {"id": "u", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}},
            "RunResumeStatus": {"model": {**project, "bucket": None}},
            "UpsertBucket": {"upsertBucket": {"bucket": {"id": "b", "name": asked.get("name"), "project": project}}},
            "CreateRunFiles": {"createRunFiles": {"runID": "b", "uploadHeaders": [], "files": []}},
        }
        content = json.dumps({"data": answers.get(name, {})}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        if name == "file_stream" and b"train/loss" in body:
            self.server.vanish()

    def log_message(self, *_):
        pass


class Vanishes(Online):
    """In the process: it is online, and after its third row it continues when the server is gone."""

    def __call__(self) -> None:
        super().__call__()
        os.environ["WANDB_FINISH_TIMEOUT"] = "2"
        before("kd.track", "Tracker.log", self.wait)
        from kd import track

        track.Tracker.wants_outcome = False  # before it takes a picture W&B's client tries for 20 s to log in again
        self.rows = 0

    def wait(self, *_) -> None:
        self.rows += 1
        end = time.monotonic() + 300
        while self.rows == 4:
            try:
                socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2]))).close()
            except ConnectionRefusedError:
                return
            assert time.monotonic() < end
            time.sleep(0.05)


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


def test_the_server_vanishes_while_a_run_is_online(tmp_path):
    """In a Python of its own, whose exit W&B's client holds up too."""
    server, run = Server(), tmp_path / "run"
    code = f"import test_tracker, train_teacher; test_tracker.Vanishes({server.url!r}, 90)()\n"
    code += "from kd.util.errors import run_script; run_script(train_teacher.main)"
    command = [sys.executable, "-c", code, *map(str, SMALL), "--report_to", "wandb", "--output_dir", str(run)]
    path = os.pathsep.join(str(ROOT / folder) for folder in (".", "tests", "tests/faults", "tests/train"))
    with (tmp_path / "said").open("w") as output:
        status = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, stdout=output, stderr=output, timeout=300
        ).returncode
    said = (tmp_path / "said").read_text()
    assert status == 0, said
    assert "Traceback" not in said
    assert {"UpsertBucket", "file_stream"} <= set(server.asked)
    assert "offline" not in said
    assert (run / "summary.json").is_file()
    (line,) = [line for line in said.splitlines() if line.startswith("W&B's server did not take")]
    (folder,) = (run / "wandb").glob("run-*")
    assert line.endswith(f"wandb sync {folder}")
    records = wandb_records(run)
    written = wandb_scalars(records)
    assert {key: value for key, value in written.items() if not key[1].startswith(MEDIA)} == truth(run)
    summed = {item.key: item.value_json for record in records for item in record.summary.update if item.key}
    assert json.loads(summed["test_accuracy"]) == json.loads((run / "summary.json").read_text())["test_accuracy"]


def test_the_service_of_the_tracker_is_killed_while_it_trains(tmp_path):
    train(tmp_path, "wandb", ServiceDies(3), {"WANDB_MODE": "offline"})


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_the_tracker_refuses_rows_while_it_trains(tmp_path, tracker):
    said, _ = train(tmp_path, tracker, Refused(3))
    assert said.count("the tracker failed (ConnectionError: the server is gone)") == 1
