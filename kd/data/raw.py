"""Splits of a source before they are in the store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kd.data.decode import UnreadableImage, image_size, read_image
from kd.util.errors import UserError
from kd.util.files import shown

TEST_NAMES, VAL_NAMES = ("test",), ("val", "valid", "validation")


@dataclass
class RawSplit:
    """Images of one split before they are in the store; other processes can be given it.

    images: a uint8 array (N, C, H, W), or N encoded images, paths or bytes.
    labels: int64 (N,).
    title: what an image's number follows in a message, where it has no path.
    """

    images: np.ndarray | Sequence
    labels: np.ndarray
    title: str = ""

    @property
    def decoded(self) -> bool:
        """Whether the images are pixels already."""
        return isinstance(self.images, np.ndarray)

    def name(self, place: int) -> str:
        """How an image is called in a message."""
        return f"{self.title} {place}" if self.title else shown(self.images[place])

    def read(
        self, place: int, channels: int, size: tuple[int, int] | None = None, fit: bool = True
    ) -> np.ndarray | UnreadableImage:
        """The pixels of one image as `read_image` gives them, or why it cannot be read."""
        image = self.images[place]
        return _or_why(read_image, image.transpose(1, 2, 0) if self.decoded else image, channels, size, fit)

    def size(self, place: int) -> tuple[int, int] | UnreadableImage:
        """(H, W) of one encoded image by its head, or why that cannot be read."""
        return _or_why(image_size, self.images[place])

    def unreadable(self, bad: list[tuple[int, object]]) -> UserError:
        """The error for images that cannot be decoded: their places, and why."""
        named = "; ".join(f"{self.name(place)} ({why})" for place, why in bad[:3])
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        return UserError(
            f"unreadable image: {named}{more}; repair or remove it, or train with --data.skip_unreadable true"
        )


def _or_why(function, image, *arguments):
    try:
        return function(image, *arguments)
    except UnreadableImage as error:
        return error
    except FileNotFoundError:  # a Parquet row may name a file instead of holding it
        return UnreadableImage("no such file")


def require_one_val(names: list[str], source: str) -> None:
    if len(names) > 1:
        raise UserError(f"data.source {source!r} has {' and '.join(sorted(names))}; keep one of them for validation")


def canonical(splits: dict[str, Any], source: str, notes: list[str]) -> dict[str, Any]:
    """Splits under the names train, val, test; a lone `val` is the test split, as with ImageNet.

    Raises:
        UserError: there is no train split, or several for validation.
    """
    require_one_val([name for name in splits if name in VAL_NAMES], source)
    known = {"train": "train", **dict.fromkeys(TEST_NAMES, "test"), **dict.fromkeys(VAL_NAMES, "val")}
    names = {known[name]: name for name in splits if name in known}
    if "train" not in names:
        found = ", ".join(splits) or "none"
        raise UserError(
            f"data.source {source!r} has no train split (found: {found}); it needs train/ and test/ or val/"
        )
    if "test" not in names and "val" in names:
        names["test"] = names.pop("val")
        notes.append(f"{source} has no test split; its {names['test']} split is the test split")
    return {short: splits[name] for short, name in names.items()}
