"""Weights & Biases: one run a job, its teacher and its network as artifacts, offline rather than a prompt or a stop."""

from __future__ import annotations

import logging
import netrc
import os
import re
from pathlib import Path
from signal import SIGTERM, SIGUSR1
from urllib.parse import urlparse

from accelerate import Accelerator

from kd.track.job import Job, TrackerRun
from kd.track.outcome import Outcome
from kd.util.errors import UserError, say, unknown
from kd.util.files import delete

# The summary holds the best of these, and it is known which way is better; the others' last values.
BEST = {
    **dict.fromkeys(("train/accuracy", "epoch/accuracy", "val/accuracy"), "max"),
    **dict.fromkeys(("train/loss", "epoch/loss", "val/nll"), "min"),
}
# Seconds in which what is left is sent when a run ends; else one whose server is gone would never end. Less than the
# two minutes between a job's signal and its end. WANDB_FINISH_TIMEOUT, W&B's own, says otherwise.
FINISH_SECONDS = 90
MODES = ("online", "offline", "disabled", "dryrun", "run", "shared")
MAX_CHART = 100  # classes of a confusion matrix that is a chart; of more it is a picture


def has_key() -> bool:
    """Whether a W&B key is there, without importing wandb (slow) and without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _finish_seconds() -> float:
    text = os.environ.get("WANDB_FINISH_TIMEOUT") or str(FINISH_SECONDS)
    try:
        return float(text)
    except ValueError:
        raise UserError(f"WANDB_FINISH_TIMEOUT {text!r} is no number of seconds") from None


class WandbRun(TrackerRun):
    """The W&B run of a job, the same one after a restart."""

    def __init__(self, accelerator: Accelerator, job: Job):
        import wandb

        logging.getLogger("wandb").setLevel(logging.ERROR)
        self.job = job
        arguments = {
            "id": job.identity,
            "resume": "allow",
            "dir": str(job.folder),
            "name": job.name,
            "group": job.group,
            "job_type": job.kind,
            "tags": job.tags,
            "notes": job.notes,
            "config": job.config,
            "settings": {
                "silent": True,
                "finish_timeout": _finish_seconds(),
                "finish_timeout_raises": True,
            },
        }
        # Tables and pictures wait in this folder until they are sent, and the client has no setting for it.
        self._staged = "WANDB_DATA_DIR" not in os.environ
        if self._staged:
            os.environ["WANDB_DATA_DIR"] = str(job.folder / "wandb")
        if not os.environ.get("WANDB_MODE"):
            os.environ.pop("WANDB_MODE", None)  # the client takes an empty one for a mode
        mode = os.environ.get("WANDB_MODE", "online" if has_key() else "offline")
        if mode not in MODES:
            raise unknown("WANDB_MODE", mode, MODES)
        for attempt in dict.fromkeys((mode, "offline")):
            if attempt == "offline":
                self._forget()
            try:
                accelerator.init_trackers(job.project, init_kwargs={"wandb": {**arguments, "mode": attempt}})
                break
            except Exception as error:  # the client raises many types when its server cannot be reached
                if attempt == "offline":
                    raise
                say(f"W&B cannot be reached ({' '.join(str(error).split())[:100]}); this run is logged offline")
                accelerator.trackers.clear()  # it keeps the one that failed, and would start it once more
                wandb.teardown()  # after a failed start its service still holds the run's id
        self._run = accelerator.get_tracker("wandb", unwrap=True)
        if attempt != "offline" and self._run.resumed:
            self.last_step = self._run.step - 1
        # Curves of an epoch stand over the epoch; every row has all three axes, so any of them can be chosen instead.
        for axis in ("epoch", "images_seen"):
            self._run.define_metric(axis, hidden=True)
        for glob in ("epoch/*", "val/*"):
            self._run.define_metric(glob, step_metric="epoch")
        for name, best in BEST.items():
            axis = None if name.startswith("train/") else "epoch"
            self._run.define_metric(name, step_metric=axis, summary=best)
        for folder in job.teachers:
            self._use(folder)
        if attempt == "offline":
            say(f"W&B: logged offline; send it later with: wandb sync {job.folder}/wandb/offline-run-*{job.identity}")

    def _forget(self) -> None:
        """Delete the offline records of earlier starts: the new one is sent all rows.

        A killed client leaves a record that lacks its last rows, and several records of one run are easily sent so that
        one replaces the other.
        """
        for record in self.job.folder.glob(f"wandb/offline-run-*-{self.job.identity}"):
            delete(record, self.job.folder)

    def _use(self, folder: Path) -> None:
        """Name a teacher's network as this run's input: the same files are the same artifact as its own run's output.

        `use_artifact` refuses to work offline; what it does online works in both cases, but has no public name.
        """
        try:
            artifact = network_artifact(folder)
            self._run._log_artifact(artifact, aliases=[], is_user_created=True, use_after_commit=True)
        except Exception as error:  # a record of where a run comes from must not stop it
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:100]
            say(f"W&B: the teacher {folder} is not linked ({reason})")

    def conclude(self, summary: dict, outcome: Outcome | None, step: int) -> None:
        """The results, and with an outcome the pictures and the network."""
        self._run.summary.update(summary)
        if outcome is not None:
            self._show(outcome, step)
            shown = {key: summary[key] for key in ("test_accuracy", "val_accuracy", "num_params", "multiply_adds")}
            self._run.log_artifact(network_artifact(self.job.folder, shown))

    def finish(self, accelerator, signal: int) -> None:
        """Close it; a run that was stopped is not shown as finished, and a sweep gives it to its next agent.

        Not after Ctrl-C, which is how both a user and the server end a trial for good.
        """
        if signal in (SIGTERM, SIGUSR1) and "WANDB_SWEEP_ID" in os.environ:
            self._run.mark_preempting()
        try:
            self._run.finish(exit_code=128 + signal if signal else 0)
        except TimeoutError:
            folder = Path(self._run.dir).parent
            say(f"W&B's server did not take all of this run; send it later with: wandb sync {folder}")
        finally:
            if self._staged:
                os.environ.pop("WANDB_DATA_DIR", None)

    def _show(self, outcome: Outcome, step: int) -> None:
        import wandb

        rows = [[wandb.Image(v) if k == "image" else v for k, v in row.items()] for row in outcome.hardest]
        media = {"test/hardest": wandb.Table(columns=list(outcome.hardest[0]), data=rows)}
        if len(outcome.classes) <= MAX_CHART:
            media["test/confusion"] = wandb.plot.confusion_matrix(
                y_true=outcome.labels.tolist(), preds=outcome.logits.argmax(1).tolist(), class_names=outcome.classes
            )
        else:
            media["test/confusion"] = wandb.Image(outcome.confusion_picture())
        self._run.log(media, step=step)


def network_artifact(folder: Path, metadata: dict | None = None):
    """The `wandb.Artifact` of a run folder's network; the same for the same files, whoever builds it."""
    import wandb

    name = re.sub(r"[^\w.-]", "-", "-".join(folder.parts[-2:])).strip("-")
    artifact = wandb.Artifact(name, type="model", metadata=metadata)
    for file in ("model.safetensors", "config.json"):
        artifact.add_file(str(folder / file), policy="immutable", skip_cache=True)  # no copy of it is made
    return artifact
