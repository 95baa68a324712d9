"""What every tracker gets of a run when it starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from kd.run.folder import Run
from kd.track.outcome import Outcome
from kd.util.machine import git_branch, git_commit, hardware, versions


@dataclass
class Job:
    """A run in a tracker's terms.

    identity: the tracker run's id, the same after a restart.
    kept: after a restart the rows of metrics.jsonl up to the checkpoint that the run resumes from; None at first.
    group: one experiment: its teacher, its student alone and its distilled ones.
    kind: `train` or `distill`.
    notes: the user's, else the objective in words.
    config: the resolved config, and with it `objective`, `git`, `hardware` and `versions`.
    teachers: the run folders among the teachers.
    """

    identity: str
    kept: list[dict] | None
    folder: Path
    project: str
    group: str
    name: str
    kind: str
    tags: list[str]
    notes: str
    config: dict
    teachers: list[Path]
    log_media: bool


class TrackerRun:
    """A tracker's run of a job, started through Accelerate, which then hands it every row."""

    job: Job
    log_arguments: dict | None = None  # `log_kwargs` of `Accelerator.log`
    last_step = 0  # the last step whose rows it has from before a restart

    def logged(self, values: dict) -> None:
        """Called after each row with its numbers."""

    def conclude(self, summary: dict, outcome: Outcome | None, step: int) -> None:
        """Add the results at the last step, and with an outcome the pictures."""
        raise NotImplementedError

    def finish(self, accelerator, signal: int) -> None:
        """Close it, after a run that has ended (0) or that a signal has stopped, to be resumed."""
        for tracker in accelerator.trackers:
            tracker.finish()


def describe(run: Run, config, objective: str, accelerator, identity: str, kept: list[dict] | None) -> Job:
    """Gather a job from a run, its config and this machine."""
    folder = run.folder.resolve()
    distils = hasattr(config, "teacher")
    teachers = config.teacher if distils else []
    teachers = [teachers] if isinstance(teachers, str) else teachers
    machine = {"num_processes": accelerator.num_processes, "precision": accelerator.mixed_precision}
    about = {
        "objective": objective,
        "git": {"commit": git_commit(), "branch": git_branch()},
        "hardware": {**hardware(accelerator.device), **machine},
        "versions": versions(),
    }
    network = config.student if distils else config.model
    own = [Path(config.data.source).name, network.rpartition(".")[2], *(type(loss).__name__ for loss in config.losses)]
    return Job(
        identity=identity,
        kept=kept,
        folder=folder,
        project=config.project,
        group=config.group or folder.parent.name,
        name="/".join(folder.parts[-2:]),
        kind="distill" if distils else "train",
        tags=list(dict.fromkeys(tag[:64] for tag in (*own, *config.tags) if tag)),  # 64 is W&B's limit
        notes=config.notes or objective,
        config={**run.config, **about},
        teachers=[Path(name).resolve() for name in teachers if (Path(name) / "model.safetensors").is_file()],
        log_media=config.log_media,
    )
