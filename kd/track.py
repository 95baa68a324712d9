"""The record of a run: metrics.jsonl always, and one tracker run through Accelerate."""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
from pathlib import Path
from urllib.parse import urlparse

from accelerate import Accelerator

from kd.errors import say
from kd.run_folder import Run, write_atomic


def choose_tracker(report_to: str) -> str:
    """`wandb`, `tensorboard` or `none`; `auto` is wandb where a key is found or W&B is set offline."""
    if report_to != "auto":
        return report_to
    offline = os.environ.get("WANDB_MODE", "") in ("offline", "dryrun")
    disabled = os.environ.get("WANDB_MODE", "") == "disabled" or os.environ.get("WANDB_DISABLED", "") in ("true", "1")
    return "wandb" if (offline or _has_key()) and not disabled else "none"


def _has_key() -> bool:
    """Whether a W&B key is there, without importing wandb (slow) and without a prompt."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class Tracker:
    """Writes rows to metrics.jsonl and to the tracker chosen by `report_to`; only the main process writes.

    Args:
        objective: the loss in words.
        keep_bytes: length of metrics.jsonl at the checkpoint the run goes on from; what follows it is cut off.
    """

    def __init__(self, accelerator: Accelerator, run: Run, config, objective: str, keep_bytes: int):
        self._accelerator, self._file = accelerator, None
        self.name = choose_tracker(config.report_to)
        if not run.is_main:
            return
        self._file = (run.folder / "metrics.jsonl").open("ab")
        self._file.truncate(min(keep_bytes, self._file.tell()))
        self._file.seek(0, os.SEEK_END)
        if self.name == "wandb":
            self._start_wandb(run, config, objective)
        elif self.name == "tensorboard":
            accelerator.init_trackers("tensorboard", config=_flat(run.config))

    def _start_wandb(self, run: Run, config, objective: str) -> None:
        """The same W&B run after a restart; offline rather than a prompt or a stop."""
        logging.getLogger("wandb").setLevel(logging.ERROR)
        note = run.folder / "tracker.json"
        if note.is_file():
            identity = json.loads(note.read_text())["wandb_id"]
        else:
            identity = secrets.token_hex(4)
            write_atomic(note, json.dumps({"wandb_id": identity}).encode())
        mode = os.environ.get("WANDB_MODE", "online" if _has_key() else "offline")
        folder = run.folder.resolve()
        arguments = {
            "id": identity,
            "resume": "allow",
            "dir": str(folder),
            "name": "/".join(folder.parts[-2:]),
            # one experiment, its teacher, its student alone and its distilled ones, is one group
            "group": folder.parent.name,
            "job_type": "distill" if hasattr(config, "teacher") else "train",
            "notes": objective,
            "config": run.config,
            "settings": {"silent": True},
        }
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self._accelerator.init_trackers(config.project, init_kwargs={"wandb": {**arguments, "mode": attempt}})
                break
            except Exception as error:  # the client raises many types when its server cannot be reached
                if attempt == "offline":
                    raise
                say(f"W&B cannot be reached ({' '.join(str(error).split())[:100]}); this run is logged offline")
        for name, summary in (("val/accuracy", "max"), ("val/nll", "min"), ("train/loss", "min")):
            self._accelerator.get_tracker("wandb", unwrap=True).define_metric(name, summary=summary)
        if attempt == "offline":
            say(f"W&B: logged offline; send it later with: wandb sync {run.folder}/wandb/offline-run-*{identity}")

    @property
    def num_bytes(self) -> int:
        """Length of metrics.jsonl."""
        return self._file.tell() if self._file else 0

    def log(self, row: dict) -> None:
        """Add a row; it must have `step`."""
        if self._file is None:
            return
        self._file.write((json.dumps(row) + "\n").encode())
        self._file.flush()
        if self.name != "none":
            values = {key: value for key, value in row.items() if isinstance(value, int | float) and key != "step"}
            self._accelerator.log(values, step=row["step"])

    def finish(self, summary: dict | None = None) -> None:
        """Close the record; with a summary, its numbers become the tracker run's."""
        if self._file is None:
            return
        if self.name == "wandb" and summary is not None:
            self._accelerator.get_tracker("wandb", unwrap=True).summary.update(summary)
        self._file.close()
        self._file = None
        if self.name != "none":
            for tracker in self._accelerator.trackers:
                tracker.finish()


def tracker_arguments(config, folder: str) -> dict:
    """Keyword arguments of `Accelerator` for the tracker that `config.report_to` chooses."""
    name = choose_tracker(config.report_to)
    return {"log_with": None if name == "none" else name, "project_dir": str(Path(folder))}


def _flat(value: dict, prefix: str = "") -> dict:
    """A config as the flat scalars and strings that TensorBoard can hold."""
    flat = {}
    for key, inner in value.items():
        if isinstance(inner, dict):
            flat.update(_flat(inner, f"{prefix}{key}."))
        else:
            flat[prefix + key] = inner if isinstance(inner, bool | int | float | str) else json.dumps(inner)
    return flat
