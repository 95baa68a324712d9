"""What is frozen is computed once: columns of what frozen teachers give, and of a frozen backbone's features.

A frozen network gives the same for the same view each time. Where every epoch shows the same view of an image, all are
computed before the first step (`fixed_table`); where an image has a finite number of views, as with flips and padded
crops, they are kept as the views come up (`ViewTable`); else they are computed at each step. Tables lie in the cache
folder, named by everything they depend on (weights, images, views, what is kept), are shared by later runs, seeds and
students, and are checked before use. In a batch a table's values are columns like any other.
"""

import copy
import hashlib
import json
import math
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from kd.data import Data, Split, cache_folder
from kd.models import BACKBONE, Classifier, code_hash, state_hash
from kd.teachers import Teachers, columns
from kd.teachers.tables import Compute, ViewTable, fixed_table, record_of, taken
from kd.util.errors import say

FORMAT = 3  # of what tables hold: a change of what our code computes of an image is another one
SHARE_OF_DISK = 0.25  # of the free space that a table of views may come to take
MIN_FOUND = 0.1  # the share of rows that a run must expect to find in a table of views


def precompute_teachers(data: Data, teachers: Teachers | None, config, accelerator, run) -> Data:
    """The data with the teachers' outputs as columns of the training images, where that is possible and worth it.

    Args:
        teachers: tapped already.
        accelerator: says on which device and in which precision they are computed.
        run: a `kd.run.folder.Run`, which remembers what was chosen, so that it resumes as it began.
    """
    if teachers is None:
        return data
    if config.precompute == "never":
        say("teacher: computed at each step")
        return data

    def compute(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        with accelerator.autocast():
            return columns(teachers.outputs(inputs))

    members = [(member.preprocess.view.to_dict(), member.classes) for member in teachers.members.values()]
    key = [state_hash(teachers), code_hash(teachers), repr(teachers), teachers.mean, teachers.classes, members]
    key.append(teachers.taps)
    train = _Frozen("teacher", key, compute, data, config, accelerator, run).train()
    return data if train is None else replace(data, train=train)


def precompute_backbone(data: Data, learner, config, accelerator, run) -> Data:
    """The data with a frozen backbone's features in place of the training and validation images.

    The same data comes back where the learner is more than one network, that has no frozen backbone, or its head is not
    a linear layer that gives the logits.
    """
    classifier: Classifier = next(iter(learner.networks.values()))
    if len(learner.networks) > 1 or classifier.head is None or config.precompute == "never":
        return data
    frozen = classifier.to(accelerator.device).folded()
    head = frozen.network.get_submodule(frozen.head)

    @torch.no_grad()
    def both(inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        kept: list[Tensor] = []
        with head.register_forward_pre_hook(lambda _, given: kept.append(given[0])), accelerator.autocast():
            logits = frozen.logits(inputs)
        return kept[0].float(), logits

    def compute(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {BACKBONE: both(inputs)[0]}

    inputs, _, _ = data.train.read(np.arange(min(2, len(data.train))), accelerator.device)
    features, logits = both(inputs)
    with torch.no_grad(), accelerator.autocast():
        if not isinstance(head, nn.Linear) or not torch.allclose(head(features), logits, atol=1e-4):
            return data
    view = classifier.preprocess.view.to_dict()
    key = [_backbone_hash(classifier), code_hash(classifier), repr(classifier.network), view]
    table = _Frozen("backbone", key, compute, data, config, accelerator, run)
    if accelerator.is_fsdp2 and not table.worth_it:
        return data  # the network cannot be computed alone between steps: it is in parts
    train = table.train()
    if train is None:
        return data
    val = None if data.val is None else table.fixed(data.val)
    without = replace(train, shows=bool(train.viewed))  # the images are needed only for views that are not there yet
    return replace(data, train=without, val=data.val if val is None else replace(val, shows=False))


@dataclass
class _Frozen:
    """A frozen network whose outputs are to be columns.

    kind: what it is, in words.
    key: what its outputs depend on beside images and views, JSON values.
    compute: gives the columns for the columns of a batch.
    """

    kind: str
    key: list
    compute: Compute
    data: Data
    config: Any
    accelerator: Any
    run: Any

    @property
    def passes(self) -> float:
        """How often the run shows each training image."""
        count = len(self.data.train)
        return min(self.config.epochs * count, (self.config.max_steps or math.inf) * self.data.batch_size) / count

    @property
    def worth_it(self) -> bool:
        """Whether the views are fixed, and the run shows the training images more than once."""
        wanted = self.config.precompute == "always" or (self.config.precompute == "auto" and self.passes > 1)
        return wanted and self.data.views.plain

    def train(self) -> Split | None:
        """The training images with the columns, None where a table is not possible or not worth it; says which."""
        if self.worth_it:
            return self.fixed(self.data.train)
        table = self._view_table()
        return None if table is None else replace(self.data.train, viewed=[partial(table.look, compute=self.compute)])

    def fixed(self, split: Split) -> Split | None:
        """A split with the columns of its images as they are stored; None where they would take too much."""
        folder = self._folder(split, hashlib.sha256(split.places.tobytes()).hexdigest())
        rows = fixed_table(self.kind, folder, self.compute, split, self.accelerator)
        return None if rows is None else replace(split, rows={**split.rows, **rows})

    def _folder(self, split: Split, of) -> Path:
        """The folder of a table, named by all that it depends on, `of` which views among it."""
        settings, accelerator = self.config.data, self.accelerator
        parts = [FORMAT, *self.key, accelerator.mixed_precision, split.store.identity(), of, accelerator.device.type]
        name = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:24]
        return cache_folder(settings.cache_dir) / "tables" / f"{self.kind}-{name}"

    @torch.no_grad()
    def _view_table(self) -> ViewTable | None:
        """The table of the training images' views, if there is to be one; says which.

        It holds all images of the store, so that runs on other parts of it share it.
        """
        split, views, accelerator = self.data.train, self.data.views, self.accelerator
        # what an image is mixed with depends on which images there are
        mixed = [hashlib.sha256(split.places.tobytes()).hexdigest()] if views.mixes else []
        folder = self._folder(split, [*views.identity(), *mixed])
        first = self.compute(split.read(np.arange(1), accelerator.device)[0])
        shapes = {name: tuple(value.shape[1:]) for name, value in first.items()}
        if accelerator.is_main_process:
            self.run.settle(f"{self.kind} table", lambda: self._choice(folder, shapes))
        accelerator.wait_for_everyone()
        chosen = self.run.settle(f"{self.kind} table", lambda: self._choice(folder, shapes))
        if chosen != "table":
            say(f"{self.kind}: computed at each step{chosen}")
            return None
        table = ViewTable(folder, shapes, len(split.store), views.count)
        size, filled = record_of(shapes).itemsize * len(split) * views.count, table.filled(split.places)
        what = f"{views.count} views of {len(split)} images, {size / 1e6:.2f} MB of float16 when full"
        say(f"{self.kind}: computed once for each view ({what}, {filled:.0%} filled), kept in {folder}")
        return table

    def _choice(self, folder: Path, shapes: dict[str, tuple]) -> str:
        """`table` where a table of views is to be made, else why not, as the end of a sentence."""
        split, views = self.data.train, self.data.views
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
        found = 1 - (1 - filled) * views.expected_new(self.passes) / self.passes
        if self.config.precompute == "auto" and found < MIN_FOUND:
            return f" (of a table of {views.count} views {found:.0%} would be found; --precompute always makes one)"
        return "table"


def _backbone_hash(classifier: Classifier) -> str:
    """The hash of all but the head, which is what the features depend on."""
    network = copy.deepcopy(classifier.network)
    for parameter in network.get_submodule(classifier.head).parameters():
        nn.init.zeros_(parameter)
    return state_hash(network)
