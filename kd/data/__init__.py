"""Data: from a source's name to the splits that training and evaluation draw batches from."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kd.data.batches import TrainBatches as TrainBatches
from kd.data.build import Recipe
from kd.data.sources import Source, find_source
from kd.data.split import balanced_order, carve
from kd.data.store import Store, open_stores
from kd.data.stream import Encoded, ahead, in_workers
from kd.data.views import Views as Views
from kd.util.device import free_memory, to_device
from kd.util.errors import UserError, say
from kd.util.mapped import announce


def cache_folder(cache_dir: str | None) -> Path:
    """Where stores and downloads go: data.cache_dir, else $KD_CACHE, else ~/.cache/kd."""
    return Path(cache_dir or os.environ.get("KD_CACHE", "~/.cache/kd")).expanduser()


Columns = dict[str, Tensor]  # of a batch, by name: `image` uint8 (B, C, H, W), and others
Read = tuple[Columns, Tensor, Tensor]  # columns, labels (B,) and places in the store (B,)
Look = Callable[[Tensor | None, Columns], Columns]  # further columns of views, see `kd.teachers.tables`


@dataclass
class Split:
    """Some of a store's images, and what else is known of each of them.

    store, places: the images, int64 (n,) into the store.
    rows: further columns by name (n, ...), in the order of `places`.
    viewed: what gives further columns of the images' views.
    shows: whether the images are a column too; not where all that needs them has been computed before.
    resident: what `read` gives of all of them, where that is kept on the device.
    """

    store: Store
    places: np.ndarray
    rows: dict[str, np.ndarray] = field(default_factory=dict, kw_only=True)
    viewed: list[Look] = field(default_factory=list, kw_only=True)
    shows: bool = field(default=True, kw_only=True)
    resident: Read | None = field(default=None, kw_only=True)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def labels(self) -> np.ndarray:
        return self.store.labels[self.places]

    def labelled(self) -> Split:
        """Those of the images whose label is known."""
        known = self.labels >= 0
        return self if known.all() else replace(self, places=self.places[known])

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
            return _each(lambda part: part[chosen], self.resident)
        return _each(lambda part: to_device(part, device), self.on_host(where))

    def batches(self, wheres: Iterable[np.ndarray], device: torch.device) -> Iterator[Read]:
        """What `read` gives for each of `wheres`, which may have no end, in order; prepared ahead by processes where
        images are decoded, by a thread where they are copied to a GPU."""
        pinned, images = device.type == "cuda", self.store.images
        if self.resident is not None:
            prepared = (self.read(where, device) for where in wheres)
        elif self.shows and isinstance(images, Encoded) and images.workers:
            prepared = in_workers(self.on_host, wheres, images.workers, pinned)
        elif pinned:
            prepared = ahead(lambda where: _each(Tensor.pin_memory, self.on_host(where)), self._announced(wheres))
        else:
            prepared = map(self.on_host, self._announced(wheres))
        for parts in prepared:
            yield _each(lambda part: part.to(device, non_blocking=True), parts)

    def _announced(self, wheres: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """The same, each when the disk has been told of the one after it."""

        def told(where: np.ndarray) -> np.ndarray:
            for table in self.rows.values():
                announce(table, where)
            if self.shows:
                announce(self.store.images, self.places[where])
            return where

        return (where for where, _next in pairwise(chain(map(told, wheres), [None])))

    def kept_on(self, device: torch.device) -> Split:
        """This split with its columns on the device, from where a batch is gathered without the CPU."""
        size = max(1, 2**26 * len(self) // max(1, self.num_bytes))  # 64 MB at a time
        wheres, whole = np.split(np.arange(len(self)), range(size, len(self), size)), None
        for where, parts in zip(wheres, self.batches(wheres, device), strict=True):
            whole = whole or _each(lambda part: part.new_empty((len(self), *part.shape[1:])), parts)
            _each(lambda every, part, at=where: every[at[0] : at[-1] + 1].copy_(part), whole, parts)
        return replace(self, resident=whole)


def _each(function: Callable[..., Tensor], *reads: Read) -> Read:
    """The function of each column, of the labels and of the places."""
    columns, labels, places = zip(*reads, strict=True)
    named = {name: function(*(some[name] for some in columns)) for name in columns[0]}
    return named, function(*labels), function(*places)


@dataclass
class Data:
    """The splits of a source and its class names; val is None when nothing is set aside for validation.

    views, batch_size: how training images are shown, and how many per step over all processes.
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
    given = {name: Split(store, np.arange(len(store))) for name, store in stores.items()}
    test, val, train, places = given.get("test"), given.get("val"), stores["train"], given["train"].places
    seed, count = config.split_seed, f"{len(train)} images"
    if test is None:
        places, carved = carve(train.labels, config.test_fraction, seed)
        test = Split(train, carved)
        say(f"data: {config.source} has no test split; {len(carved)} of its {count} are set aside as test")
    if val is None and config.val_fraction:
        rest, carved = carve(train.labels[places], config.val_fraction, seed + 1)
        places, val = places[rest], Split(train, places[carved])
        if len(val) == 0:
            raise UserError(f"data.val_fraction {config.val_fraction} of {count} leaves no image to validate on")
    if len(places) == 0 or len(test) == 0:
        raise UserError(f"data.source {config.source!r} has too few images ({count}) to make train and test splits")
    train = _chosen(config, train, places, len(classes))
    return Data(classes, train, val, test, Views.of(config), config.batch_size)


def _chosen(config, store: Store, places: np.ndarray, num_classes: int) -> Split:
    """The training images of data.num_train, with the labels of data.num_labels: the same images for equal numbers."""
    if config.num_train is None and config.num_labels is None:
        return Split(store, places)
    order, most, whose = places[balanced_order(store.labels[places], config.split_seed)], len(places), config.source
    for name in ("num_train", "num_labels"):
        if (number := getattr(config, name)) is None:
            continue
        if not num_classes <= number <= most:
            raise UserError(
                f"data.{name} {number} must be from {num_classes} (one image per class) to {most} (the training images "
                f"of {whose} without validation)"
            )
        most, whose = number, f"data.num_train {number}"
    if config.num_labels is not None:
        labels, known = np.full(len(store), -1), order[: config.num_labels]
        labels[known] = store.labels[known]
        store = replace(store, labels=labels)
    return Split(store, np.sort(order[: config.num_train]))


def open_source(config, download: bool = True) -> tuple[Source, Path]:
    """A `kd.run.config.DataConfig`'s source, and the folder of its cache; raises what `find_source` does."""
    cache_dir = cache_folder(config.cache_dir)
    download_dir = Path(config.download_dir).expanduser() if config.download_dir else cache_dir / "downloads"
    hub_dir = cache_dir / "huggingface" if config.cache_dir else None
    columns = config.image_column, config.label_column
    return find_source(config.source, cache_dir, download_dir, *columns, download, hub_dir), cache_dir


def _check(config, classes: list[str], stores: dict[str, Store]) -> None:
    source, side = f"data.source {config.source!r}", min(stores["train"].images.shape[2:])
    if len(classes) < 2:
        raise UserError(f"{source} has one class ({', '.join(classes)}); a classifier needs two or more")
    for name, store in stores.items():
        least, most = store.labels.min(), store.labels.max()
        if least < 0:
            raise UserError(f"{source}: {name} has images without a label ({least}); remove them from it")
        if most >= len(classes):
            raise UserError(
                f"{source}: {name} has the label {most} and there are {len(classes)} classes, 0 to {len(classes) - 1}; "
                f"correct its labels or the names of its classes"
            )
    if config.pad_crop >= side:
        raise UserError(
            f"data.pad_crop {config.pad_crop} must be below the shorter side of the images ({side}): beyond, crops "
            f"show none of them"
        )
