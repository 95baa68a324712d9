"""A table on disk of what a frozen network gives for every view of every image, filled as the views come up.

One file of records, one for each (image, view): a mark of four bytes and the values as float16. The file is made with
holes, so that it takes the space of what is filled. A record is written in one go by whoever computed it first;
its mark is the CRC-32 of its content, begun with its place. So a record that was torn by a crash, lost by another
machine's cache of the same page, or damaged on the disk is not read: it is computed again. No process waits for
another, and several runs may fill one table.

Values come back rounded to float16 (to one part in 2,048) whether they were found or just computed, so a run that
resumes after an interruption reads what it computed before. What float16 cannot hold is not kept and not rounded.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from kd.util.device import to_device
from kd.util.errors import say
from kd.util.files import built_aside
from kd.util.mapped import announce

FORMAT = 1


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
        folder.parent.mkdir(parents=True, exist_ok=True)
        meta = {"format": FORMAT, "rows": num_images * num_views, "record": str(self._type.descr)}
        with FileLock(folder.with_suffix(".lock")):
            why = _unfit(folder, meta, self._type.itemsize) if folder.exists() else "absent"
            if why:
                if folder.exists():
                    say(f"table {folder} is damaged ({why}); it is rebuilt")
                _make(folder, meta, self._type.itemsize)
        self._file = open(folder / "rows.bin", "r+b", buffering=0)  # noqa: SIM115 (open as long as the table)
        self._rows = np.memmap(self._file, self._type, "r")

    def look(
        self,
        lookup: Tensor | None,
        inputs: dict[str, Tensor],
        compute: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    ) -> dict[str, Tensor]:
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


def _unfit(folder: Path, meta: dict, record_bytes: int) -> str:
    """Why a folder does not hold this table; empty if it does."""
    try:
        found = json.loads((folder / "meta.json").read_text())
        size = (folder / "rows.bin").stat().st_size
    except (OSError, ValueError) as error:
        return str(error)
    if found != meta:
        return "meta.json is not that of this table"
    return "" if size == meta["rows"] * record_bytes else f"rows.bin has {size} bytes"


def _make(folder: Path, meta: dict, record_bytes: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # a damaged one, whose space may be needed
    with built_aside(folder) as aside:
        with open(aside / "rows.bin", "wb") as file:
            file.truncate(meta["rows"] * record_bytes)
        (aside / "meta.json").write_text(json.dumps(meta))
