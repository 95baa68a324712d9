"""Rows of memory-mapped files that may be larger than memory.

A row that is not in memory is read from the disk when it is touched, one after another, and the kernel reads megabytes
around it: where the file does not fit, rows at random places push each other out. Told of the rows beforehand, it
reads these and no more, many at once.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np

LARGE_BYTES = 2**28  # a smaller file is left to the kernel: to tell it costs half a microsecond a row


def is_large(array) -> bool:
    """Whether this is an array that is a whole memory-mapped file, and one whose rows are worth announcing."""
    mapped = isinstance(array, np.ndarray) and type(array.base) is mmap.mmap
    return mapped and array.nbytes >= LARGE_BYTES and hasattr(mmap, "MADV_WILLNEED")


def announce(array: np.ndarray, rows: np.ndarray) -> None:
    """Let the disk read these rows of a large memory-mapped array meanwhile; nothing is waited for.

    Args:
        array: (N, ...) in C order; any other than a whole memory-mapped file is let be.
        rows: int64 (n,), 0 or more.
    """
    if is_large(array):
        for start, length in spans(array, rows):
            array.base.madvise(mmap.MADV_WILLNEED, start, length)


def spans(array: np.memmap, rows: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where these rows lie in the memory map of their array, from the start of a page on: start and length in bytes."""
    starts = array.offset % mmap.ALLOCATIONGRANULARITY + rows * array.strides[0]
    before = starts % mmap.PAGESIZE
    return zip((starts - before).tolist(), (before + array.strides[0]).tolist(), strict=True)
