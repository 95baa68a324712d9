"""TensorBoard: the same names in event files, in double precision, and twice more over the other two axes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import ClassVar

from accelerate import Accelerator

from kd.track.job import Job, TrackerRun
from kd.track.outcome import Outcome

AXES = ("epoch", "images_seen")


class TensorBoardRun(TrackerRun):
    """The event files of a job, in its folder."""

    log_arguments: ClassVar = {"tensorboard": {"new_style": True, "double_precision": True}}

    def __init__(self, accelerator: Accelerator, job: Job):
        from torch.utils.tensorboard import SummaryWriter

        self.job = job
        first = dict.fromkeys(("step", *AXES), 0)
        if job.kept is not None:  # a reader passes over what a killed run wrote from these on, after its checkpoint
            self.last_step = job.kept[-1]["step"] if job.kept else 0
            first = {axis: max((row[axis] for row in job.kept), default=0) + 1 for axis in first}
            first["epoch"] = max((row["epoch"] for row in job.kept if "epoch/loss" in row), default=0) + 1
        config = dict(_flat(job.config)) if job.kept is None else None
        accelerator.init_trackers("tensorboard", config, {"tensorboard": {"purge_step": first["step"]}})
        self._writer = accelerator.get_tracker("tensorboard", unwrap=True)
        # TensorBoard draws over the step alone; what is measured once an epoch is also kept over the two other axes.
        folder = self._writer.log_dir
        self._others = {axis: SummaryWriter(f"{folder}/over_{axis}", purge_step=first[axis]) for axis in AXES}
        if job.kept is None:
            lines = [f"**{job.name}** ({job.kind}; {', '.join(job.tags)})", job.notes, job.config["objective"]]
            self._writer.add_text("run", "\n\n".join(dict.fromkeys(lines)), 0)

    def logged(self, values: dict) -> None:
        """A row went to the writer over the step; an epoch's goes to those over the other axes too."""
        for axis, writer in self._others.items():
            for name, value in values.items():
                if name.startswith(("epoch/", "val/")):
                    writer.add_scalar(name, value, values[axis], **self.log_arguments["tensorboard"])

    def conclude(self, summary: dict, outcome: Outcome | None, step: int) -> None:
        """The results as text, and with an outcome the pictures."""
        self._writer.add_text("summary", f"```\n{json.dumps(summary, indent=2)}\n```", step)
        if outcome is not None:
            self._writer.add_image("test/confusion", outcome.confusion_picture(), step, dataformats="HWC")
            names = [name for name in outcome.hardest[0] if name != "image"]
            lines = [names, ["---"] * len(names)]
            for place, row in enumerate(outcome.hardest):
                self._writer.add_image(f"test/hardest/{place:02d}", row["image"], step, dataformats="HWC")
                lines.append([f"{v:.4g}" if isinstance(v, float) else str(v) for v in map(row.get, names)])
            self._writer.add_text("test/hardest", "\n".join(f"| {' | '.join(line)} |" for line in lines), step)

    def finish(self, accelerator, signal: int) -> None:
        """Close all writers."""
        super().finish(accelerator, signal)
        for writer in self._others.values():
            writer.close()


def _flat(value: dict, prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """A config as the flat scalars and strings that TensorBoard can hold."""
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield prefix + key, inner if isinstance(inner, bool | int | float | str) else json.dumps(inner)
