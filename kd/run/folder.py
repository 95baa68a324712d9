"""A run folder: who may write in it, whether it resumes, and what it holds at the end.

config.yaml         all that is needed to run again
inputs.json         what it learns from: hashes of the data's splits and of others' weights
model.safetensors   the network's weights
config.json         what is needed to load the network: its name, classes, preprocessing, the weights' checksum
metrics.jsonl       one line a log interval and one an epoch
summary.json        the results; its presence means that the run is finished
checkpoints/        states to resume from: the newest two, of a finished run the newest
NAME/               another network that the run keeps, as a finished run of its own
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from kd.run.extend import check_extension, ends_later
from kd.run.parse import differing_fields
from kd.util.contents import read_choices, read_config, read_inputs, read_summary
from kd.util.errors import UserError, say
from kd.util.files import delete, write_atomic

FILES = ("config.yaml", "inputs.json", "model.safetensors", "config.json", "metrics.jsonl", "summary.json",
         "tracker.json")  # fmt: skip
_STEP = f"step_{'[0-9]' * 8}"
# What a run and its trackers and exports write beside these; all else in the folder is the user's.
_FOLDERS = {
    "checkpoints": (_STEP, f"{_STEP}.tmp-*", f".tmp-{_STEP}", f"damaged_{_STEP}", "frozen.safetensors"),
    "wandb": ("run-*", "offline-run-*", "latest-run", "debug*.log", "artifacts"),
    "tensorboard": ("events.out.tfevents.*", "over_*", "[0-9]*.[0-9]*"),
    "export": ("onnx", "torch", "safetensors", "hub"),
}


def is_run(folder: str | os.PathLike) -> bool:
    """Whether a folder holds a run, finished or not, or one in the form that is published: weights and config.json."""
    return any((Path(folder) / name).is_file() for name in ("config.yaml", "model.safetensors"))


def refuse_runs_file(path: Path, flag: str) -> None:
    """Refuse to write results of another kind over one of a run's own files.

    Raises:
        UserError: it is one.
    """
    if path.name in FILES and is_run(path.parent):
        raise UserError(f"{flag} {str(path)!r} is a run's file, which would be lost; name another place")


def _holder(folder: Path) -> str | None:
    """Who runs in a folder; None where nobody does, or nobody who could be known."""
    try:
        if (folder / ".owner").is_file():
            with FileLock(folder / ".lock", timeout=0):
                return None
    except Timeout:
        return (folder / ".owner").read_text().strip()
    except OSError:  # of a folder of somebody else's
        pass
    return None


class Run:
    """One run's folder, opened for writing by the main process and known by path to the others.

    Args:
        folder: the run folder; made if it does not exist.
        config: the resolved config.
        overwrite: delete an earlier run's files first.
        is_main: whether this process writes.

    Attributes:
        inputs: what `begin` writes down of what the run learns from; before that, of a run that resumes what it wrote
            when it began, {} if that was an earlier version. On the main process.
        extends: whether the run is finished and will be trained on, to a later end.

    Raises:
        UserError: another live run holds the folder, it holds something else than a run, or a run of another config.
    """

    def __init__(self, folder: str, config: dict, overwrite: bool, is_main: bool):
        self.folder, self.config, self.overwrite, self.is_main = Path(folder), config, overwrite, is_main
        self._lock, self._begun, self._extended = None, False, False
        self.inputs: dict | None = None
        self._settled: dict[str, str] = {}
        if is_main and overwrite:
            self._keep_inputs()
        try:
            if is_main:
                self._take()
                self._check()
            done = (self.folder / "summary.json").is_file() and not self.overwrite
            self.extends = done and ends_later(self.folder, config)
            self._done = done and not self.extends
        except BaseException:
            self.__exit__()
            raise

    def _keep_inputs(self) -> None:
        """Refuse to delete what this run begins with."""
        here = Path(os.path.realpath(self.folder))
        for name in ("teacher", "init_from", "weights"):
            given = self.config.get(name) or []
            for path in [given] if isinstance(given, str) else given:
                there = Path(os.path.realpath(path))
                if there.exists() and here in (there, *there.parents):
                    raise UserError(
                        f"output_dir {str(self.folder)!r} holds {name} {path!r}, which --overwrite true would delete; "
                        f"name another output_dir"
                    )

    def _take(self) -> None:
        if self.folder.exists() and not self.folder.is_dir():
            raise UserError(f"output_dir {str(self.folder)!r} is a file; name a folder")
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        if links := sorted(path.name for path in self.folder.iterdir() if path.is_symlink()):
            raise UserError(
                f"output_dir {str(self.folder)!r} holds links ({', '.join(links[:3])}), and a run writes and deletes "
                f"nothing outside its folder; name another output_dir, or put there what they point to"
            )
        owner, file = self.folder / ".owner", self.folder / ".lock"
        self._made_lock = not file.exists()
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            who = owner.read_text().strip() if owner.is_file() else "another process"
            raise UserError(
                f"output_dir {str(self.folder)!r} is in use by {who}; wait for it, or name another output_dir"
            ) from None
        self._lock = lock
        owner.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        here = Path(os.path.realpath(self.folder))
        for other in (*here.parents, *(file.parent for file in here.glob("*/.owner"))):
            if who := _holder(other):
                where = "lies in" if other in here.parents else "holds"
                raise UserError(
                    f"output_dir {str(self.folder)!r} {where} {str(other)!r}, a run in use by {who}; wait for it, or "
                    f"name another output_dir"
                )

    def _check(self) -> None:
        """Refuse a folder that holds anything but this run, or a run to delete; changes nothing."""
        if not (self.folder / "config.yaml").is_file():
            if foreign := sorted(path.name for path in self.folder.iterdir() if path.name[0] != "."):
                some = ", ".join(foreign[:3])
                raise UserError(f"output_dir {str(self.folder)!r} holds files but no run ({some}); name a new folder")
            return
        try:
            self.inputs = read_inputs(self.folder)
        except UserError:
            if not self.overwrite:
                raise
        if self.inputs is None and (self.folder / "checkpoints").is_dir():
            self.inputs = {}  # an earlier version wrote none
        old = read_config(self.folder)
        differing = differing_fields(old, self.config)
        if differing and not self.overwrite:
            check_extension(self.folder, old, self.config)
            self._extended = True
        finished = (self.folder / "summary.json").is_file()
        if self.overwrite and not differing and not finished and (self.inputs or {}).get("overwrote"):
            self.overwrite = False  # a job that was killed is started again with the command that began it
            say(f"{self.folder} holds what this command began with --overwrite true: it is not deleted again")
        if self.overwrite:
            self.inputs = None

    def begin(self, kept: Sequence[str] = ()) -> None:
        """Delete an earlier run where `overwrite` is set, and write the config: called when nothing is left that a user
        could have got wrong, so that a mistake neither deletes a run nor takes a folder.

        Args:
            kept: names of the networks that `finish` will write beside its own.

        Raises:
            UserError: something else has the place of one of these.
        """
        for folder in (self.folder / name for name in kept if self.is_main):
            # a kill may have left the file from which its config would have been renamed
            held = {path.name for path in folder.iterdir()} - {".config.yaml.tmp"} if folder.is_dir() else set()
            if folder.is_file() or (held and folder not in self._kept_before()):
                raise UserError(
                    f"output_dir {str(self.folder)!r}: a network {folder.name!r} will be kept there, and "
                    f"{str(folder)!r} is something else; move it, or name another output_dir"
                )
        self._begun = True
        if not self.is_main:
            return
        if self.overwrite:
            delete(self.folder / "inputs.json", self.folder)  # first: what is deleted in part is not resumed
            kept_before = self._kept_before()
            for path in self._own(kept_before):
                delete(path, self.folder)
            for folder in (*(one / name for one in (*kept_before, self.folder) for name in _FOLDERS), *kept_before):
                with suppress(OSError):  # it holds something of the user's, or is not there
                    folder.rmdir()
        for folder in (self.folder, *self._kept_before()) if self._extended else ():
            delete(folder / "summary.json", self.folder)  # first: it is not finished any more
        new = self.overwrite or not (self.folder / "config.yaml").is_file()
        if new or self._extended:
            write_atomic(self.folder / "config.yaml", self._config_yaml())
        if new or not ((self.folder / "inputs.json").is_file() or (self.folder / "checkpoints").is_dir()):
            self.inputs = {"overwrote": self.overwrite, **(self.inputs or {})}
            write_atomic(self.folder / "inputs.json", (json.dumps(self.inputs, indent=2) + "\n").encode())

    def _kept_before(self) -> list[Path]:
        """Folders of the other networks that an earlier run kept: each has a config that names it so."""
        found = []
        for file in self.folder.glob("*/config.yaml"):
            with suppress(UserError):  # another program's
                if read_config(file.parent).get("network") == file.parent.name:
                    found.append(file.parent)
        return found

    def _own(self, kept: Sequence[Path]) -> Iterator[Path]:
        """What an earlier run wrote, its config aside: until that is replaced, it says that the folder is a run's. Of
        the networks that it kept the config too, last, so that after a kill they are still known."""
        for folder in (*kept, self.folder):
            yield from (folder / name for name in FILES[1:])
            for name, patterns in _FOLDERS.items():
                for pattern in patterns:
                    yield from (folder / name).glob(pattern)
        yield from (folder / FILES[0] for folder in kept)

    def require(self) -> None:
        """Look whether what was written is still there.

        Raises:
            UserError: the folder, or a file of the run, was deleted.
        """
        gone = [name for name in ("config.yaml", "metrics.jsonl") if not (self.folder / name).is_file()]
        if self.is_main and gone:
            raise UserError(
                f"output_dir {str(self.folder)!r} was deleted while the run wrote to it (gone: {', '.join(gone)}); "
                f"delete what is left of it and run the same command to start again"
            )

    def settle(self, name: str, choose: Callable[[], str]) -> str:
        """What this run chose when it began, so that it resumes in the same way even if the machine has changed since.

        The main process chooses and writes it down; the others read it then.
        """
        if not self.is_main:
            return read_choices(self.folder)[name]
        if name not in self._settled:
            begun = (self.folder / "config.yaml").is_file() and not self.overwrite
            known = read_choices(self.folder) if begun else {}
            self._settled[name] = known[name] if name in known else choose()
            write_atomic(self.folder / ".choices.json", json.dumps({**known, **self._settled}).encode())
        return self._settled[name]

    @property
    def finished(self) -> bool:
        """Whether the run has all its results and is to keep them; says so if it is."""
        if self._done:
            ended_by = read_summary(self.folder).get("stopped_by")
            how, more = (f", by {ended_by}", f"a larger --{ended_by} resumes it, ") if ended_by else ("", "")
            say(f"{self.folder} is finished already{how}; nothing to do ({more}--overwrite true starts it again)")
        return self._done

    def finish(self, files: dict[str, dict[str, bytes]], summaries: dict[str, dict]) -> None:
        """Write each network's files and summary, with what it learned from; both by the network's name.

        The first is the run's own, and its summary, the last that is written, the mark that all is done. Any other goes
        to a folder of its name below, with a config, as a finished run of its own.
        """
        self.require()
        if not self.is_main:
            return
        first, *others = files
        for name in (*others, first):
            folder, written = self.folder, {}
            if name != first:
                folder = self.folder / name
                folder.mkdir(exist_ok=True)
                written["config.yaml"] = self._config_yaml(output_dir=str(folder), network=name)  # says whose it is
            written |= files[name]
            summary = {**summaries[name], "inputs": self.inputs}
            written["summary.json"] = (json.dumps(summary, indent=2) + "\n").encode()
            for file, content in written.items():
                write_atomic(folder / file, content)
        self._drop_checkpoints(self.config.get("keep_checkpoints", 0))
        names = sorted(path.name for path in self.folder.iterdir() if path.name[0] != ".")
        say(f"wrote {self.folder}/: {', '.join(names)}")

    def _config_yaml(self, **more: str) -> bytes:
        return yaml.safe_dump({**self.config, **more}, sort_keys=False).encode()

    def _drop_checkpoints(self, keep: int) -> None:
        """Delete all but the newest checkpoints of a finished run; with none left, what they have in common too."""
        folder, patterns = self.folder / "checkpoints", _FOLDERS["checkpoints"]
        if keep:
            dropped = sorted(folder.glob(_STEP), reverse=True)[keep:]
        else:
            dropped = [path for pattern in patterns for path in folder.glob(pattern)]
        for path in dropped:
            delete(path, self.folder)
        with suppress(OSError):  # it holds a checkpoint, or something of the user's
            folder.rmdir()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_) -> None:
        """Let others have the folder; a run that did not begin leaves it as it was."""
        if self._lock is None:
            return
        (self.folder / ".owner").unlink(missing_ok=True)
        if not self._begun and self._made_lock:
            (self.folder / ".lock").unlink(missing_ok=True)
        self._lock.release()
        for folder in self._made if not self._begun else ():
            with suppress(OSError):  # it is not empty
                folder.rmdir()
