"""What is frozen is computed once: columns of what frozen teachers give, and of a frozen backbone's features.

A frozen network gives the same for the same view each time. Where every epoch shows the same view of an image, all are
computed before the first step (`fixed_table`); where an image has a finite number of views, as with flips and padded
crops, they are kept as the views come up (`view_table`); else they are computed at each step. Tables lie in the cache
folder, named by everything they depend on (weights, images, views, what is kept), are shared by later runs, seeds and
students, and are checked before use. In a batch a table's values are columns like any other.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from kd.data import Data, Split, Viewed, Views, default_cache_dir
from kd.models import BACKBONE, Classifier, code_hash, state_hash
from kd.teachers import Teachers, columns
from kd.teachers.fixed_table import fixed_table
from kd.teachers.view_table import ViewTable, record_of, taken
from kd.util.errors import say

FORMAT = 3  # of what tables hold: a change of what our code computes of an image is another one
SHARE_OF_DISK = 0.25  # of the free space that a table of views may come to take
MIN_FOUND = 0.1  # the share of rows that a run must expect to find in a table of views

Compute = Callable[[dict[str, Tensor]], dict[str, Tensor]]  # columns of a frozen network for the columns of a batch


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
    train = _tabled("teacher", key, compute, data.train, config, accelerator, run)
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
        with _inputs_of(head) as kept, accelerator.autocast():
            logits = frozen.logits(inputs)
        return kept[0].float(), logits

    def compute(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        return {BACKBONE: both(inputs)[0]}

    inputs, _, _ = data.train.read(np.arange(min(2, len(data.train))), accelerator.device)
    features, logits = both(inputs)
    with torch.no_grad(), accelerator.autocast():
        if not isinstance(head, nn.Linear) or not torch.allclose(head(features), logits, atol=1e-4):
            return data
    if accelerator.is_fsdp2 and not worth_it(config, data.train):
        return data  # the network cannot be computed alone between steps: it is in parts
    view = classifier.preprocess.view.to_dict()
    key = [_backbone_hash(classifier), code_hash(classifier), repr(classifier.network), view]
    train = _tabled("backbone", key, compute, data.train, config, accelerator, run)
    if train is None:
        return data
    val = None if data.val is None else _fixed("backbone", key, compute, data.val, config, accelerator)
    without = replace(train, shows=bool(train.viewed))  # the images are needed only for views that are not there yet
    return replace(data, train=without, val=data.val if val is None else replace(val, shows=False))


def _passes(config, split: Split) -> float:
    """How often a run shows each training image."""
    images = min(config.epochs * len(split), (config.max_steps or math.inf) * config.data.batch_size)
    return images / len(split)


def worth_it(config, split: Split) -> bool:
    """Whether the views are fixed, and the run shows the training images more than once."""
    wanted = config.precompute == "always" or (config.precompute == "auto" and _passes(config, split) > 1)
    return wanted and Views.of(config.data).plain


def _tabled(kind: str, key: list, compute: Compute, split: Split, config, accelerator, run) -> Split | None:
    """The training images with these columns, None where a table is not possible or not worth it; says which."""
    if worth_it(config, split):
        return _fixed(kind, key, compute, split, config, accelerator)
    table = _view_table(kind, key, compute, split, config, accelerator, run)
    return None if table is None else replace(split, viewed=[*split.viewed, Viewed(table, compute)])


def _fixed(kind: str, key: list, compute: Compute, split: Split, config, accelerator) -> Split | None:
    folder = _folder(kind, key, split, config, accelerator, fixed=True)
    rows = fixed_table(kind, folder, compute, split, accelerator)
    return None if rows is None else replace(split, rows={**split.rows, **rows})


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
def _view_table(kind: str, key: list, compute: Compute, split: Split, config, accelerator, run) -> ViewTable | None:
    """The table of a network's outputs for views, if there is to be one; says which.

    It holds all images of the store, so that runs on other parts of it share it.
    """
    views = Views.of(config.data)
    folder = _folder(kind, key, split, config, accelerator, fixed=False)
    first = compute(split.read(np.arange(1), accelerator.device)[0])
    shapes = {name: tuple(value.shape[1:]) for name, value in first.items()}

    def choose() -> str:
        return _choice(folder, shapes, split, views, config)

    if accelerator.is_main_process:
        run.settle(f"{kind} table", choose)
    accelerator.wait_for_everyone()
    chosen = run.settle(f"{kind} table", choose)
    if chosen != "table":
        say(f"{kind}: computed at each step{chosen}")
        return None
    table = ViewTable(folder, shapes, len(split.store), views.count)
    size, filled = record_of(shapes).itemsize * len(split) * views.count, table.filled(split.places)
    what = f"{views.count} views of {len(split)} images, {size / 1e6:.2f} MB of float16 when full, {filled:.0%} filled"
    say(f"{kind}: computed once for each view ({what}), kept in {folder}")
    return table


def _choice(folder: Path, shapes: dict[str, tuple], split: Split, views: Views, config) -> str:
    """`table` where a table of views is to be made, else why not, as the end of a sentence."""
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
    passes = _passes(config, split)
    found = 1 - (1 - filled) * views.expected_new(passes) / passes
    if config.precompute == "auto" and found < MIN_FOUND:
        return f" (of a table of {views.count} views {found:.0%} would be found; --precompute always makes one)"
    return "table"


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
