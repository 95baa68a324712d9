"""Trackio: the same names in its local database, which `trackio show` draws; sent nowhere unless its own variables say.

https://github.com/gradio-app/trackio
"""

from __future__ import annotations

import contextlib
import io

from accelerate import Accelerator

from kd.track.job import Job, TrackerRun
from kd.track.outcome import Outcome
from kd.util.errors import say


class TrackioRun(TrackerRun):
    """The Trackio run of a job, the same one after a restart."""

    def __init__(self, accelerator: Accelerator, job: Job):
        from trackio.sqlite_storage import SQLiteStorage

        self.job, name = job, f"{job.name}-{job.identity}"  # it finds a run to resume by its name
        last = SQLiteStorage.get_last_step(job.project, name)
        self.last_step = -1 if last is None else last
        arguments = {
            "name": name,
            "group": job.group,
            "config": {**job.config, "tags": job.tags, "notes": job.notes, "job_type": job.kind},
            "resume": "allow",
            "embed": False,
            "auto_log_gpu": False,
            "auto_log_cpu": False,
        }
        with contextlib.redirect_stdout(io.StringIO()):  # five lines on how to start its server
            accelerator.init_trackers(job.project, init_kwargs={"trackio": arguments})
        self._run = accelerator.get_tracker("trackio", unwrap=True)
        say(f"Trackio: shown by: trackio show --project {job.project}")

    def conclude(self, summary: dict, outcome: Outcome | None, step: int) -> None:
        """The results as one row at the last step, and with an outcome the pictures and the network."""
        import trackio

        numbers = {f"summary/{key}": value for key, value in summary.items() if isinstance(value, int | float)}
        self._run.log(numbers, step=step)
        if outcome is not None:
            rows = [[trackio.Image(v) if k == "image" else v for k, v in row.items()] for row in outcome.hardest]
            table = trackio.Table(columns=list(outcome.hardest[0]), data=rows)
            self._run.log({"test/hardest": table, "test/confusion": trackio.Image(outcome.confusion_picture())}, step)

    def finish(self, accelerator, signal: int) -> None:
        """Close it, and forget it, or it would be closed once more at exit."""
        import trackio

        with contextlib.redirect_stdout(io.StringIO()):
            trackio.finish()
