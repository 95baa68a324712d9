"""One image file, PIL image or array to uint8 pixels (C, H, W)."""

from __future__ import annotations

import io
import os
import stat
from contextlib import contextmanager

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

# Pillow's other decoders are never started, whatever a file is called: one of them runs Ghostscript.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")


class UnreadableImage(Exception):
    """An image that cannot be decoded; the message says why."""


class OtherSize(Exception):
    """An image that has not the size of the others."""


@contextmanager
def _opened(image):
    """A PIL image that is not decoded yet, of a path or of bytes; what PIL raises meanwhile, in words."""
    try:
        if not isinstance(image, bytes) and not stat.S_ISREG(os.stat(image).st_mode):  # a pipe would hang
            raise UnreadableImage("not a file")
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            yield opened
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:  # its message holds the path or a buffer's address
        raise UnreadableImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def image_size(image) -> tuple[int, int]:
    """(H, W) that an image of a path or of bytes will have, from its head alone unless it is turned; raises
    UnreadableImage where that cannot be read."""
    with _opened(image) as opened:
        upright = opened.getexif().get(0x0112, 1) == 1  # the tag of orientation, EXIF 2.32
        return (opened if upright else ImageOps.exif_transpose(opened)).size[::-1]


def open_image(image) -> Image.Image:
    """A decoded PIL image of 8 bits from a path, encoded bytes, a PIL image or an array (H, W[, C]); EXIF rotation
    applied.

    Raises:
        UnreadableImage: no image, truncated, too large to be one, or of numbers on no scale that is known.
    """
    if isinstance(image, np.ndarray):
        return _of_array(image)
    if isinstance(image, Image.Image):
        picture = ImageOps.exif_transpose(image)
    else:
        with _opened(image) as opened:
            opened.load()
            picture = ImageOps.exif_transpose(opened)
    # PIL's convert() would cut deeper pixels off at 255 instead of scaling them
    return _of_array(np.asarray(picture)) if picture.mode.startswith(("I", "F")) else picture


def _of_array(pixels: np.ndarray) -> Image.Image:
    try:
        return Image.fromarray(eight_bits(pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels))
    except TypeError:
        raise UnreadableImage(f"an array of shape {pixels.shape}, not (H, W), (H, W, 3) or (H, W, 4)") from None


def eight_bits(pixels: np.ndarray) -> np.ndarray:
    """Pixels as uint8, by the scale that their largest value tells: 0 to 1 (floats only), or 8, 12 or 16 bits.

    Files do not say which: cameras of 12 bits write files of 16, whose upper 8 bits would be black.

    Raises:
        UnreadableImage: they are on none of these scales.
    """
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == bool:
        return pixels.astype(np.uint8) * 255
    numbers = pixels.dtype.kind in "iuf" and pixels.size > 0
    low, high = (pixels.min(), pixels.max()) if numbers else (-1, -1)
    if not (low >= 0 and high < 2**16):
        span = f" from {low:g} to {high:g}" if numbers else ""
        raise UnreadableImage(
            f"pixels of {pixels.dtype}{span}; known are 0 to 1 (floating-point), 8, 12 and 16 bits; scale them to one"
        )
    bits = next(bits for bits in (8, 12, 16) if high < 2**bits)
    if pixels.dtype.kind == "f":
        return (pixels * (255 if high <= 1 else 2.0 ** (8 - bits))).round().clip(0, 255).astype(np.uint8)
    return (pixels >> (bits - 8)).astype(np.uint8)


def read_image(image, channels: int, size: tuple[int, int] | None = None, fit: bool = True) -> np.ndarray:
    """Pixels (channels, H, W), uint8, of a path, bytes, PIL image or array.

    Args:
        channels: 3 for RGB, 1 for luminance.
        size: (H, W) to bring the image to: an antialiased bilinear resize that covers it, then a centre crop.
        fit: False to refuse an image of another size instead.

    Raises:
        UnreadableImage, OtherSize: it cannot be decoded, or is not `size` and `fit` is False.
    """
    picture = open_image(image).convert("RGB" if channels == 3 else "L")
    if size is not None and picture.size != size[::-1]:
        if not fit:
            raise OtherSize(f"{picture.size[0]}x{picture.size[1]}")
        picture = ImageOps.fit(picture, size[::-1], Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
