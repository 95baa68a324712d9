"""Data: from a source's name to the splits that training and evaluation draw batches from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kd.data.batches import TrainBatches as TrainBatches
from kd.data.build import Recipe
from kd.data.corrupt import corrupt
from kd.data.sources import Source, find_source
from kd.data.split import balanced_order, carve
from kd.data.store import Store, open_stores
from kd.data.stream import Encoded, ahead, in_workers
from kd.data.views import Views as Views
from kd.util.device import free_memory, to_device
from kd.util.errors import UserError, say
from kd.util.mapped import announce, is_large


def default_cache_dir() -> Path:
    """Where stores and downloads go unless data.cache_dir names another place: $KD_CACHE, else ~/.cache/kd."""
    return Path(os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()


Columns = dict[str, Tensor]  # of a batch, by name: `image` uint8 (B, C, H, W), and others
Read = tuple[Columns, Tensor, Tensor]  # columns, labels (B,) and places in the store (B,)


@dataclass
class Viewed:
    """Columns that a table on disk holds for views of images, and how those that are not there yet are computed.

    table: a `kd.teachers.view_table.ViewTable`.
    compute: gives the columns for the columns of a batch.
    """

    table: Any
    compute: Callable[[Columns], Columns]


@dataclass
class Split:
    """Some of a store's images, and what else is known of each of them.

    store, places: the images, int64 (n,) into the store.
    rows: further columns by name (n, ...), in the order of `places`.
    viewed: further columns of the images' views.
    shows: whether the images are a column too; not where all that needs them has been computed before.
    resident: what `read` gives of all of them, where that is kept on the device.
    """

    store: Store
    places: np.ndarray
    rows: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    viewed: list[Viewed] = field(default_factory=list, kw_only=True)
    shows: bool = field(default=True, kw_only=True)
    resident: Read | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        return self.store.labels[self.places]

    @property
    def num_bytes(self) -> int:
        """What all the columns take in memory."""
        columns = [*self.rows.values(), *([self.store.images] if self.shows else [])]
        return sum(len(self) * int(np.prod(c.shape[1:])) * getattr(c, "itemsize", 1) for c in columns)

    def on_host(self, where: np.ndarray) -> Read:
        """What `read` gives, on the CPU."""
        places = self.places[where]
        columns = {name: table[where] for name, table in self.rows.items()}
        if self.shows:
            columns["image"] = self.store.images[places]
        columns = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
        return columns, torch.from_numpy(self.store.labels[places]), torch.from_numpy(places)

    def read(self, where: np.ndarray, device: torch.device) -> Read:
        """Columns, labels and places in the store, for positions within this split; a GPU is not waited for."""
        if self.resident is not None:
            chosen = to_device(torch.from_numpy(where), device)
            return _each(self.resident, lambda part: part[chosen])
        return _each(self.on_host(where), lambda part: to_device(part, device))

    def batches(self, wheres: Iterable[np.ndarray], device: torch.device) -> Iterator[Read]:
        """What `read` gives for each of these, in order; prepared ahead by processes where images are decoded, by a
        thread where they are copied to a GPU.

        Args:
            wheres: may have no end.
        """
        pinned, images = device.type == "cuda", self.store.images
        if self.resident is not None:
            prepared = (self.read(where, device) for where in wheres)
        elif self.shows and isinstance(images, Encoded) and images.workers:
            prepared = in_workers(self.on_host, wheres, images.workers, pinned)
        elif pinned:
            prepared = ahead(lambda where: _each(self.on_host(where), Tensor.pin_memory), self._announced(wheres))
        else:
            prepared = map(self.on_host, self._announced(wheres))
        for parts in prepared:
            yield _each(parts, lambda part: part.to(device, non_blocking=True))

    def _announced(self, wheres: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same, each when the disk has been told of the one after it."""
        large = [table for table in self.rows.values() if is_large(table)]
        images = self.store.images if self.shows and is_large(self.store.images) else None
        if images is None and not large:
            yield from wheres
            return
        last = None
        for where in wheres:
            for table in large:
                announce(table, where)
            if images is not None:
                announce(images, self.places[where])
            if last is not None:
                yield last
            last = where
        if last is not None:
            yield last

    def kept_on(self, device: torch.device) -> Split:
        """This split with its columns on the device, from where a batch is gathered without the CPU."""
        size = max(1, 2**26 * len(self) // max(1, self.num_bytes))  # 64 MB at a time
        wheres = [np.arange(start, min(start + size, len(self))) for start in range(0, len(self), size)]
        whole = None
        for where, parts in zip(wheres, self.batches(wheres, device), strict=True):
            whole = whole or _each(
                parts, lambda p: torch.empty((len(self), *p.shape[1:]), dtype=p.dtype, device=device)
            )
            for every, part in zip(_flat(whole), _flat(parts), strict=True):
                every[where[0] : where[-1] + 1] = part
        return replace(self, resident=whole)


def _flat(parts: Read) -> list[Tensor]:
    return [*parts[0].values(), *parts[1:]]


def _each(parts: Read, function: Callable[[Tensor], Tensor]) -> Read:
    columns, labels, places = parts
    return {name: function(column) for name, column in columns.items()}, function(labels), function(places)


@dataclass
class CorruptedSplit(Split):
    """A split whose images are read corrupted, see `kd.data.corrupt`."""

    corruption: str
    severity: int

    def on_host(self, where: np.ndarray) -> Read:
        columns, labels, index = super().on_host(where)
        return {"image": corrupt(columns["image"], index, self.corruption, self.severity)}, labels, index


@dataclass
class Data:
    """The splits of a source and its class names; val is None when nothing is set aside for validation.

    views, batch_size: how training images are shown, and how many a step over all processes.
    """

    classes: list[str]
    train: Split
    val: Split | None
    test: Split
    views: Views = field(default_factory=Views)
    batch_size: int = 64

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
        """The data with its training columns in a GPU's memory if they take at most this share of what is free there,
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


def load_data(config, download: bool = True, size: tuple[int, int] | None = None) -> Data:
    """Open a `kd.run.config.DataConfig`'s source and make its splits.

    Args:
        download: False to refuse a named set that is not on this disk instead of fetching it.
        size: (H, W) that all images are brought to, as `Classifier.predict` does with files.

    Raises:
        UserError: the source cannot be read, has one class, or is too small for the splits.
    """
    source, cache_dir = open_source(config, download)
    channels, side = config.store_channels or config.channels, config.store_size or config.resize
    recipe = Recipe(channels, side, config.skip_unreadable, size)
    classes, stores = open_stores(source, recipe, cache_dir, config.store, config.num_workers)
    _check(config, classes, stores)
    seed, train = config.split_seed, stores["train"]
    places = np.arange(len(train))
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
    return Data(classes, Split(train, places), val, test, Views.of(config), config.batch_size)


def open_source(config, download: bool = True) -> tuple[Source, Path]:
    """A `kd.run.config.DataConfig`'s source, and the folder of its cache; raises what `find_source` does."""
    cache_dir = Path(config.cache_dir).expanduser() if config.cache_dir else default_cache_dir()
    download_dir = Path(config.download_dir).expanduser() if config.download_dir else cache_dir / "downloads"
    columns = config.image_column, config.label_column
    return find_source(config.source, cache_dir, download_dir, *columns, download), cache_dir


def _check(config, classes: list[str], stores: dict[str, Store]) -> None:
    if len(classes) < 2:
        raise UserError(
            f"data.source {config.source!r} has one class ({', '.join(classes)}); a classifier needs two or more"
        )
    for name, store in stores.items():
        if (least := store.labels.min()) < 0:
            raise UserError(
                f"data.source {config.source!r}: {name} has images without a label ({least}); remove them from it"
            )
        if (most := store.labels.max()) >= len(classes):
            raise UserError(
                f"data.source {config.source!r}: {name} has the label {most} and there are {len(classes)} classes, "
                f"0 to {len(classes) - 1}; correct its labels or the names of its classes"
            )
    if config.pad_crop >= (side := min(stores["train"].images.shape[2:])):
        raise UserError(
            f"data.pad_crop {config.pad_crop} must be below the shorter side of the images ({side}): beyond, crops "
            f"show none of them"
        )
