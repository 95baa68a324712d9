"""Files and folders that are there whole or not at all, and the one way in which something of ours is deleted."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from kd.util.errors import writing


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it holds either all of the new content or what it held before."""
    aside = path.with_name(f".{path.name}.tmp")
    try:
        write_synced(aside, content, path)
        os.replace(aside, path)
    except OSError:
        with suppress(OSError):
            aside.unlink()
        raise
    sync(path.parent)


def write_synced(path: Path, content: bytes, named: Path | None = None) -> None:
    """Write a file and wait until the disk has it; an error names `named`, by default the file itself.

    What has its name is deleted before: a link would lead to another file.
    """
    with writing(named or path):
        path.unlink(missing_ok=True)
        with open(path, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or what was renamed in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Hold a lock file. Where nothing can be written nobody builds, and what is there is read without it."""
    lock = FileLock(file)
    with unless_read_only():
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def unless_read_only() -> Iterator[None]:
    """Do something that a folder which others may only read can do without."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise


def file_sha256(path: Path) -> str:
    """The file's SHA-256, read in parts."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def shown(path: str | Path) -> str:
    """A path as text that can be printed, whatever bytes its name has."""
    return os.fsencode(path).decode(errors="replace")


@contextmanager
def built_aside(folder: Path) -> Iterator[Path]:
    """A new empty folder that takes the place of `folder` when it has been filled, and is deleted where that failed.

    The caller holds the lock of `folder`: what other builders left aside is of dead ones, and deleted.
    """
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    try:
        yield aside
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def delete(path: Path, inside: Path) -> None:
    """Delete a file or a folder that lies in the folder `inside`, at any depth; of a link the link alone.

    What is not there, or cannot be deleted, is let be.

    Raises:
        ValueError: the path leads out of `inside`.
    """
    place, within = path.parent.resolve() / path.name, inside.resolve()
    if path.name in ("", "..") or within not in place.parents:
        raise ValueError(f"{path} does not lie in {inside} and is not deleted")
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
