"""Data: from a source's name to the splits that training and evaluation draw batches from."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd import keyed
from kd.data.build import Recipe
from kd.data.corrupt import corrupt
from kd.data.mix import mixed_labels
from kd.data.sources import find_source
from kd.data.split import balanced_order, carve
from kd.data.store import Store, open_stores
from kd.data.stream import Encoded, ahead, in_workers
from kd.data.views import Views
from kd.device import free_memory, to_device
from kd.errors import UserError, say
from kd.outputs import Batch

# What a key is for, so that order, views (1 and 3, in kd.data.views) and dropout of one (seed, epoch, image) are
# independent.
ORDER, DROPOUT = 0, 2


def default_cache_dir() -> Path:
    """Where stores and downloads go unless data.cache_dir says otherwise: $KD_CACHE, else ~/.cache/kd."""
    return Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()


Read = tuple[Tensor, Tensor, Tensor]  # images uint8 (B, C, H, W), labels (B,) and places in the store (B,)


@dataclass
class Split:
    """Some of a store's images: `places` (n,) int64 into it; `resident` is what `read` gives of all of them, where that
    is kept on the device."""

    store: Store
    places: np.ndarray
    resident: Read | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        return self.store.labels[self.places]

    @property
    def num_bytes(self) -> int:
        """What all the images take in memory."""
        images = self.store.images
        return len(self) * int(np.prod(images.shape[1:])) * getattr(images, "itemsize", 1)

    def on_host(self, where: np.ndarray) -> Read:
        """What `read` gives, on the CPU."""
        places = self.places[where]
        images = np.ascontiguousarray(self.store.images[places])
        return torch.from_numpy(images), torch.from_numpy(self.store.labels[places]), torch.from_numpy(places)

    def read(self, where: np.ndarray, device: torch.device) -> Read:
        """Images, labels and places in the store, for positions within this split; a GPU is not waited for."""
        if self.resident is not None:
            chosen = to_device(torch.from_numpy(where), device)
            return tuple(part[chosen] for part in self.resident)
        return tuple(to_device(part, device) for part in self.on_host(where))

    def batches(self, wheres: Iterable[np.ndarray], device: torch.device) -> Iterator[Read]:
        """What `read` gives for each of these, in order; prepared ahead by processes where images are decoded, by a
        thread where they are copied to a GPU.

        Args:
            wheres: may have no end.
        """
        pinned, images = device.type == "cuda", self.store.images
        if self.resident is None and isinstance(images, Encoded) and images.workers:
            prepared = in_workers(self.on_host, wheres, images.workers, pinned)
        elif self.resident is None and pinned:
            prepared = ahead(lambda where: [part.pin_memory() for part in self.on_host(where)], wheres)
        else:
            prepared = (self.read(where, device) for where in wheres)
        for parts in prepared:
            yield tuple(part.to(device, non_blocking=True) for part in parts)

    def kept_on(self, device: torch.device) -> Split:
        """This split with its images on the device, from where a batch is gathered without the CPU."""
        size = max(1, 2**26 * len(self) // max(1, self.num_bytes))  # 64 MB at a time
        wheres = [np.arange(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        whole = None
        for where, parts in zip(wheres, self.batches(wheres, device), strict=True):
            whole = whole or [torch.empty((len(self), *p.shape[1:]), dtype=p.dtype, device=device) for p in parts]
            for every, part in zip(whole, parts, strict=True):
                every[where[0] : where[-1] + 1] = part
        return replace(self, resident=tuple(whole))

    def shown(self, images: Tensor, lookup: Tensor) -> Tensor:
        """What the network is given for these views of images; see `kd.precompute` for what may be instead."""
        return images


@dataclass
class CorruptedSplit(Split):
    """A split whose images are read corrupted, see `kd.data.corrupt`."""

    corruption: str
    severity: int

    def on_host(self, where: np.ndarray) -> Read:
        images, labels, index = super().on_host(where)
        return corrupt(images, index, self.corruption, self.severity), labels, index


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

    def on_device(self, device: torch.device, share: float) -> Data:
        """The data with its training images in a GPU's memory if they take at most this share of what is free there,
        and those for validation if they fit too; says so. Unchanged on a CPU."""
        room = share * free_memory(device)
        if not room:
            return self
        limit = f"{room / 1e9:.3g} GB: data.device_share {share:g} of what is free on the GPU"
        needed = self.train.num_bytes
        if needed > room:
            say(f"data: the training images are read at each step ({needed / 1e9:.3g} GB, the limit is {limit})")
            return self
        kept = {"train": self.train.kept_on(device)}
        if self.val is not None and needed + self.val.num_bytes <= room:
            kept["val"], needed = self.val.kept_on(device), needed + self.val.num_bytes
        say(f"data: images of {' and '.join(kept)} are kept on the GPU ({needed / 1e9:.3g} GB, the limit is {limit})")
        return replace(self, **kept)


@dataclass
class _Part:
    """Which images of the split a process's micro-batch shows, and how."""

    where: np.ndarray  # positions in the split; with mixed images, then those of the others
    places: Tensor
    keys: Tensor
    numbers: Tensor | None
    other_keys: Tensor | None
    counts: list[int] | None
    whole: bool
    weight: float


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
        self._orders: dict[int, np.ndarray] = {}
        self._coming, self._images, self._parts = None, None, deque()

    def positions(self, step: int) -> np.ndarray:
        """Positions in the split of the whole global batch of a step, in order; the epoch's last may be smaller."""
        epoch, batch = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            order = keyed.permutation(keyed.key(self.seed, ORDER, epoch), len(self.split)).numpy()
            self._orders = {**dict(list(self._orders.items())[-1:]), epoch: order}  # images are read ahead: two epochs
        return self._orders[epoch][batch * self.batch_size : (batch + 1) * self.batch_size]

    def num_micro(self, step: int) -> int:
        """How many micro-batches a step has, equal on all processes; none is empty on the first one."""
        return min(self.accumulate, -(-len(self.positions(step)) // self.num_processes))

    def read(self, step: int, device: torch.device, micro: int = 0) -> tuple[Batch, float]:
        """This process's micro-batch of a step, and the weight that makes the sum over the step's micro-batches, and
        the mean over the processes, the mean over the global batch.

        A process whose part is empty (the last batch has fewer images than there are processes) gets the batch's first
        image with weight 0, since every process must take part in the step.

        The images of what a loop asks for next (micro-batches from the last to the first, then the next step) are
        prepared meanwhile; any other may be asked for.
        """
        if (step, micro, device) != self._coming:
            self._parts = deque()
            self._images = self.split.batches(self._wheres(step, micro, self._parts), device)
        images, labels, index = next(self._images)
        self._coming = (*self._after(step, micro), device)
        part, epoch = self._parts.popleft(), step // self.steps_per_epoch
        if self.views.mixes:
            count = len(part.places)
            images = self.views.apply(images, torch.cat([part.keys, part.other_keys]))
            images, shares = self.views.mix(images[:count], images[count:], part.keys)
            labels, index = mixed_labels(labels[:count], labels[count:], shares, self.num_classes), index[:count]
        else:
            images = self.views.apply(images, part.keys)
        lookup = torch.stack([part.places, part.numbers], dim=1) if part.numbers is not None and part.weight else None
        images = self.split.shown(images, lookup)
        keys = keyed.keys(keyed.key(self.seed, DROPOUT, epoch), index)
        return Batch(images, labels, index, keys, epoch, part.counts, part.whole, lookup), part.weight

    def close(self) -> None:
        """End what prepares images that nobody will ask for."""
        self._coming = self._images = None

    def _part(self, step: int, micro: int) -> _Part:
        whole, num_micro = self.positions(step), self.num_micro(step)
        parts = [np.array_split(part, num_micro)[micro] for part in np.array_split(whole, self.num_processes)]
        part = parts[self.rank]
        weight = len(part) * self.num_processes / len(whole)
        where = part if len(part) else whole[:1]
        places = torch.from_numpy(self.split.places[where])
        keys, numbers = self.views.draw(self.seed, step // self.steps_per_epoch, places)
        other_keys = None
        if self.views.mixes:
            others, other_keys = self.views.partners(keys, len(self.split))
            where = np.concatenate([where, others.numpy()])
        counts = [len(part) for part in parts] if self.num_processes > 1 else None
        return _Part(where, places, keys, numbers, other_keys, counts, num_micro == 1, weight)

    def _after(self, step: int, micro: int) -> tuple[int, int]:
        """Which micro-batch of which step a loop asks for after this one."""
        return (step, micro - 1) if micro else (step + 1, self.num_micro(step + 1) - 1)

    def _wheres(self, step: int, micro: int, parts: deque) -> Iterator[np.ndarray]:
        """Where the images of this micro-batch and of all that come after it are; the parts are put into `parts`."""
        while True:
            parts.append(self._part(step, micro))
            yield parts[-1].where
            step, micro = self._after(step, micro)


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
    recipe = Recipe(config.channels, config.resize, config.skip_unreadable)
    classes, stores = open_stores(source, recipe, cache_dir, config.store, config.num_workers)
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
