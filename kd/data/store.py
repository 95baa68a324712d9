"""Images decoded once: a uint8 array on disk, memory-mapped, shared by all processes and later runs.

A store is a folder named by a fingerprint of the source and of how it was decoded, and holds a checksum, which is
compared once for each state of its files (`kd.data.listing`). It is built aside and renamed, under a lock: one process
builds, with all cores, the others wait; when the builder dies the next one takes over. A set whose decoded images would
take too much of the disk is not stored, but decoded at each read, to the same images at the same places.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import PIL

from kd.data.build import Recipe, build, checksum, examined, none_readable, size_of_first
from kd.data.decode import OtherSize
from kd.data.raw import RawSplit
from kd.data.sources import Source
from kd.data.stream import Encoded
from kd.util.errors import UserError, say
from kd.util.files import locked
from kd.util.machine import share_of_cores

FORMAT = 2  # of what a store holds; a change of how images are decoded is another one
SHARE_OF_DISK = 0.5  # of the free space that the decoded images may take


@dataclass
class Store:
    """Decoded images of one split: images uint8 (N, C, H, W), memory-mapped or `Encoded`; labels int64 (N,).

    In place of images there may be rows of a table, see `kd.teachers.precompute`.
    """

    images: np.ndarray | Encoded
    labels: np.ndarray
    fingerprint: str | None = None

    def identity(self) -> str:
        """Changes when the images do; the same whether they are stored or streamed."""
        if self.fingerprint is None:
            self.fingerprint = hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()
        return self.fingerprint

    def __len__(self) -> int:
        return len(self.labels)


def open_stores(
    source: Source, recipe: Recipe, cache_dir: Path, mode: str, workers: int | None
) -> tuple[list[str], dict[str, Store]]:
    """Class names and the splits of a source; stored ones are built if they are not on disk yet.

    Images of one size keep it. Images of several sizes, or much larger than needed, are brought to a square of `resize`
    pixels (shorter side resized, centre cropped), or all to the size that the recipe states.

    Args:
        mode: `disk` to store the images, `stream` to decode them at each read, `auto` to stream if they would take more
            than `SHARE_OF_DISK` of the free disk.
        workers: processes that decode ahead when streaming; None for this process's share of the cores.

    Raises:
        UserError: unreadable images (named), several sizes and no `resize`, no space.
    """
    if source.fingerprint is None:  # downloaded just now: the next start will find the files
        classes, splits = source.open()
        return _of_size((classes, {name: Store(split.images, split.labels) for name, split in splits.items()}), recipe)
    root = cache_dir / "store"
    native = root / _key(source, recipe)
    height, width = recipe.fit_to or (None, None)
    fitted = root / f"{native.name}-fit{width if width == height else f'{width}x{height}'}"
    root.mkdir(parents=True, exist_ok=True)
    with locked(root / f"{native.name}.lock"):
        if source.decoded:
            found = _read(native)
        else:
            found = None if mode == "stream" else _read(fitted) or _read(native, recipe)
        if found is not None:
            return _of_size(found, recipe)
        classes, splits = source.open()
        for name, split in splits.items():
            if len(split.labels) == 0:
                raise UserError(f"data: the {name} split holds no images")
        if source.decoded:
            build(native, classes, splits, recipe, None, source.notes)
            return _of_size(_read(native), recipe)
        make = partial(_make, native, source, (classes, splits), recipe, mode)
        try:
            folder, size = native, size_of_first(splits, recipe)
            why, bad = make(native, size, fit=False)
        except OtherSize as error:
            if recipe.fit_to is None:
                raise UserError(
                    f"{error}; set data.resize (pixels of the shorter side), and images become squares"
                ) from None
            source.notes.append(f"{error}; all are brought to {width}x{height}")
            folder, size = fitted, recipe.fit_to
            why, bad = make(fitted, size, fit=True)
        if not why:
            return _read(folder)
    _say(source.notes, {name: [splits[name].name(place) for place, _ in bad_ones] for name, bad_ones in bad.items()})
    workers = share_of_cores() if workers is None else workers
    say(f"data: images are decoded at each step, ahead of it by {workers} processes ({why})")
    return classes, _streamed(splits, recipe, bad, size, folder, folder == fitted, workers)


def _key(source: Source, recipe: Recipe) -> str:
    """The name of a source's store: what its images depend on."""
    stem = "".join(c if c.isalnum() else "-" for c in source.name).strip("-")
    how = f"{recipe.channels}ch{'-skip' if recipe.skip_unreadable else ''}-v{FORMAT}"
    return f"{stem}-{source.fingerprint}-{how}" + ("" if source.decoded else f"-pillow{PIL.__version__}")


def _of_size(found: tuple[list[str], dict[str, Store]], recipe: Recipe) -> tuple[list[str], dict[str, Store]]:
    """Splits whose images have the size that the recipe states; arrays of another are resized at each read."""
    classes, stores = found
    if recipe.size is None or all(store.images.shape[2:] == recipe.size for store in stores.values()):
        return found
    say(f"data: images are brought to {recipe.size[1]}x{recipe.size[0]}")
    for name, store in stores.items():
        raw, every = RawSplit(store.images, store.labels), np.arange(len(store))
        stores[name] = Store(Encoded(raw, every, recipe.channels, recipe.size, fit=True, workers=0), store.labels)
    return classes, stores


def _make(
    native: Path, source: Source, opened, recipe: Recipe, mode: str, folder: Path, size: tuple[int, int], fit: bool
) -> tuple[str, dict[str, list]]:
    """Build a store of images that have one size (H, W), or are brought to it.

    Returns:
        Why nothing was stored ("" if it was), and the unreadable images of each split.

    Raises:
        OtherSize: images differ in size and are not to be brought to one.
    """
    classes, splits = opened
    needed = sum(len(split.labels) for split in splits.values()) * recipe.channels * size[0] * size[1]
    room = SHARE_OF_DISK * shutil.disk_usage(folder.parent).free
    if mode == "disk" or (mode == "auto" and needed <= room):
        build(folder, classes, splits, recipe, size, source.notes, fit)
        return "", {}
    differ, bad = None, {}
    if recipe.skip_unreadable or not fit:  # what a pass over all images finds lies beside the store that is not built
        differ, bad = examined(native.with_name(f"{native.name}.json"), splits, recipe, size)
    if differ and not fit:
        raise OtherSize(differ)
    if mode == "stream":
        return "data.store stream", bad
    return f"stored they would take {needed / 1e9:.3g} GB, the limit is {room / 1e9:.3g}: half of the free disk", bad


def _streamed(
    splits: dict[str, RawSplit], recipe: Recipe, bad: dict, size, folder: Path, fit: bool, workers: int
) -> dict[str, Store]:
    """Splits whose images are decoded when they are needed, without the unreadable ones."""
    stores = {}
    for name, split in splits.items():
        kept = np.delete(np.arange(len(split.labels)), [place for place, _ in bad.get(name, [])])
        if len(kept) == 0:
            raise none_readable(name)
        images = Encoded(split, kept, recipe.channels, size, fit, workers)
        stores[name] = Store(images, split.labels[kept], f"{folder.name}/{name}")
    return stores


def _read(folder: Path, recipe: Recipe | None = None) -> tuple[list[str], dict[str, Store]] | None:
    """A store; None if it is not there, is damaged, or holds images of another size than the recipe wants."""
    stores = {}
    if not folder.exists():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        if meta.pop("sha256") != checksum(folder, meta, folder):
            raise ValueError("its files do not have their checksum")
        for split in meta["splits"]:
            images = np.load(folder / f"{split}-images.npy", mmap_mode="r")
            stores[split] = Store(images, np.load(folder / f"{split}-labels.npy"), f"{folder.name}/{split}")
        classes, notes, skipped = meta["classes"], meta["notes"], meta["skipped"]
    except (OSError, ValueError, EOFError, KeyError, AttributeError) as error:
        say(f"data: the store {folder} is damaged ({error}) and is rebuilt")
        return None
    if recipe is not None and any(recipe.unsuited(store.images.shape[2:]) for store in stores.values()):
        return None
    _say(notes, skipped)
    return classes, stores


def _say(notes: list[str], skipped: dict[str, list[str]]) -> None:
    for note in notes:
        say(f"data: {note}")
    for split, names in skipped.items():
        if names:
            say(f"data: {len(names)} unreadable images of {split} are left out: {', '.join(names[:3])}")
