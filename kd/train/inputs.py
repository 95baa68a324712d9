"""What a run learns from is written down when it begins, and compared when it resumes."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
from pathlib import Path

import numpy as np

from kd.data import Data, load_data
from kd.data.identity import changes, identity
from kd.run.folder import Run
from kd.run.recorded import recorded_data, teachers_of, weights_of
from kd.util.contents import read_config
from kd.util.errors import UserError, say

SPLITTING = ("split_seed", "val_fraction", "test_fraction")


def remember(run: Run, config, data: Data) -> None:
    """Let the run keep what it learns from; of one that resumes, compare. Prints which teachers have seen what.

    Raises:
        UserError: the run began with other images, labels, or weights of others.
    """
    if not run.is_main:
        return
    for name in teachers_of(config.resolved):
        if words := seen_by(name, config.data, data):
            say(f"teacher {name!r} {words}")
    before = run.inputs
    run.inputs = {"data": identity(data), "weights": weights_of(config.resolved)}
    if before is None:
        return
    if not {"data", "weights"} <= before.keys():
        say(f"note: {run.folder} was begun by an earlier version and does not say with which data; it is not compared")
        run.inputs = before
        return
    other, words = changes(before["data"], run.inputs["data"])
    wrong = [f"its {name} split differs ({why})" for name, why in other.items()]
    for name, digest in before["weights"].items():
        if run.inputs["weights"].get(name, digest) != digest:
            wrong.append(f"the weights of {name!r} were replaced")
    if wrong:
        raise UserError(
            f"run {str(run.folder)!r} began with other inputs: {'; '.join(wrong)}; put back what was there, or pass "
            f"--overwrite true to start with these"
        )
    for word in words:
        say(f"note: {word}; the labels are the same, and the run resumes")
    run.inputs = before


def seen_by(teacher: str, config, data: Data) -> str:
    """How many of the validation and test images a teacher was trained on, in words; empty where it was on none.

    Known where the teacher is a run on the same source, whose split has other settings.
    """
    if not (Path(teacher) / "config.yaml").is_file():
        return ""
    content = read_config(Path(teacher))
    if "losses" not in content:  # `kd.tools.adopt` made it, and on what it was trained is not known
        return ""
    theirs = recorded_data(content["data"], teacher)
    differing = [name for name in SPLITTING if getattr(theirs, name) != getattr(config, name)]
    if not differing or _place(theirs.source) != _place(config.source):
        return ""
    fields = {name: getattr(theirs, name) for name in (*SPLITTING, "num_train")} | {"num_labels": None}
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # notes on the data have been printed
            train = load_data(dataclasses.replace(config, **fields)).train
    except UserError:  # it has become too small for that
        return ""
    parts, images = {"validation": data.val, "test": data.test}, data.train.store.images
    shared = {name: part for name, part in parts.items() if part is not None and part.store.images is images}
    counts = {name: (len(np.intersect1d(train.places, part.places)), len(part)) for name, part in shared.items()}
    seen = [f"{seen:,} of the {total:,} {name} images" for name, (seen, total) in counts.items() if seen]
    if not seen:
        return ""
    settings = ", ".join(f"data.{name} {getattr(theirs, name)} (here {getattr(config, name)})" for name in differing)
    return f"has seen {' and '.join(seen)}: it was trained with {settings}; set what it had, or results are too good"


def _place(source: str) -> str:
    return os.path.realpath(source) if os.path.exists(source) else source
