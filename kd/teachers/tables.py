"""Tables on disk of what a frozen network gives: for every image, or for every view of every image.

A fixed table is for views that do not change. It is computed in the images' order and in batches of a fixed size, so
that it does not depend on the run, on its interruptions or on the number of processes, and is checked by its checksums
before use.

A table of views is filled as the views come up. One file of records, one for each (image, view): a mark of four bytes
and the values as float16. The file is made with holes, so that it takes the space of what is filled. A record is
written in one go by whoever computed it first; its mark is the CRC-32 of its content, begun with its place. So a record
that was torn by a crash, lost by another machine's cache of the same page, or damaged on the disk is not read: it is
computed again. No process waits for another, and several runs may fill one table. Its values come back rounded to
float16 (to one part in 2,048) whether they were found or just computed, so a run that resumes after an interruption
reads what it computed before. What float16 cannot hold is not kept and not rounded.
"""

import errno
import functools
import json
import os
import shutil
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor
from tqdm import tqdm

from kd.data import Split
from kd.util.device import to_device
from kd.util.errors import say, writing
from kd.util.files import built_aside, file_sha256
from kd.util.mapped import announce

BATCH_SIZE = 128  # of a fixed table
LIMIT_BYTES = 4 * 2**30  # a larger fixed table is not made: reading it back would cost what it saves
FORMAT = 1  # of a table of views

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # columns of a frozen network for the columns of a batch
Read = TypeVar("Read")


def _opened(folder: Path, read: Callable[[], Read], make: Callable[[Path], None]) -> tuple[Read, bool]:
    """What `read` gives of a table, and whether it was made for it: absent, or refused by `read` as damaged."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one process makes it, the others wait and find it
        if folder.exists():
            try:
                return read(), False
            except (OSError, ValueError, AttributeError) as error:
                say(f"table {folder} is damaged ({error}); it is rebuilt")
        shutil.rmtree(folder, ignore_errors=True)  # a damaged one, whose space may be needed
        with writing(folder), built_aside(folder) as aside:
            make(aside)
        return read(), True


@torch.no_grad()
def fixed_table(kind: str, folder: Path, compute: Compute, split: Split, accelerator) -> dict[str, np.ndarray] | None:
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
    make = functools.partial(_build, kind, compute, split, first, accelerator)
    found, made = _opened(folder, lambda: _rows(folder), make)
    how = "computed once" if made else "looked up"
    say(f"{kind}: {how} for {len(split)} images, {size / 1e6:.2f} MB in {folder}")
    return found


def _build(kind: str, compute: Compute, split: Split, first: dict[str, Tensor], accelerator, aside: Path) -> None:
    wheres = np.split(np.arange(len(split)), range(BATCH_SIZE, len(split), BATCH_SIZE))
    read = split.batches(wheres, accelerator.device)
    with ExitStack() as opened:  # rows are written as they come, so that a table may exceed the memory
        files = {name: opened.enter_context(open(aside / f"{i}.npy", "wb")) for i, name in enumerate(first)}
        for name, file in files.items():
            header = {"descr": "<f4", "fortran_order": False, "shape": (len(split), *first[name].shape[1:])}
            np.lib.format.write_array_header_1_0(file, header)
        for _ in tqdm(wheres, desc=kind, unit="batch", disable=None, leave=False):
            for name, value in compute(next(read)[0]).items():
                files[name].write(value.float().cpu().numpy().astype("<f4").tobytes())
    digests = {name: file_sha256(Path(file.name)) for name, file in files.items()}
    (aside / "meta.json").write_text(json.dumps(digests))


def _rows(folder: Path) -> dict[str, np.ndarray]:
    """The rows of a whole table; a ValueError where a file does not have its checksum."""
    rows = {}
    for i, (name, digest) in enumerate(json.loads((folder / "meta.json").read_text()).items()):
        if file_sha256(folder / f"{i}.npy") != digest:
            raise ValueError(f"{i}.npy does not have its checksum")
        rows[name] = np.load(folder / f"{i}.npy", mmap_mode="r")
    return rows


def record_of(shapes: dict[str, tuple]) -> np.dtype:
    """The type of a record with values of these names and shapes."""
    return np.dtype([("mark", "<u4"), *((name, "<f2", shape) for name, shape in shapes.items())])


class ViewTable:
    """Opens a table, or makes an empty one.

    Args:
        folder: where it is; its name says what the values depend on.
        shapes: of one image's values, by name.
        num_images, num_views: the table's rows are image * num_views + view.
    """

    def __init__(self, folder: Path, shapes: dict[str, tuple], num_images: int, num_views: int):
        self.folder, self.num_views = folder, num_views
        self._names, self._type = list(shapes), record_of(shapes)
        self._full = False
        meta = {"format": FORMAT, "rows": num_images * num_views, "record": str(self._type.descr)}
        size = meta["rows"] * self._type.itemsize
        _opened(folder, lambda: _check(folder, meta, size), lambda aside: _make(aside, meta, size))
        self._file = open(folder / "rows.bin", "r+b", buffering=0)  # noqa: SIM115 (open as long as the table)
        self._rows = np.memmap(self._file, self._type, "r")

    def look(self, lookup: Tensor | None, inputs: dict[str, Tensor], compute: Compute) -> dict[str, Tensor]:
        """Values by name, float32 (B, ...) on the inputs' device; what is not there yet is computed, and kept.

        Args:
            lookup: int64 (B, 2) on the CPU, image and view; None to compute without keeping.
            inputs: columns of these views, of B rows.
            compute: gives the values by name for the columns of a batch.
        """
        if lookup is None:
            return compute(inputs)
        device = inputs["image"].device
        rows = (lookup[:, 0] * self.num_views + lookup[:, 1]).numpy()
        announce(self._rows, rows)
        records = self._rows[rows]
        missing = np.flatnonzero(records["mark"] != _marks(records, rows))
        if len(missing):
            if len(missing) < len(rows):
                where = to_device(torch.from_numpy(missing), device)
                inputs = {name: column[where] for name, column in inputs.items()}
            exact = {name: value.float().cpu().numpy() for name, value in compute(inputs).items()}
            fits = self._keep(records, rows, missing, exact)
        values = {name: records[name].astype(np.float32) for name in self._names}
        if len(missing) and not fits.all():
            for name in self._names:
                values[name][missing[~fits]] = exact[name][~fits]
        return {name: to_device(torch.from_numpy(value), device) for name, value in values.items()}

    def _keep(self, records, rows, missing, exact: dict[str, np.ndarray]) -> np.ndarray:
        """Put values into these records and into the table; returns which of them float16 can hold."""
        fits = np.ones(len(missing), bool)
        with np.errstate(over="ignore"):
            for name, value in exact.items():
                records[name][missing] = value
                fits &= np.isfinite(records[name][missing].reshape(len(missing), -1)).all(1)
        kept = missing[fits]
        new = records[kept]
        new["mark"] = _marks(new, rows[kept])
        try:
            for row, record in zip(rows[kept], new, strict=True):
                if not self._full:
                    os.pwrite(self._file.fileno(), record.tobytes(), int(row) * self._type.itemsize)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._full = True
            say(f"table {self.folder}: the disk is full; what is not in it is computed at each step from here on")
        return fits

    def filled(self, images: np.ndarray) -> float:
        """The share of these images' views that is in the table, by the marks of up to 4,096 of them."""
        total = len(images) * self.num_views
        some = np.unique(np.linspace(0, total - 1, 4096).astype(np.int64))
        rows = images[some // self.num_views] * self.num_views + some % self.num_views
        file, size = self._file.fileno(), self._type.itemsize
        # not through the memory map, whose every page would bring megabytes around it from the disk
        marks = [os.pread(file, 4, row * size) for row in rows.tolist()]
        return sum(map(any, marks)) / len(marks)


def taken(folder: Path) -> int:
    """Bytes that a table takes on its disk."""
    try:
        return (folder / "rows.bin").stat().st_blocks * 512
    except FileNotFoundError:
        return 0


def _marks(records: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The mark that each record must have at its row; never 0, which a hole in the file reads as."""
    content = np.ascontiguousarray(records).view(np.uint8).reshape(len(records), records.itemsize)[:, 4:]
    marks = (zlib.crc32(record.tobytes(), row & 0xFFFFFFFF) for record, row in zip(content, rows.tolist(), strict=True))
    return np.fromiter((mark or 1 for mark in marks), np.uint32, len(records))


def _check(folder: Path, meta: dict, size: int) -> None:
    """Raise a ValueError where a folder does not hold this table, of so many bytes."""
    if json.loads((folder / "meta.json").read_text()) != meta:
        raise ValueError("meta.json is not that of this table")
    if (found := (folder / "rows.bin").stat().st_size) != size:
        raise ValueError(f"rows.bin has {found} bytes")


def _make(aside: Path, meta: dict, size: int) -> None:
    with open(aside / "rows.bin", "wb") as file:
        file.truncate(size)
    (aside / "meta.json").write_text(json.dumps(meta))
