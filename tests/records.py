"""What each tracker has written, read back as {(step, name): value}, to be compared with metrics.jsonl.

A step's name may be there twice with one value, as the epoch is in an interval's row and in the epoch's, not with two.
"""

from __future__ import annotations

import json
import os
import sqlite3
import struct
from pathlib import Path

MEDIA = ("test/hardest", "test/confusion")
NOT_OURS = ("_timestamp", "_runtime", "_step", "_wandb")


def truth(run: Path) -> dict[tuple[int, str], float]:
    """The numbers of metrics.jsonl."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        (row["step"], key): value
        for row in rows
        for key, value in row.items()
        if isinstance(value, int | float) and key != "step"
    }


def wandb_records(run: Path) -> list:
    """All records of the client's own files, in order of their start; the client has no reader of its own for Python.

    The file is a header of 7 bytes and then a log as LevelDB's: blocks of 32 kB; chunks of a checksum (4 bytes), a
    length (2), a kind (1: 1 whole, 2 first, 3 middle, 4 last) and so many bytes of a Record.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    records = []
    for file in sorted(run.glob("wandb/*run-*/run-*.wandb")):
        content, place, whole = file.read_bytes(), 7, b""
        assert content[:4] == b":W&B"
        while place + 7 <= len(content):
            if 32768 - place % 32768 < 7:
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack("<IHB", content[place : place + 7])
            if kind == 0:
                break
            whole = (whole if kind in (3, 4) else b"") + content[place + 7 : place + 7 + length]
            place += 7 + length
            if kind in (1, 4):
                records.append(Record.FromString(whole))
    return records


def wandb_scalars(records: list) -> dict[tuple[int, str], float]:
    """The history's numbers."""
    found = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            step = row.get("_step", record.history.step.num)
            for key, value in row.items():
                if isinstance(value, int | float) and not key.startswith(NOT_OURS):
                    assert found.setdefault((step, key), value) == value
    return found


def tensorboard_scalars(folder: Path) -> dict[tuple[int, str], float]:
    """The numbers that TensorBoard shows of one folder's event files."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    record = EventAccumulator(str(folder), tensor_size_guidance={"scalars": 0}).Reload()
    found = {}
    for tag in record.Tags()["tensors"]:
        for event in record.Tensors(tag):
            if event.tensor_proto.double_val:
                (value,) = event.tensor_proto.double_val
                assert found.setdefault((event.step, tag), value) == value
    return found


def trackio_scalars(project: str) -> dict[tuple[int, str], float]:
    """The numbers in Trackio's database in $TRACKIO_DIR, but for the summary's."""
    found = {}
    with sqlite3.connect(Path(os.environ["TRACKIO_DIR"]) / f"{project}.db") as database:
        for step, metrics in database.execute("SELECT step, metrics FROM metrics ORDER BY id"):
            for key, value in json.loads(metrics).items():
                if isinstance(value, int | float) and not key.startswith("summary/"):
                    assert found.setdefault((step, key), value) == value
    return found
