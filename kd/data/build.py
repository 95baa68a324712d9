"""A source's images read once by all cores: to build a store of them, or to know which can be streamed and how."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kd.data.decode import OtherSize
from kd.data.listing import MEMORY, contents, digest, listing
from kd.data.raw import RawSplit
from kd.data.stream import in_workers
from kd.util.errors import UserError
from kd.util.files import built_aside, sync, write_atomic
from kd.util.machine import num_cores

FEW = 512  # images that are decoded sooner than processes have started
BLOCK_BYTES = 2**20  # what a worker decodes at a time


@dataclass
class Recipe:
    """How a source's images become arrays of one size.

    size: (H, W) that all are brought to, whatever theirs is, see `kd.data.decode.read_image`.
    """

    channels: int
    resize: int | None
    skip_unreadable: bool
    size: tuple[int, int] | None = None

    @property
    def fit_to(self) -> tuple[int, int] | None:
        """(H, W) that images are brought to if they cannot keep theirs."""
        return self.size or (self.resize and (self.resize, self.resize))

    def unsuited(self, size: tuple[int, int]) -> str:
        """Why images of this (H, W) cannot keep it; empty if they can."""
        if self.size is not None:
            return f"{size[1]}x{size[0]}, not {self.size[1]}x{self.size[0]}" if size != self.size else ""
        larger = self.resize is not None and min(size) > 2 * self.resize
        return f"{size[1]}x{size[0]}, much larger than data.resize {self.resize}" if larger else ""


def size_of_first(splits: dict[str, RawSplit], recipe: Recipe) -> tuple[int, int]:
    """(H, W) of the first image that can be read: what all images of all splits must have.

    Raises:
        OtherSize: they cannot keep it.
    """
    name, split = next(iter(splits.items()))
    for place in range(len(split.labels)):
        pixels = split.read(place, recipe.channels)
        if not isinstance(pixels, Exception):
            if why := recipe.unsuited(pixels.shape[1:]):
                raise OtherSize(f"images are of {why}")
            return pixels.shape[1:]
    raise none_readable(name)


def none_readable(name: str) -> UserError:
    return UserError(f"data: no image of the {name} split can be read")


def build(folder, classes, splits: dict[str, RawSplit], recipe: Recipe, size, notes, fit: bool = False) -> None:
    """Decode all images to a store of the name `folder`; (H, W) they must have, or be brought to with `fit`.

    Raises:
        OtherSize, UserError: images differ in size or cannot be read, or the disk is full.
    """
    try:
        with built_aside(folder) as aside:
            skipped = {name: _decode(aside, name, split, recipe, size, fit) for name, split in splits.items()}
            for path in aside.iterdir():  # or a power cut could leave zeros that have the right time
                sync(path)
            meta = {"classes": classes, "splits": list(splits), "skipped": skipped, "notes": notes}
            (aside / "meta.json").write_text(json.dumps({**meta, "sha256": checksum(aside, meta, folder)}))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(
            f"no space for the decoded images in {folder.parent}; free some, set data.cache_dir to another disk, or "
            f"data.store to stream"
        ) from None


def checksum(folder: Path, meta: dict, place: Path) -> str:
    """Of all that a store holds; `place` is its folder when it is there."""
    files = [(parts, state) for parts, state in listing(folder) if parts != ("meta.json",)]
    return digest([json.dumps(meta, sort_keys=True), contents(folder, files, place.parent.parent / MEMORY, place)])


def _reserve(path: Path) -> None:
    """Take the file's space now: on a full disk a memory map would end the process without a word."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _decode(aside: Path, name: str, split: RawSplit, recipe: Recipe, size, fit: bool) -> list[str]:
    """Decode a split into `aside`; returns the names of the images left out."""
    count, path, bad, kept = len(split.labels), aside / f"{name}-images.npy", [], 0
    shape = split.images.shape[1:] if split.decoded else (recipe.channels, *size)
    images = np.lib.format.open_memmap(path, "w+", np.uint8, (count, *shape))
    _reserve(path)
    read, length = partial(_read_block, split, recipe.channels, size, fit), BLOCK_BYTES // int(np.prod(shape))
    for _, (pixels, failed) in _each_block(read, split, max(1, min(256, length)), f"decode {name}"):
        images[kept : kept + len(pixels)] = pixels
        kept, bad = kept + len(pixels), bad + failed
    if bad and not recipe.skip_unreadable:
        raise split.unreadable(bad)
    if kept == 0:
        raise none_readable(name)
    images.flush()
    if kept < count:  # shorten the file to what was kept
        np.save(aside / f"{name}-kept.npy", images[:kept])
        del images
        (aside / f"{name}-kept.npy").rename(path)
    np.save(aside / f"{name}-labels.npy", np.delete(split.labels, [place for place, _ in bad]))
    return [split.name(place) for place, _ in bad]


def _each_block(function: Callable, split: RawSplit, length: int, title: str) -> Iterator[tuple[range, object]]:
    """Blocks of a split's places, each with what the function gives for it: on all cores where images are decoded."""
    count = len(split.labels)
    blocks = [range(start, min(start + length, count)) for start in range(0, count, length)]
    results = in_workers(function, blocks, 0 if split.decoded or count <= FEW else num_cores())
    with tqdm(total=count, desc=title, unit="image", disable=None, leave=False) as bar:
        for block, result in zip(blocks, results, strict=True):
            yield block, result
            bar.update(len(block))


def _read_block(split: RawSplit, channels: int, size, fit: bool, block: range) -> tuple[Tensor, list[tuple[int, str]]]:
    """The pixels of those images of a block that can be read, and of the others the place and why."""
    if split.decoded:
        return torch.from_numpy(split.images[block.start : block.stop]), []
    read, bad = [np.empty((0, channels, *size), np.uint8)], []
    for place in block:
        try:
            pixels = split.read(place, channels, size, fit)
        except OtherSize as error:
            raise _differ(size, error) from None
        if isinstance(pixels, Exception):
            bad.append((place, str(pixels)))
        else:
            read.append(pixels[None])
    return torch.from_numpy(np.concatenate(read)), bad


def _differ(size: tuple[int, int], other: object) -> OtherSize:
    return OtherSize(f"images differ in size: {size[1]}x{size[0]} and {other}")


def examined(file: Path, splits: dict[str, RawSplit], recipe: Recipe, size) -> tuple[str | None, dict[str, list]]:
    """How images differ in size, and which cannot be read (place and why, by split): looked at once, kept in a file.

    Their heads are enough, up to the first of another size, unless unreadable ones are to be left out.

    Raises:
        UserError: an image's head is unreadable, and it is not to be left out.
    """
    try:
        known = json.loads(file.read_text())
        return known["differ"], known["bad"]
    except (OSError, ValueError, KeyError):
        differ, bad = None, {name: [] for name in splits}
    for name, split in splits.items():
        for block, found in _each_block(partial(_look_block, split, recipe), split, 64, f"look at {name}"):
            bad[name] += [(place, why) for place, why in zip(block, found, strict=True) if isinstance(why, str)]
            others = [other for other in found if not isinstance(other, str) and other != size]
            if others and not differ:
                differ = str(_differ(size, f"{others[0][1]}x{others[0][0]}"))
            if differ and not recipe.skip_unreadable:
                break
        if differ and not recipe.skip_unreadable:
            break
        if bad[name] and not recipe.skip_unreadable:
            raise split.unreadable(bad[name])
    write_atomic(file, json.dumps({"differ": differ, "bad": bad}).encode())
    return differ, bad


def _look_block(split: RawSplit, recipe: Recipe, block: range) -> list[tuple[int, int] | str]:
    """Of each image of a block its (H, W), or why it cannot be read."""
    found = []
    for place in block:
        if recipe.skip_unreadable:
            seen = split.read(place, recipe.channels)
            found.append(str(seen) if isinstance(seen, Exception) else seen.shape[1:])
        else:
            seen = split.size(place)
            found.append(str(seen) if isinstance(seen, Exception) else seen)
    return found
