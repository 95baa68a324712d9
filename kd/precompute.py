"""What is frozen is computed once: tables of a frozen teacher's outputs and of a frozen backbone's features.

Where every epoch shows the same view of an image (no flip, no random crop), a frozen network says the same thing each
time. It is asked once, in the images' order and in batches of a fixed size, so that the table does not depend on the
run, on its interruptions or on the number of processes. Tables lie in the cache folder, named by everything they depend
on (weights, images, view, what is kept), are reused by later runs, seeds and students, and are checked before use.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor, nn
from tqdm import tqdm

from kd.data import Data, Split, default_cache_dir
from kd.data.store import Store
from kd.errors import say
from kd.models import Classifier, state_hash
from kd.outputs import Batch, Outputs
from kd.teachers import Teacher

BATCH_SIZE = 128
LIMIT_BYTES = 4 * 2**30  # a larger table is not made: reading it back would cost what it saves


def worth_it(config, data: Data) -> bool:
    """Whether the views are fixed, and the run shows the training images more than once."""
    steps = config.max_steps or math.inf
    images = min(config.epochs * len(data.train), steps * config.data.batch_size)
    fixed = not config.data.flip and not config.data.pad_crop
    return config.precompute == "auto" and fixed and images > len(data.train)


class TableTeacher:
    """A teacher that looks its outputs up; stands in for `Teacher` in the loop.

    Args:
        rows: logits (N, K) and features (N, ...) by name, of the training split's images in its order.
        split: the training split.
    """

    def __init__(self, rows: dict[str, np.ndarray], split: Split):
        self._rows = rows
        self._place_to_row = np.full(len(split.store), -1)
        self._place_to_row[split.places] = np.arange(len(split))

    def answer(self, batch: Batch) -> Outputs:
        """What the teacher said about a batch's images."""
        rows = self._place_to_row[batch.index.cpu().numpy()]
        values = {name: torch.from_numpy(table[rows]).to(batch.index.device) for name, table in self._rows.items()}
        return Outputs(values.pop("logits"), values)


def precompute_teacher(teacher: Teacher, taps: list[str], data: Data, config, accelerator) -> Teacher | TableTeacher:
    """The teacher's table, or the teacher itself where a table is not possible or not worth it; says which.

    Args:
        taps: the features that the losses need, by module name; tapped already.
        accelerator: says on which device and in which precision the teacher is asked.
    """
    if not worth_it(config, data):
        say("teacher: asked at each step")
        return teacher

    def ask(images: Tensor) -> dict[str, Tensor]:
        outputs = teacher.outputs(images)
        return {"logits": outputs.logits, **outputs.features}

    views = [(member.preprocess.view.to_dict(), member.classes) for member in teacher.members]
    key = [
        state_hash(teacher),
        repr(teacher),
        teacher.mean,
        teacher.classes,
        views,
        sorted(taps),
        accelerator.mixed_precision,
    ]
    rows = _table("teacher", key, ask, data.train, config, accelerator)
    return teacher if rows is None else TableTeacher(rows, data.train)


def precompute_backbone(classifier: Classifier, data: Data, config, accelerator) -> Data:
    """The data with its training and validation images replaced by a frozen backbone's features of them.

    The same data comes back where there is no frozen backbone, or its head is not a linear layer that gives the logits.
    """
    if classifier.head is None or not worth_it(config, data):
        return data
    head = classifier.network.get_submodule(classifier.head)
    kept: list[Tensor] = []

    def ask(images: Tensor) -> tuple[Tensor, Tensor]:
        kept.clear()
        logits = classifier(images)
        return kept[0], logits

    def features_of(images: Tensor) -> dict[str, Tensor]:
        return {"features": ask(images)[0]}

    handle = head.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0].float()))
    try:
        classifier.eval().to(accelerator.device)
        images, _, _ = data.train.read(np.arange(min(2, len(data.train))), accelerator.device)
        with torch.no_grad():
            features, logits = ask(images)
            if not isinstance(head, nn.Linear) or not torch.allclose(head(features), logits, atol=1e-4):
                return data
        key = [_backbone_hash(classifier), repr(classifier.network), classifier.preprocess.view.to_dict()]
        tables = {}
        for name in ("train", "val"):
            split = getattr(data, name)
            if split is None:
                continue
            rows = _table("backbone", [*key, accelerator.mixed_precision], features_of, split, config, accelerator)
            if rows is None:
                return data
            tables[name] = Split(Store(rows["features"], split.labels), np.arange(len(split)))
    finally:
        handle.remove()
        classifier.train()
    return replace(data, **tables)


def _backbone_hash(classifier: Classifier) -> str:
    """The hash of all but the head, which is what the features depend on."""
    head = classifier.network.get_submodule(classifier.head)
    with torch.no_grad():
        saved = {name: parameter.clone() for name, parameter in head.named_parameters()}
        for parameter in head.parameters():
            parameter.zero_()
        digest = state_hash(classifier.network)
        for name, parameter in head.named_parameters():
            parameter.copy_(saved[name])
    return digest


@torch.no_grad()
def _table(kind: str, key: list, ask, split: Split, config, accelerator) -> dict[str, np.ndarray] | None:
    """Rows by name for every image of a split, from disk or made now; None if they would be too large."""
    parts = [*key, split.store.identity(), hashlib.sha256(split.places.tobytes()).hexdigest(), accelerator.device.type]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    cache_dir = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else default_cache_dir()
    folder = cache_dir / "tables" / f"{kind}-{name}"
    first = ask(split.read(np.arange(1), accelerator.device)[0])
    size = sum(4 * value.numel() for value in first.values()) * len(split)
    if size > LIMIT_BYTES:
        limit = f"{LIMIT_BYTES / 1e9:.1f} GB"
        say(f"{kind}: asked at each step (a table would take {size / 1e9:.1f} GB, the limit is {limit})")
        return None
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # one process makes it, the others wait and find it
        found = _read(folder)
        if found is None:
            _build(kind, folder, ask, split, first, accelerator)
            found = _read(folder)
            how = "asked once"
        else:
            how = "looked up"
    say(f"{kind}: {how} for {len(split)} images, {size / 1e6:.2f} MB in {folder}")
    return found


def _build(kind: str, folder: Path, ask, split: Split, first: dict[str, Tensor], accelerator) -> None:
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir()
    try:
        tables = {name: np.empty((len(split), *value.shape[1:]), np.float32) for name, value in first.items()}
        for start in tqdm(range(0, len(split), BATCH_SIZE), desc=kind, unit="batch", disable=None, leave=False):
            where = np.arange(start, min(start + BATCH_SIZE, len(split)))
            with accelerator.autocast():
                said = ask(split.read(where, accelerator.device)[0])
            for name, value in said.items():
                tables[name][where] = value.float().cpu().numpy()
        digests = {}
        for i, (name, table) in enumerate(tables.items()):
            np.save(aside / f"{i}.npy", table)
            digests[name] = hashlib.sha256((aside / f"{i}.npy").read_bytes()).hexdigest()
        (aside / "meta.json").write_text(json.dumps(digests))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read(folder: Path) -> dict[str, np.ndarray] | None:
    """The rows of a whole table; None if there is none or it is damaged, and then says so."""
    if not folder.exists():
        return None
    try:
        rows = {}
        for i, (name, digest) in enumerate(json.loads((folder / "meta.json").read_text()).items()):
            if hashlib.sha256((folder / f"{i}.npy").read_bytes()).hexdigest() != digest:
                raise ValueError(f"{i}.npy does not have its checksum")
            rows[name] = np.load(folder / f"{i}.npy", mmap_mode="r")
        return rows
    except (OSError, ValueError, AttributeError) as error:
        say(f"table {folder} is damaged ({error}); it is made anew")
        return None
