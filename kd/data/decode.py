"""One image file, PIL image or array to uint8 pixels (C, H, W)."""

from __future__ import annotations

import io
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
        with Image.open(io.BytesIO(image) if isinstance(image, bytes) else image, formats=FORMATS) as opened:
            yield opened
    except FileNotFoundError:
        raise
    except UnidentifiedImageError:  # its message holds the path or a buffer's address
        raise UnreadableImage(f"not an image of a known format ({', '.join(FORMATS)})") from None
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UnreadableImage(str(error) or type(error).__name__) from None


def image_size(image) -> tuple[int, int]:
    """(H, W) that an image of a path or of bytes will have, from its head alone unless it is turned.

    Raises:
        UnreadableImage: its head cannot be read.
    """
    with _opened(image) as opened:
        upright = opened.getexif().get(0x0112, 1) == 1  # the tag of orientation, EXIF 2.32
        return (opened if upright else ImageOps.exif_transpose(opened)).size[::-1]


def open_image(image) -> Image.Image:
    """A decoded PIL image from a path, encoded bytes, a PIL image or a uint8 array (H, W[, C]); EXIF rotation applied.

    Raises:
        UnreadableImage: no image, truncated, or too large to be one.
    """
    if isinstance(image, Image.Image):
        return image
    if isinstance(image, np.ndarray):
        return Image.fromarray(image)
    with _opened(image) as opened:
        opened.load()
        return ImageOps.exif_transpose(opened)


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
    picture = open_image(image)
    if picture.mode.startswith("I"):  # 16 bits: convert() would clip them to 8 instead of scaling
        picture = Image.fromarray((np.asarray(picture).clip(0, 65535) >> 8).astype(np.uint8))
    picture = picture.convert("RGB" if channels == 3 else "L")
    if size is not None and picture.size != (size[1], size[0]):
        if not fit:
            raise OtherSize(f"{picture.size[0]}x{picture.size[1]}")
        picture = ImageOps.fit(picture, (size[1], size[0]), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
