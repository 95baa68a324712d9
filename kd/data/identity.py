"""A data set known by its content, so that a run can tell later whether it still has the same images and labels."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress

import numpy as np

from kd.data import Data, Split

NUM_COMPARED = 64  # images of a split whose pixels are compared
TOLERANCE = 4  # levels of 256 by which another version of a decoder may change the mean of an image's channel


def identity(data: Data) -> dict[str, dict]:
    """What `changes` compares, for each split: the number of `images`; `split`, a hash of their places, labels and
    class names; `pixels`, one of some of the images; `looks`, the means of their channels; `files`, the store's
    fingerprint."""
    splits = {"train": data.train, "val": data.val, "test": data.test}
    return {name: _identity(split, data.classes) for name, split in splits.items() if split is not None}


def _identity(split: Split, classes: list[str]) -> dict:
    chosen = np.unique(np.linspace(0, len(split) - 1, NUM_COMPARED).astype(np.int64))
    images = np.ascontiguousarray(split.store.images[split.places[chosen]])
    parts = json.dumps(classes).encode(), *(column.astype("<i8").tobytes() for column in (split.places, split.labels))
    return {
        "images": len(split),
        "split": hashlib.sha256(b"".join(parts)).hexdigest(),
        "pixels": hashlib.sha256(images).hexdigest(),
        "looks": images.mean(axis=(2, 3)).round().astype(np.uint8).tobytes().hex(),
        "files": split.store.fingerprint,
    }


def changes(before: dict[str, dict], now: dict[str, dict]) -> tuple[dict[str, str], list[str]]:
    """What differs between two identities.

    Returns:
        The splits that have other images or labels, each with why; and in words what else differs and need not be
        wrong: pixels a little, as another version of a decoder gives them, or the files' names, sizes or dates.
    """
    other, words = {}, []
    for name in sorted(before.keys() | now.keys()):
        one, two = before.get(name), now.get(name)
        if one is None or two is None:
            other[name] = "there is none now" if one else "there was none"
        elif one["images"] != two["images"]:
            other[name] = f"{one['images']:,} images in training, {two['images']:,} now"
        elif one["split"] != two["split"]:
            other[name] = "other images, labels or class names"
        elif not _alike(one["looks"], two["looks"]):
            other[name] = "other images"
        elif one["pixels"] != two["pixels"]:
            words.append(f"images of the {name} split are decoded to slightly other pixels than in training")
        elif one["files"] != two["files"]:
            words.append(f"the {name} split's files have other names, sizes or dates than in training")
    return other, words


def _alike(one: str, two: str) -> bool:
    with suppress(ValueError):  # of other lengths, or no such bytes
        return all(abs(a - b) <= TOLERANCE for a, b in zip(bytes.fromhex(one), bytes.fromhex(two), strict=True))
    return False
