"""Folders that are there whole or not at all: filled under another name, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
