"""Data: from a source's name to the splits that training and evaluation draw batches from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd import keyed
from kd.data.corrupt import corrupt
from kd.data.mix import mixed_labels
from kd.data.sources import find_source
from kd.data.split import balanced_order, carve
from kd.data.store import Store, open_stores
from kd.data.views import Views
from kd.errors import UserError, say
from kd.outputs import Batch

# What a key is for, so that order, views (1 and 3, in kd.data.views) and dropout of one (seed, epoch, image) are
# independent.
ORDER, DROPOUT = 0, 2


def default_cache_dir() -> Path:
    """Where stores and downloads go unless data.cache_dir says otherwise: $KD_CACHE, else ~/.cache/kd."""
    return Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()


@dataclass
class Split:
    """Some of a store's images: `places` (n,) int64 into it."""

    store: Store
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        return self.store.labels[self.places]

    def read(self, where: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 (B, C, H, W), labels (B,) and places in the store (B,), for positions within this split."""
        places = self.places[where]
        images = torch.from_numpy(np.ascontiguousarray(self.store.images[places]))
        labels, index = torch.from_numpy(self.store.labels[places]), torch.from_numpy(places)
        if device.type == "cuda":
            images = images.pin_memory()
        return tuple(tensor.to(device, non_blocking=True) for tensor in (images, labels, index))

    def shown(self, images: Tensor, lookup: Tensor) -> Tensor:
        """What the network is given for these views of images; see `kd.precompute` for what may be instead."""
        return images


@dataclass
class CorruptedSplit(Split):
    """A split whose images are read corrupted, see `kd.data.corrupt`."""

    corruption: str
    severity: int

    def read(self, where: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        images, labels, index = super().read(where, torch.device("cpu"))
        images = corrupt(images, index, self.corruption, self.severity)
        return images.to(device), labels.to(device), index.to(device)


@dataclass
class Data:
    """The splits of a source and its class names; val is None when nothing is set aside for validation."""

    classes: list[str]
    train: Split
    val: Split | None
    test: Split

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the stored images."""
        return tuple(self.train.store.images.shape[1:])

    @property
    def train_labels(self) -> Tensor:
        """int64 (N,), the label at each place of the training images' store; -1 where no training image is."""
        labels = torch.full((len(self.train.store),), -1)
        labels[self.train.places] = torch.from_numpy(self.train.labels)
        return labels


class TrainBatches:
    """The training images of each step: a function of (seed, step) alone, cut into one part a process.

    Args:
        split: the training images.
        batch_size: of the global batch, over all processes.
        seed: of order, views and dropout.
        rank, num_processes: which part of each global batch is this process's; the first parts are the larger ones.
        views: the random views.
        accumulate: into how many micro-batches a process's part is cut.
        num_classes: K, of mixed images' labels.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        seed: int,
        rank: int,
        num_processes: int,
        views: Views,
        accumulate: int = 1,
        num_classes: int = 0,
    ):
        self.split, self.batch_size, self.seed = split, batch_size, seed
        self.rank, self.num_processes, self.accumulate = rank, num_processes, accumulate
        self.views, self.num_classes = views, num_classes
        self.steps_per_epoch = -(-len(split) // batch_size)
        self._epoch, self._order = -1, np.empty(0)

    def positions(self, step: int) -> np.ndarray:
        """Positions in the split of the whole global batch of a step, in order; the epoch's last may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = keyed.permutation(keyed.key(self.seed, ORDER, epoch), len(self.split)).numpy()
            self._epoch = epoch
        return self._order[batch * self.batch_size : (batch + 1) * self.batch_size]

    def num_micro(self, step: int) -> int:
        """How many micro-batches a step has, equal on all processes; none is empty on the first one."""
        return min(self.accumulate, -(-len(self.positions(step)) // self.num_processes))

    def read(self, step: int, device: torch.device, micro: int = 0) -> tuple[Batch, float]:
        """This process's micro-batch of a step, and the weight that makes the sum over the step's micro-batches, and
        the mean over the processes, the mean over the global batch.

        A process whose part is empty (the last batch has fewer images than there are processes) gets the batch's first
        image with weight 0, since every process must take part in the step.
        """
        whole, num_micro = self.positions(step), self.num_micro(step)
        parts = [np.array_split(part, num_micro)[micro] for part in np.array_split(whole, self.num_processes)]
        part = parts[self.rank]
        weight = len(part) * self.num_processes / len(whole)
        where = part if len(part) else whole[:1]
        places, epoch = torch.from_numpy(self.split.places[where]), step // self.steps_per_epoch
        keys, numbers = self.views.draw(self.seed, epoch, places)
        lookup = torch.stack([places, numbers], dim=1) if numbers is not None and len(part) else None
        if self.views.mixes:
            others, other_keys = self.views.partners(keys, len(self.split))
            where = np.concatenate([where, others.numpy()])
        images, labels, index = self.split.read(where, device)
        if self.views.mixes:
            count = len(places)
            images = self.views.apply(images, torch.cat([keys, other_keys]))
            images, shares = self.views.mix(images[:count], images[count:], keys)
            labels, index = mixed_labels(labels[:count], labels[count:], shares, self.num_classes), index[:count]
        else:
            images = self.views.apply(images, keys)
        images = self.split.shown(images, lookup)
        counts = [len(part) for part in parts] if self.num_processes > 1 else None
        keys = keyed.keys(keyed.key(self.seed, DROPOUT, epoch), index)
        return Batch(images, labels, index, keys, epoch, counts, num_micro == 1, lookup), weight


def load_data(config, download: bool = True) -> Data:
    """Open a `kd.config.DataConfig`'s source and make its splits.

    Args:
        download: False to refuse a named set that is not on this disk instead of fetching it.

    Raises:
        UserError: the source cannot be read, has one class, or is too small for what is asked.
    """
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    download_dir = Path(config.download_dir).expanduser() if config.download_dir else cache_dir / "downloads"
    source = find_source(config.source, download_dir, config.image_column, config.label_column, download)
    classes, stores = open_stores(source, config.channels, config.resize, config.skip_unreadable, cache_dir)
    if len(classes) < 2:
        raise UserError(
            f"data.source {config.source!r} has one class ({', '.join(classes)}); a classifier needs two or more"
        )
    seed, train = config.split_seed, stores["train"]
    places = np.arange(len(train))
    for name, store in stores.items():
        if store.labels.min() < 0 or store.labels.max() >= len(classes):
            raise UserError(f"data.source {config.source!r}: {name} has images without a label; remove them from it")
    if "test" in stores:
        test = Split(stores["test"], np.arange(len(stores["test"])))
    else:
        places, carved = carve(train.labels, config.test_fraction, seed)
        test = Split(train, carved)
        say(f"data: {config.source} has no test split; {len(carved)} of its {len(train)} images are set aside as test")
    val = None
    if "val" in stores:
        val = Split(stores["val"], np.arange(len(stores["val"])))
    elif config.val_fraction:
        rest, carved = carve(train.labels[places], config.val_fraction, seed + 1)
        places, val = places[rest], Split(train, places[carved])
        if len(val) == 0:
            raise UserError(
                f"data.val_fraction {config.val_fraction} of {len(train)} images leaves no image to validate on"
            )
    if config.num_train is not None:
        if not len(classes) <= config.num_train <= len(places):
            raise UserError(
                f"data.num_train {config.num_train} must be from {len(classes)} (one image a class) to {len(places)} "
                f"(the training images of {config.source} without validation)"
            )
        places = np.sort(places[balanced_order(train.labels[places], seed)[: config.num_train]])
    if len(places) == 0 or len(test) == 0:
        raise UserError(
            f"data.source {config.source!r} has too few images ({len(train)}) to make train and test splits"
        )
    return Data(classes, Split(train, places), val, test)
