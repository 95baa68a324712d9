"""One trial: the script in processes of its own, watched through metrics.jsonl, and stopped so that it saves first."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from kd.util.errors import UserError
from kd.util.machine import end_with_parent

SECONDS = 0.5  # between two looks


def measured(folder: Path, metric: str) -> dict[int, float]:
    """{epoch: value} of a metric in a run's metrics.jsonl, as far as it is written."""
    found, file = {}, folder / "metrics.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            break
        if metric in row:
            found[row["epoch"]] = row[metric]
    return found


class TrialProcess:
    """The processes of a trial.

    Args:
        words: the command.
        folder: the run folder; what the command prints is appended to FOLDER.log beside it.
        name: the trial's name, given to the command as $WANDB_RUN_ID.
    """

    def __init__(self, words: list[str], folder: Path, name: str):
        self.folder, self.log = folder, folder.with_name(f"{folder.name}.log")
        wait_until_free(folder)
        environment = {key: value for key, value in os.environ.items() if key != "WANDB_SWEEP_ID"}
        environment["WANDB_RUN_ID"] = name
        scripts = str(Path(sys.executable).parent)  # `accelerate` is found although its environment is not activated
        environment["PATH"] = os.pathsep.join([scripts, environment.get("PATH", "")])
        with self.log.open("ab") as log:
            self._start = log.tell()
            try:
                self._process = subprocess.Popen(
                    words,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # a signal for the sweep reaches them through stop() alone
                    preexec_fn=end_with_parent,
                )
            except OSError as error:
                raise UserError(f"command {words[0]!r} cannot be started: {error.strerror}") from None

    def watch(self, metric: str, look: Callable[[dict[int, float]], bool]) -> int | None:
        """Wait for its end; `look` is called with `measured` after each change, and True from it stops the trial.

        Returns:
            The exit status, negative for a signal's number; None where `look` stopped it. On any exception, such as
            Ctrl-C's, the trial is stopped first.
        """
        seen = {}
        try:
            while self._process.poll() is None:
                time.sleep(SECONDS)
                now = measured(self.folder, metric)
                if now != seen:
                    seen = now
                    if look(now):
                        self.stop()
                        return None
        except BaseException:
            self.stop()
            raise
        wait_until_free(self.folder)
        return self._process.returncode

    def stop(self) -> None:
        """SIGTERM to all of its processes, and wait until the run has saved its state."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        self._process.wait()
        wait_until_free(self.folder)

    def last_words(self) -> str:
        """Why it ended: the script's own line, or else the last that was printed; whole launchers keep no status."""
        text = self.log.read_bytes()[self._start :].decode(errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        own = [line for line in lines if line.startswith(("error", "stopped by"))]
        return [*(own or lines[-1:] or ["it printed nothing"])][-1]


def wait_until_free(folder: Path) -> None:
    """Wait until no process has a run folder open; a launcher may end before the run that it started."""
    if (folder / ".lock").exists():
        FileLock(folder / ".lock").acquire().lock.release()
