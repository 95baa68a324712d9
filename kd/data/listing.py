"""The files of a folder: which they are, and a hash of what they hold.

Files are read once: the hash is kept under all that tells that they have changed since (path, name, size, time and
inode). What changes none of these, a disk that loses bits, is not noticed.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

from tqdm import tqdm

from kd.data.stream import in_workers
from kd.util.errors import UserError
from kd.util.files import file_sha256, locked, shown, unless_read_only, write_atomic
from kd.util.machine import num_cores

Listing = list[tuple[tuple[str, ...], os.stat_result]]  # the parts of each file's path below a folder, and its state
MEMORY = "contents"  # the folder of the cache where hashes are kept
BLOCK, MANY_BYTES = 64, 2**28  # files that a process reads at a time; from how many bytes on there are processes


def digest(parts: list[str]) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def listing(folder: Path) -> Listing:
    """All files below a folder, in the order of their paths; hidden ones are passed over.

    Raises:
        UserError: a link leads to a folder that it lies in.
    """
    return sorted(_walk(folder, (), ()))


def _walk(folder: Path, above: tuple[str, ...], inside: tuple) -> Iterator:
    """A Path for each of a million files would take half a minute."""
    state = os.stat(folder)
    if (state.st_dev, state.st_ino) in inside:
        raise UserError(f"{shown(folder)} is a link to a folder that it lies in; remove it")
    inside = (*inside, (state.st_dev, state.st_ino))
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                state = entry.stat()
            except OSError:  # a link to nothing or to itself: an image of this name is unreadable
                state = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(state.st_mode):
                yield from _walk(Path(entry.path), (*above, entry.name), inside)
            else:
                yield (*above, entry.name), state


def contents(folder: Path, files: Listing, memory: Path, place: Path | None = None) -> str:
    """A hash of the files' names and of what they hold, kept in the folder `memory`; `place` is where the folder is
    going to be, if not where it is."""
    names = [os.sep.join(parts) for parts, _ in files]
    states = [f"{state.st_size}:{state.st_mtime_ns}:{state.st_ino}" for _, state in files]
    known = memory / digest([str((place or folder).resolve()), *names, *states])
    with unless_read_only():
        memory.mkdir(parents=True, exist_ok=True)
    with nullcontext() if known.is_file() else locked(memory / ".lock"):  # one reads, the others wait and find it
        if known.is_file():
            return known.read_text()
        many = sum(state.st_size for _, state in files) > MANY_BYTES
        paths, hashes = [os.path.join(folder, name) for name in names], []
        blocks = [paths[start : start + BLOCK] for start in range(0, len(paths), BLOCK)]
        with tqdm(total=len(paths), desc="read files", unit="file", disable=None, leave=False) as bar:
            for some in in_workers(_hashes, blocks, num_cores() if many else 0):
                hashes += some
                bar.update(len(some))
        found = digest([*names, *hashes])
        with unless_read_only():
            write_atomic(known, found.encode())
        return found


def _hashes(paths: list[str]) -> list[str]:
    """Empty for what cannot be read, which is told when an image is made of it, and for pipes."""
    hashes = [""] * len(paths)
    for number, path in enumerate(paths):
        with suppress(OSError):
            hashes[number] = file_sha256(Path(path)) if os.path.isfile(path) else ""
    return hashes
