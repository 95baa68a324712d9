"""A run folder: who may write in it, whether it goes on, and what it holds at the end.

config.yaml         all that is needed to run again
model.safetensors   the network's weights
config.json         what is needed to load the network: its name, classes, preprocessing, the weights' checksum
metrics.jsonl       one line a log interval and one an epoch
summary.json        the results; its presence means that the run is finished
checkpoints/        the newest two states to go on from
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from kd.run.parse import differing_fields, read_yaml
from kd.util.errors import UserError, say
from kd.util.files import write_atomic

FILES = ("config.yaml", "model.safetensors", "config.json", "metrics.jsonl", "summary.json", "tracker.json")


def is_run(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a run, finished or not, or one in the form that is published: weights and config.json."""
    return any((Path(folder) / name).is_file() for name in ("config.yaml", "model.safetensors"))


class Run:
    """One run's folder, opened for writing by the main process and known by path to the others.

    Args:
        folder: the run folder; made if it does not exist.
        config: the resolved config.
        overwrite: delete an earlier run's files first.
        is_main: whether this process writes.

    Raises:
        UserError: another live run holds the folder, it holds something else than a run, or a run of another config.
    """

    def __init__(self, folder: str, config: dict, overwrite: bool, is_main: bool):
        self.folder, self.config, self.overwrite, self.is_main = Path(folder), config, overwrite, is_main
        self._lock = None
        self._settled: dict[str, str] = {}
        if is_main:
            self._take()
            try:
                self._check()
            except BaseException:
                self.__exit__()
                raise

    def _take(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output_dir {str(self.folder)!r} is a file; name a folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        if links := sorted(path.name for path in self.folder.iterdir() if path.is_symlink()):
            raise UserError(
                f"output_dir {str(self.folder)!r} holds links ({', '.join(links[:3])}), and a run writes and deletes "
                f"nothing outside its folder; name another output_dir, or put there what they point to"
            )
        owner = self.folder / ".owner"
        lock = FileLock(self.folder / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = owner.read_text().strip() if owner.is_file() else "another process"
            raise UserError(
                f"output_dir {str(self.folder)!r} is in use by {who}; wait for it, or name another output_dir"
            ) from None
        self._lock = lock
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")

    def _check(self) -> None:
        """Refuse a folder that holds anything but this run; changes nothing."""
        saved = self.folder / "config.yaml"
        if not saved.is_file():
            foreign = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
            if foreign:
                raise UserError(
                    f"output_dir {str(self.folder)!r} holds files but no run ({', '.join(foreign[:3])}); "
                    f"name a new folder"
                )
        elif not self.overwrite:
            differing = differing_fields(read_yaml(saved), self.config)
            if differing:
                raise UserError(
                    f"output_dir {str(self.folder)!r} holds a run of another config; it differs in "
                    f"{'; '.join(differing)}; name another output_dir, or pass --overwrite true to delete it"
                )

    def begin(self) -> None:
        """Delete an earlier run if asked to, and write the config: called when nothing is left that a user could have
        got wrong, so that a mistake neither deletes a run nor takes a folder."""
        if not self.is_main:
            return
        if self.overwrite:
            for name in FILES[1:]:
                (self.folder / name).unlink(missing_ok=True)
            for name in ("checkpoints", "wandb", "tensorboard", "export"):
                shutil.rmtree(self.folder / name, ignore_errors=True)
        if self.overwrite or not (self.folder / "config.yaml").is_file():
            write_atomic(self.folder / "config.yaml", yaml.safe_dump(self.config, sort_keys=False).encode())

    def settle(self, name: str, choose: Callable[[], str]) -> str:
        """What this run chose when it began, so that it goes on in the same way even if the machine has changed since.

        The main process chooses and writes it down; the others ask when it has.
        """
        file = self.folder / ".choices.json"
        if not self.is_main:
            return json.loads(file.read_text())[name]
        if name not in self._settled:
            begun = (self.folder / "config.yaml").is_file() and file.is_file() and not self.overwrite
            known = json.loads(file.read_text()) if begun else {}
            self._settled[name] = known[name] if name in known else choose()
            write_atomic(file, json.dumps({**known, **self._settled}).encode())
        return self._settled[name]

    @property
    def finished(self) -> bool:
        """Whether the run has all its results and is to keep them; says so if it is."""
        done = (self.folder / "summary.json").is_file() and not self.overwrite
        if done:
            say(f"{self.folder} is finished already; nothing to do (--overwrite true starts it anew)")
        return done

    def finish(self, files: dict[str, bytes], summary: dict) -> None:
        """Write the network's files and then, as the mark that all is done, the summary."""
        if self.is_main:
            for name, content in files.items():
                write_atomic(self.folder / name, content)
            write_atomic(self.folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
            say(f"wrote {self.folder}/: {', '.join(sorted(p.name for p in self.folder.iterdir() if p.name[0] != '.'))}")

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        """Let others have the folder."""
        if self._lock is not None:
            (self.folder / ".owner").unlink(missing_ok=True)
            self._lock.release()


def read_summary(folder: Path) -> dict:
    """A finished run's summary.

    Raises:
        UserError: there is none, or it is damaged.
    """
    try:
        return json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        raise UserError(
            f"run {str(folder)!r} is not finished (no summary.json); run its command again to go on"
        ) from None
    except ValueError as error:
        raise UserError(f"run {str(folder)!r} is damaged: summary.json: {error}") from None
