"""A table of what a frozen network gives for every image of a split, made once: for views that do not change.

It is computed in the images' order and in batches of a fixed size, so that the table does not depend on the run,
on its interruptions or on the number of processes. It is checked by its checksums before use.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from kd.data import Split
from kd.util.errors import say, writing
from kd.util.files import built_aside

BATCH_SIZE = 128
LIMIT_BYTES = 4 * 2**30  # a larger table is not made: reading it back would cost what it saves


@torch.no_grad()
def fixed_table(kind: str, folder: Path, compute, split: Split, accelerator) -> dict[str, np.ndarray] | None:
    """Rows by name, float32 (N, ...), for every image of a split, from disk or made now; None if too large.

    Args:
        kind: what is computed, in words.
        folder: where the table is; its name says what the rows depend on.
        compute: gives the values by name for the columns of a batch.
    """
    first = compute(split.read(np.arange(1), accelerator.device)[0])
    size = sum(4 * value.numel() for value in first.values()) * len(split)
    if size > LIMIT_BYTES:
        limit = f"{LIMIT_BYTES / 1e9:.1f} GB"
        say(f"{kind}: computed at each step (a table would take {size / 1e9:.1f} GB, the limit is {limit})")
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one process makes it, the others wait and find it
        found = _read(folder)
        if found is None:
            _build(kind, folder, compute, split, first, accelerator)
            found = _read(folder)
            how = "computed once"
        else:
            how = "looked up"
    say(f"{kind}: {how} for {len(split)} images, {size / 1e6:.2f} MB in {folder}")
    return found


def _build(kind: str, folder: Path, compute, split: Split, first: dict[str, Tensor], accelerator) -> None:
    starts = range(0, len(split), BATCH_SIZE)
    wheres = [np.arange(start, min(start + BATCH_SIZE, len(split))) for start in starts]
    read = split.batches(wheres, accelerator.device)
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, whose space may be needed
    with built_aside(folder) as aside:
        # rows are written as they come, so that a table may exceed the memory
        with writing(folder), ExitStack() as opened:
            files = {name: opened.enter_context(open(aside / f"{i}.npy", "wb")) for i, name in enumerate(first)}
            for name, file in files.items():
                header = {"descr": "<f4", "fortran_order": False, "shape": (len(split), *first[name].shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
            for _ in tqdm(wheres, desc=kind, unit="batch", disable=None, leave=False):
                for name, value in compute(next(read)[0]).items():
                    files[name].write(value.float().cpu().numpy().astype("<f4").tobytes())
        digests = {name: _digest(Path(file.name)) for name, file in files.items()}
        with writing(folder):
            (aside / "meta.json").write_text(json.dumps(digests))


def _digest(path: Path) -> str:
    """The file's SHA-256, read in parts."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


def _read(folder: Path) -> dict[str, np.ndarray] | None:
    """The rows of a whole table; None if there is none or it is damaged, and then says so."""
    if not folder.exists():
        return None
    try:
        rows = {}
        for i, (name, digest) in enumerate(json.loads((folder / "meta.json").read_text()).items()):
            if _digest(folder / f"{i}.npy") != digest:
                raise ValueError(f"{i}.npy does not have its checksum")
            rows[name] = np.load(folder / f"{i}.npy", mmap_mode="r")
        return rows
    except (OSError, ValueError, AttributeError) as error:
        say(f"table {folder} is damaged ({error}); it is rebuilt")
        return None
