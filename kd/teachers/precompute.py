"""What is frozen is computed once: tables of a frozen teacher's outputs and of a frozen backbone's features.

A frozen network says the same thing about the same view each time. Where every epoch shows the same view of an image,
it is asked once for all of them (`fixed_table`); where an image has a finite number of views, as with flips and padded
crops, what it says is kept as the views come up (`view_table`); else it is asked at each step. Tables lie in the cache
folder, named by everything they depend on (weights, images, views, what is kept), are reused by later runs, seeds and
students, and are checked before use.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kd.data import Data, Split, Views, default_cache_dir
from kd.data.store import Store
from kd.models import Classifier, code_hash, state_hash
from kd.outputs import Batch, Outputs
from kd.run.folder import Run
from kd.teachers import Teacher
from kd.teachers.fixed_table import fixed_table
from kd.teachers.view_table import ViewTable, record_of, taken
from kd.util.device import to_device
from kd.util.errors import say
from kd.util.mapped import announce

FORMAT = 2  # of what tables hold: a change of what our code computes of an image is another one
SHARE_OF_DISK = 0.25  # of the free space that a table of views may come to take
MIN_FOUND = 0.1  # the share of answers that a run must expect to find in a table of views


def _passes(config, data: Data) -> float:
    """How often a run shows each training image."""
    images = min(config.epochs * len(data.train), (config.max_steps or math.inf) * config.data.batch_size)
    return images / len(data.train)


def worth_it(config, data: Data) -> bool:
    """Whether the views are fixed, and the run shows the training images more than once."""
    wanted = config.precompute == "always" or (config.precompute == "auto" and _passes(config, data) > 1)
    return wanted and Views.of(config.data).plain


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
        places = batch.index.cpu() if batch.lookup is None else batch.lookup[:, 0]  # a GPU is not waited for
        rows = self._place_to_row[places.numpy()]
        for table in self._rows.values():
            announce(table, rows)
        values = {
            name: to_device(torch.from_numpy(table[rows]), batch.index.device) for name, table in self._rows.items()
        }
        return Outputs(values.pop("logits"), values)


class ViewTableTeacher:
    """A teacher that is asked only for the views that its table does not have; stands in for `Teacher` in the loop."""

    def __init__(self, teacher: Teacher, table: ViewTable):
        self.teacher, self.table = teacher, table

    def ask(self, images: Tensor) -> dict[str, Tensor]:
        """Logits and features of uint8 images, by name."""
        return _named(self.teacher.outputs(images))

    def answer(self, batch: Batch) -> Outputs:
        """What the teacher said or says about a batch's views of images."""
        values = self.table.look(batch.lookup, batch.images, self.ask)
        return Outputs(values.pop("logits"), values)


def _named(outputs: Outputs) -> dict[str, Tensor]:
    return {"logits": outputs.logits, **outputs.features}


def precompute_teacher(
    teacher: Teacher, taps: list[str], data: Data, config, accelerator, run: Run
) -> Teacher | TableTeacher | ViewTableTeacher:
    """The teacher with its table, or the teacher itself where a table is not possible or not worth it; says which.

    Args:
        taps: the features that the losses need, by module name; tapped already.
        accelerator: says on which device and in which precision the teacher is asked.
        run: remembers what was chosen, so that it goes on as it began.
    """
    if config.precompute == "never":
        say("teacher: asked at each step")
        return teacher
    members = [(member.preprocess.view.to_dict(), member.classes) for member in teacher.members]
    key = [state_hash(teacher), code_hash(teacher), repr(teacher), teacher.mean, teacher.classes, members, sorted(taps)]

    def ask(images: Tensor) -> dict[str, Tensor]:
        return _named(teacher.outputs(images))

    if worth_it(config, data):
        folder = _folder("teacher", key, data.train, config, accelerator, fixed=True)
        rows = fixed_table("teacher", folder, ask, data.train, accelerator)
        return teacher if rows is None else TableTeacher(rows, data.train)
    table = _view_table("teacher", key, ask, data, config, accelerator, run)
    return teacher if table is None else ViewTableTeacher(teacher, table)


def _folder(kind: str, key: list, split: Split, config, accelerator, fixed: bool) -> Path:
    """The folder of a table, named by all that it depends on."""
    views, places = Views.of(config.data), hashlib.sha256(split.places.tobytes()).hexdigest()
    # what an image is mixed with depends on which images there are
    of = places if fixed else [*views.identity(), places] if views.mixes else views.identity()
    parts = [FORMAT, *key, accelerator.mixed_precision, split.store.identity(), of, accelerator.device.type]
    name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
    cache_dir = Path(config.data.cache_dir).expanduser() if config.data.cache_dir else default_cache_dir()
    return cache_dir / "tables" / f"{kind}-{name}"


@torch.no_grad()
def _view_table(kind: str, key: list, ask, data: Data, config, accelerator, run: Run) -> ViewTable | None:
    """The table of a network's answers to views, if there is to be one; says which.

    It holds all images of the store, so that runs on other parts of it share it.
    """
    views, split = Views.of(config.data), data.train
    folder = _folder(kind, key, split, config, accelerator, fixed=False)
    first = ask(split.read(np.arange(1), accelerator.device)[0])
    shapes = {name: tuple(value.shape[1:]) for name, value in first.items()}

    def choose() -> str:
        if views.plain:
            return ""
        if views.count is None:
            return " (views without end; with data.views_per_image a table is possible)"
        size = record_of(shapes).itemsize * len(split) * views.count
        folder.parent.mkdir(parents=True, exist_ok=True)
        room = SHARE_OF_DISK * (shutil.disk_usage(folder.parent).free + taken(folder))
        if size > room:
            return f" (a table would take {size / 1e9:.3g} GB, the limit is {room / 1e9:.3g}: 1/4 of the free disk)"
        filled = ViewTable(folder, shapes, len(split.store), views.count).filled(split.places) if taken(folder) else 0
        passes = _passes(config, data)
        found = 1 - (1 - filled) * views.expected_new(passes) / passes
        if config.precompute == "auto" and found < MIN_FOUND:
            return f" (of a table of {views.count} views {found:.0%} would be found; --precompute always makes one)"
        return "table"

    if accelerator.is_main_process:
        run.settle(f"{kind} table", choose)
    accelerator.wait_for_everyone()
    chosen = run.settle(f"{kind} table", choose)
    if chosen != "table":
        say(f"{kind}: asked at each step{chosen}")
        return None
    table = ViewTable(folder, shapes, len(split.store), views.count)
    size, filled = record_of(shapes).itemsize * len(split) * views.count, table.filled(split.places)
    what = f"{views.count} views of {len(split)} images, {size / 1e6:.2f} MB of float16 when full, {filled:.0%} filled"
    say(f"{kind}: asked once for each view ({what}), kept in {folder}")
    return table


@dataclass
class ViewedSplit(Split):
    """Training images whose views are shown to the head as a frozen backbone's features of them."""

    table: ViewTable
    ask: object

    def shown(self, images: Tensor, lookup: Tensor | None) -> Tensor:
        return self.table.look(lookup, images, self.ask)["features"]


def precompute_backbone(classifier: Classifier, data: Data, config, accelerator, run: Run) -> Data:
    """The data with its training and validation images replaced by a frozen backbone's features of them.

    The same data comes back where there is no frozen backbone, or its head is not a linear layer that gives the logits.
    """
    if classifier.head is None or config.precompute == "never":
        return data
    frozen = classifier.to(accelerator.device).folded()
    head = frozen.network.get_submodule(frozen.head)

    @torch.no_grad()
    def both(images: Tensor) -> tuple[Tensor, Tensor]:
        with _inputs_of(head) as kept, accelerator.autocast():
            logits = frozen(images)
        return kept[0].float(), logits

    def ask(images: Tensor) -> dict[str, Tensor]:
        return {"features": both(images)[0]}

    tables = {}
    images, _, _ = data.train.read(np.arange(min(2, len(data.train))), accelerator.device)
    features, logits = both(images)
    with torch.no_grad(), accelerator.autocast():
        if not isinstance(head, nn.Linear) or not torch.allclose(head(features), logits, atol=1e-4):
            return data
    key = [
        _backbone_hash(classifier),
        code_hash(classifier),
        repr(classifier.network),
        classifier.preprocess.view.to_dict(),
    ]
    if worth_it(config, data):
        fixed = ("train", "val")
    else:
        if accelerator.is_fsdp2:  # the network cannot be asked alone between steps: it is in parts
            return data
        table = _view_table("backbone", key, ask, data, config, accelerator, run)
        if table is None:
            return data
        tables["train"] = ViewedSplit(data.train.store, data.train.places, table, ask)
        fixed = ("val",)
    for name in fixed:
        split = getattr(data, name)
        if split is None:
            continue
        folder = _folder("backbone", key, split, config, accelerator, fixed=True)
        rows = fixed_table("backbone", folder, ask, split, accelerator)
        if rows is None:
            return data
        tables[name] = Split(Store(rows["features"], split.labels), np.arange(len(split)))
    return replace(data, **tables)


@contextmanager
def _inputs_of(module: nn.Module):
    """A list of what is put into a module meanwhile."""
    kept: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: kept.append(inputs[0]))
    try:
        yield kept
    finally:
        handle.remove()


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
