"""Images decoded once: a uint8 array on disk, memory-mapped, shared by all processes and later runs.

A store is a folder named by a fingerprint of the source and of how it was decoded. It is built aside and renamed, under
a lock: one process builds, the others wait; when the builder dies the next one takes over.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from kd.data.decode import OtherSize, UnreadableImage, read_image
from kd.data.sources import RawSplit, Source
from kd.errors import UserError, say


@dataclass
class Store:
    """Decoded images of one split: images uint8 (N, C, H, W), perhaps memory-mapped; labels int64 (N,).

    In place of images there may be rows of a table, see `kd.precompute`.
    """

    images: np.ndarray
    labels: np.ndarray
    fingerprint: str | None = None

    def identity(self) -> str:
        """Changes when the images do."""
        if self.fingerprint is None:
            self.fingerprint = hashlib.sha256(np.ascontiguousarray(self.images)).hexdigest()
        return self.fingerprint

    def __len__(self) -> int:
        return len(self.labels)


def open_stores(
    source: Source, channels: int, resize: int | None, skip_unreadable: bool, cache_dir: Path
) -> tuple[list[str], dict[str, Store]]:
    """Class names and the decoded splits of a source, built if they are not on disk yet.

    Images of one size keep it. Images of several sizes, or much larger than needed, are brought to a square of `resize`
    pixels (shorter side resized, centre cropped).

    Raises:
        UserError: unreadable images (named), several sizes and no `resize`, no space.
    """
    if source.fingerprint is None:
        classes, splits = source.open()
        return classes, {name: Store(split.images, split.labels) for name, split in splits.items()}
    root = cache_dir / "store"
    stem = "".join(c if c.isalnum() else "-" for c in source.name).strip("-")
    key = f"{stem}-{source.fingerprint}-{channels}ch{'-skip' if skip_unreadable else ''}"
    native, fitted = root / key, root / f"{key}-fit{resize}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f"{key}.lock"):
        found = _read(fitted) or _read(native, resize)
        if found is not None:
            return found
        classes, splits = source.open()
        try:
            _build(native, classes, splits, channels, None, resize, skip_unreadable, source.notes)
            return _read(native)
        except OtherSize as error:
            if resize is None:
                raise UserError(
                    f"{error}; set data.resize (pixels of the shorter side), and images become squares"
                ) from None
            source.notes.append(f"{error}; all are brought to {resize}x{resize}")
        _build(fitted, classes, splits, channels, (resize, resize), resize, skip_unreadable, source.notes)
        return _read(fitted)


def _read(folder: Path, resize: int | None = None) -> tuple[list[str], dict[str, Store]] | None:
    """A store; None if it is not there, is damaged, or holds images that are much larger than `resize` asks for."""
    stores = {}
    try:
        meta = json.loads((folder / "meta.json").read_text())
        for split in meta["splits"]:
            images = np.load(folder / f"{split}-images.npy", mmap_mode="r")
            stores[split] = Store(images, np.load(folder / f"{split}-labels.npy"), f"{folder.name}/{split}")
        notes, skipped_images = meta["notes"], meta["skipped"]
    except (OSError, ValueError, EOFError, KeyError):
        return None
    if any(_much_larger(store.images.shape[2:], resize) for store in stores.values()):
        return None
    for note in notes:
        say(f"data: {note}")
    for split, skipped in skipped_images.items():
        if skipped:
            say(f"data: {len(skipped)} unreadable images of {split} are left out: {', '.join(skipped[:3])}")
    return meta["classes"], stores


def _much_larger(size: tuple[int, int], resize: int | None) -> bool:
    return resize is not None and min(size) > 2 * resize


def _build(folder, classes, splits: dict[str, RawSplit], channels, size, resize, skip_unreadable, notes) -> None:
    aside = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
    for left in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a builder that died; the lock is ours
        shutil.rmtree(left, ignore_errors=True)
    aside.mkdir()
    try:
        skipped, fit = {}, size is not None
        for name, split in splits.items():
            # all splits must have one size, that of the first split's first image unless it is given
            size = size or _size_of_first(name, split, channels, resize)
            skipped[name] = _decode(aside, name, split, channels, size, fit, skip_unreadable)
        meta = {"classes": classes, "splits": list(splits), "skipped": skipped, "notes": notes}
        (aside / "meta.json").write_text(json.dumps(meta))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space for the decoded images in {folder.parent}; free some, or set data.cache_dir to another disk"
        ) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _read_one(split: RawSplit, i: int, channels: int, size=None, fit: bool = True) -> np.ndarray | Exception:
    """The pixels of one image, or why it cannot be read."""
    try:
        return read_image(split.images(i) if callable(split.images) else split.images[i], channels, size, fit=fit)
    except UnreadableImage as error:
        return error
    except FileNotFoundError:  # a Parquet row may name a file instead of holding it
        return UnreadableImage("no such file")


def _size_of_first(name: str, split: RawSplit, channels: int, resize: int | None) -> tuple[int, int]:
    """(H, W) of the first image that can be read."""
    for i in range(len(split.labels)):
        pixels = _read_one(split, i, channels)
        if not isinstance(pixels, Exception):
            height, width = pixels.shape[1:]
            if _much_larger((height, width), resize):
                raise OtherSize(f"images of {width}x{height} are much larger than data.resize {resize}")
            return height, width
    raise UserError(f"data: no image of the {name} split can be read")


def _reserve(path: Path) -> None:
    """Take the file's space now: on a full disk a memory map would end the process without a word.

    Raises:
        OSError: there is no space left.
    """
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _decode(aside: Path, name: str, split: RawSplit, channels, size, fit: bool, skip_unreadable) -> list[str]:
    """Decode a split into `aside`; returns the names of the images left out."""
    count = len(split.labels)
    if count == 0:
        raise UserError(f"data: the {name} split holds no images")

    def read(i: int):
        return _read_one(split, i, channels, size, fit)

    images = np.lib.format.open_memmap(aside / f"{name}-images.npy", "w+", np.uint8, (count, channels, *size))
    _reserve(aside / f"{name}-images.npy")
    bad: list[tuple[int, str]] = []
    kept = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        with tqdm(total=count, desc=f"decode {name}", unit="image", disable=None, leave=False) as bar:
            for start in range(0, count, 4096):  # in blocks, so that the queue of results stays small
                block = range(start, min(start + 4096, count))
                try:
                    results = list(pool.map(read, block))
                except OtherSize as error:
                    raise OtherSize(f"images differ in size: {size[1]}x{size[0]} and {error}") from None
                for i, pixels in zip(block, results, strict=True):
                    if isinstance(pixels, Exception):
                        bad.append((i, str(pixels)))
                    else:
                        images[kept] = pixels
                        kept += 1
                bar.update(len(block))
    if bad and not skip_unreadable:
        named = "; ".join(f"{split.name(i)} ({why})" for i, why in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise UserError(f"unreadable image: {named}{more}; repair or remove it, or pass --data.skip_unreadable true")
    if kept == 0:
        raise UserError(f"data: no image of the {name} split can be read")
    left_out = {i for i, _ in bad}
    labels = np.asarray([label for i, label in enumerate(split.labels) if i not in left_out], dtype=np.int64)
    images.flush()
    if kept < count:  # shorten the file to what was kept
        whole = np.array(images[:kept])
        del images
        np.save(aside / f"{name}-images.npy", whole)
    np.save(aside / f"{name}-labels.npy", labels)
    return [split.name(i) for i, _ in bad]
