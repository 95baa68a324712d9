"""The record of a run: metrics.jsonl always, and one tracker run through Accelerate that holds the same numbers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from accelerate import Accelerator

from kd.run.folder import Run
from kd.track.job import Job, describe
from kd.track.outcome import Outcome, hardest
from kd.track.tensorboard_run import TensorBoardRun
from kd.track.trackio_run import TrackioRun
from kd.track.wandb_run import WandbRun, has_key
from kd.util.contents import read_rows, read_tracker
from kd.util.errors import UserError, say, writing
from kd.util.files import write_atomic

__all__ = ["Job", "Outcome", "Tracker", "choose_tracker", "hardest", "has_key", "tracker_arguments"]

AXES = ("step", "epoch", "images_seen")  # of every row
TRACKERS = {"wandb": WandbRun, "tensorboard": TensorBoardRun, "trackio": TrackioRun}


def choose_tracker(report_to: str) -> str:
    """One of TRACKERS or `none`; `auto` is wandb with a key, with W&B set offline or under its agent, else none.

    Raises:
        UserError: its package is not installed.
    """
    if report_to == "auto":
        mode = os.environ.get("WANDB_MODE", "")
        disabled = mode == "disabled" or os.environ.get("WANDB_DISABLED", "") in ("true", "1")
        wanted = mode in ("offline", "dryrun") or "WANDB_SWEEP_ID" in os.environ or has_key()
        report_to = "wandb" if wanted and not disabled else "none"
    if report_to != "none" and importlib.util.find_spec(report_to) is None:
        raise UserError(
            f"report_to {report_to} needs the package {report_to}; pip install {report_to}, or --report_to none"
        )
    return report_to


class Tracker:
    """Writes rows to metrics.jsonl and to the tracker chosen by `report_to`; only the main process writes.

    metrics.jsonl is the truth: after a restart the tracker is sent the rows that it lacks, and none twice.

    Args:
        objective: the loss in words.
        keep_bytes: length of metrics.jsonl at the checkpoint the run resumes from; what follows it is cut off.
    """

    def __init__(self, accelerator: Accelerator, run: Run, config, objective: str, keep_bytes: int):
        self._accelerator, self._file, self._run, self._last = accelerator, None, None, {"step": 0, "epoch": 0}
        name = choose_tracker(config.report_to)
        if not run.is_main:
            return
        self._file = (run.folder / "metrics.jsonl").open("a+b")
        self._file.truncate(min(keep_bytes, self._file.tell()))
        kept = self._read()
        if name != "none":
            identity, resumed = _identity(run.folder, name)
            job = describe(run, config, objective, accelerator, identity, kept if resumed else None)
            self._run = TRACKERS[name](accelerator, job)
            for row in kept:
                if self._run is not None:
                    self._send(row)
        self._last = kept[-1] if kept else self._last

    def _read(self) -> list[dict]:
        """The rows that are there; a damaged line is left out, and one without its end is cut off."""
        self._file.seek(0)
        content = self._file.read()
        self._file.truncate(content.rfind(b"\n") + 1)
        rows, bad = read_rows(content)
        if bad:
            lines = ", ".join(map(str, bad[:5])) + (" and more" if len(bad) > 5 else "")
            say(f"note: {self._file.name} is damaged: line {lines}; it is left out of the tracker")
        return rows

    @property
    def wants_outcome(self) -> bool:
        """Whether finish() does something with an `Outcome`: on the main process, where there is a tracker."""
        return self._run is not None and self._run.job.log_media

    @property
    def num_bytes(self) -> int:
        """Length of metrics.jsonl."""
        return self._file.tell() if self._file else 0

    def log(self, row: dict) -> None:
        """Add a row; it must have `step`."""
        if self._file is None:
            return
        try:
            with writing(Path(self._file.name)):
                self._file.write((json.dumps(row) + "\n").encode())
                self._file.flush()
        except OSError:
            with suppress(OSError):  # Python would write what the disk did not take once more, and complain, at its end
                self._file.close()
            raise
        self._last = row
        if self._run is not None:
            self._send(row)

    def _send(self, row: dict) -> None:
        if row["step"] > self._run.last_step:
            values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
            with self._expendable():
                self._accelerator.log(values, step=row["step"], log_kwargs=self._run.log_arguments)
                self._run.logged(values)

    @contextmanager
    def _expendable(self) -> Iterator[None]:
        """What goes wrong in here, of whatever type, ends the tracker's run and not this one."""
        try:
            yield
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            say(f"the tracker failed ({reason}); from here on the numbers are in {self._run.job.folder} alone")
            self._run = None

    def finish(self, summaries: dict[str, dict] | None = None, outcome: Outcome | None = None, signal: int = 0) -> None:
        """Close the record; the first summary's numbers become the tracker run's, and so does what `outcome` shows.

        Args:
            summaries: of the kept networks by name, the run's own first.
            signal: of the signal that stopped the run before its end, the number.
        """
        if self._file is None:
            return
        summary = next(iter(summaries.values())) if summaries else None
        if summary is not None:
            row = {axis: self._last[axis] for axis in AXES if axis in self._last}
            for network, each in summaries.items():
                prefix = "test" if each is summary else f"test/{network}"
                row |= {f"{prefix}/{name}": each[f"test_{name}"] for name in ("accuracy", "nll", "ece")}
            self.log(row)
        self._file.close()
        self._file = None
        if (run := self._run) is not None:
            if summary is not None:
                with self._expendable():
                    run.conclude(summary, outcome, self._last["step"])
            self._run = run  # it is closed in any case, so that what it has is kept
            with self._expendable():
                run.finish(self._accelerator, signal)


def _identity(folder: Path, name: str) -> tuple[str, bool]:
    """The tracker run's id, kept in the run folder, and whether it was there: a restart continues the same one.

    An agent of W&B's sweeps gives the id of the run that it waits for.
    """
    known, note = read_tracker(folder), folder / "tracker.json"
    resumed = f"{name}_id" in known
    if not resumed:
        given = os.environ.get("WANDB_RUN_ID") if name == "wandb" and "WANDB_SWEEP_ID" in os.environ else None
        known[f"{name}_id"] = given or secrets.token_hex(4)
    if not re.fullmatch(r"[A-Za-z0-9_-]+", known[f"{name}_id"]):
        raise UserError(
            f"{note}: {name}_id {known[f'{name}_id']!r} is no id, which has letters, digits, _ and - only; delete the "
            f"file, and a new run of the tracker begins"
        )
    if not resumed:
        write_atomic(note, json.dumps(known).encode())
    return known[f"{name}_id"], resumed


def tracker_arguments(config, folder: str) -> dict:
    """Keyword arguments of `Accelerator` for the tracker that `config.report_to` chooses."""
    name = choose_tracker(config.report_to)
    return {"log_with": None if name == "none" else name, "project_dir": str(Path(folder))}
