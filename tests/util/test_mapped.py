"""Rows of memory-mapped files: told of before they are read, and the same rows."""

from __future__ import annotations

import mmap

import numpy as np
import pytest
import torch

from kd import data
from kd.data import Split
from kd.data.store import Store
from kd.teachers.tables import record_of
from kd.util import mapped


@pytest.fixture
def images(tmp_path) -> np.memmap:
    """300 different images of 3x8x8, 57,600 bytes in a file."""
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (300, 3, 8, 8), dtype=np.uint8))
    return np.load(tmp_path / "images.npy", mmap_mode="r")


def test_spans_begin_at_a_page_and_end_with_their_row(images, tmp_path):
    kind = record_of({"logits": (3,), "map": (50, 50)})
    records = np.memmap(tmp_path / "rows.bin", kind, "w+", shape=40)
    records["map"] = np.arange(40, dtype=np.float16)[:, None, None]
    for array in (images, records):
        rows = np.array([0, len(array) - 1, 7, 7, 20])
        found = list(mapped.spans(array, rows))
        assert len(found) == len(rows)
        for row, (start, length) in zip(rows, found, strict=True):
            assert start % mmap.PAGESIZE == 0
            assert length < array.strides[0] + mmap.PAGESIZE
            assert array.base[start : start + length].endswith(array[row].tobytes())


def test_only_large_whole_maps_are_told_of(images, monkeypatch):
    told = []
    spans = mapped.spans
    monkeypatch.setattr(mapped, "spans", lambda array, rows: told.append(array) or spans(array, rows))
    rows = np.arange(10)
    mapped.announce(images, rows)
    assert not told  # small
    monkeypatch.setattr(mapped, "LARGE_BYTES", images.nbytes)
    mapped.announce(images[1:], rows)  # offset and base are not those of the file
    mapped.announce(images + 1, rows)
    assert not told
    mapped.announce(images, rows)
    assert [array is images for array in told] == [True]


def test_each_batch_is_told_of_before_the_one_before_it_is_given_and_is_the_same(images, monkeypatch):
    split = Split(Store(images, np.arange(300)), np.arange(1, 300, 2))
    told, wheres = [], [np.array([5, 0]), np.array([149, 3, 3]), np.array([7])]
    monkeypatch.setattr(mapped, "LARGE_BYTES", images.nbytes)
    monkeypatch.setattr(data, "announce", lambda array, places: told.append(places.tolist()))
    given = split.batches(iter(wheres), torch.device("cpu"))
    for number, where in enumerate(wheres):
        pixels, labels, places = next(given)
        assert told == [(1 + 2 * next_).tolist() for next_ in wheres[: number + 2]]
        assert places.tolist() == labels.tolist() == (1 + 2 * where).tolist()
        assert np.array_equal(pixels["image"].numpy(), images[1 + 2 * where])
    assert next(given, None) is None
