"""One image file, PIL image or array to uint8 pixels (C, H, W)."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why."""


class OtherSize(Exception):
    """An image that has not the size of the others."""


def open_image(image) -> Image.Image:
    """A decoded PIL image from a path, encoded bytes, a PIL image or a uint8 array (H, W[, C]); EXIF rotation applied.

    Raises:
        UnreadableImage: no image, truncated, or too large to be one.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    try:
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image) as opened:
            opened.load()
            return ImageOps.exif_transpose(opened)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise UnreadableImage(str(error).replace(str(image), "").strip() or "not an image") from None


def read_image(image, channels: int, size: tuple[int, int] | None = None, fit: bool = True) -> np.ndarray:
    """Pixels (channels, H, W), uint8, of a path, bytes, PIL image or array.

    Args:
        channels: 3 for RGB, 1 for luminance.
        size: (H, W) to bring the image to: an antialiased bilinear resize that covers it, then a centre crop.
        fit: False to refuse an image of another size instead.

    Raises:
        UnreadableImage: it cannot be decoded.
        OtherSize: it is not `size` and `fit` is False.
    """
    picture = open_image(image).convert("RGB" if channels == 3 else "L")
    if size is not None and picture.size != (size[1], size[0]):
        if not fit:
            raise OtherSize(f"{picture.size[0]}x{picture.size[1]}")
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


def display_name(image) -> str:
    """How an image is called in a message."""
    return str(image) if isinstance(image, str | Path) else type(image).__name__
