"""Data sets and images as strangers' tools leave them: read as they are meant, or refused in one line."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from kd.data.decode import UnreadableImage, open_image, read_image

# Images whose numbers are on another scale than 0 to 255

RAMP = np.arange(256).reshape(16, 16)


@pytest.mark.parametrize(
    ("pixels", "suffix"),
    [
        (RAMP.astype(np.float32) / 255, "tiff"),
        (RAMP.astype(np.float32), "tiff"),
        (RAMP.astype(np.int32), "tiff"),
        (RAMP.astype(np.int32) << 8, "tiff"),
        ((RAMP << 4).astype(np.uint16), "tiff"),
        ((RAMP << 4).astype(np.uint16), "png"),
        ((RAMP << 8).astype(np.uint16), "png"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.dtype} to {value.max():g}",
)
def test_pixels_on_any_usual_scale_become_eight_bits(tmp_path, pixels, suffix):
    Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}", 1)[0], RAMP)
    assert np.array_equal(read_image(pixels, 3), np.stack([RAMP] * 3))


@pytest.mark.parametrize(
    "pixels",
    [RAMP / 255, RAMP.astype(np.float64), RAMP, (RAMP << 8).astype(np.uint16), (RAMP > 127), RAMP[..., None]],
    ids=lambda pixels: f"{pixels.dtype} to {pixels.max():g}",
)
def test_arrays_on_any_usual_scale_become_eight_bits(pixels):
    expected = RAMP if pixels.dtype != bool else 255 * (RAMP > 127)
    assert np.array_equal(read_image(pixels, 1)[0], expected)
    if pixels.ndim == 2:
        assert np.array_equal(read_image(np.stack([pixels] * 3, -1), 3), np.stack([expected] * 3))


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (RAMP - 1.0, "pixels of float64 from -1 to 254; known are 0 to 1"),
        (RAMP << 16, r"from 0 to 1.67117e\+07; known"),
        (np.where(RAMP > 3, np.nan, RAMP), "from nan to nan"),
        (np.zeros((0, 4)), "pixels of float64; known"),
        (np.zeros((3, 16, 16), np.uint8), r"an array of shape \(3, 16, 16\), not \(H, W\)"),
        (np.array([["a"]]), "pixels of <U1"),
    ],
    ids=["negative", "32 bits", "nan", "empty", "channels first", "text"],
)
def test_pixels_on_no_known_scale_are_refused(pixels, words):
    with pytest.raises(UnreadableImage, match=words):
        open_image(pixels)


def test_a_pil_image_is_turned_as_its_file_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.stack([RAMP] * 3, -1).astype(np.uint8)).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(read_image(picture, 3), read_image(tmp_path / "a.png", 3))
    assert np.array_equal(read_image(tmp_path / "a.png", 1)[0], np.rot90(RAMP, -1))


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match="not a file"):
        read_image(tmp_path / "x.png", 3)
