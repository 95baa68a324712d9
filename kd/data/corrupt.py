"""Images made worse, to see what a network does with them: five severities each of what cameras and files do.

Hendrycks and Dietterich 2019, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
https://arxiv.org/abs/1903.12261. The strengths are those of the authors' CIFAR-10-C
(https://github.com/hendrycks/robustness, `make_cifar_c.py`), for images of any size: ImageNet-C, for 224 pixels, has
stronger ones, which leave nothing of a small image. The blur, which is meant for 32 pixels, grows with larger images.

Differs from there: values are rounded, where the authors' code cuts them off; the noise is a function of the image's
place in the data, so that all networks, at any number of processes, see the same images, and of nothing else, so that a
higher severity is more of the same noise.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kd import keyed
from kd.data import Read, Split

SEVERITIES = (1, 2, 3, 4, 5)
STRENGTHS = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation on the scale 0 to 1
    "blur": (0.4, 0.6, 0.7, 0.8, 1.0),  # the Gaussian's standard deviation in pixels, of an image of 32 or less
    "jpeg": (80, 65, 58, 50, 40),  # quality
    "brightness": (0.05, 0.1, 0.15, 0.2, 0.3),  # added to the value of hue, saturation, value
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),  # factor of each channel's distance from its mean
}
_NOISE = keyed.key(0, keyed.Purpose.CORRUPTION)


def corrupt(images: Tensor, index: Tensor, name: str, severity: int) -> Tensor:
    """Corrupted images uint8 (B, C, H, W), on the CPU: there all are computed, in float64, to be the same everywhere.

    Args:
        index: int64 (B,), their places in the data.
        name, severity: one of `STRENGTHS`, and 1 to 5.
    """
    strength = STRENGTHS[name][severity - 1]
    if name == "jpeg":
        return _jpeg(images, strength)
    few = max(1, 2**18 // images[0].numel())  # at once, so that they stay in the CPU's cache
    parts = zip(images.split(few), index.split(few), strict=True)
    return torch.cat([_corrupt(part, places, name, strength) for part, places in parts])


@dataclass
class CorruptedSplit(Split):
    """A split whose images are read corrupted."""

    corruption: str
    severity: int

    def on_host(self, where: np.ndarray) -> Read:
        columns, labels, index = super().on_host(where)
        return {"image": corrupt(columns["image"], index, self.corruption, self.severity)}, labels, index


def _corrupt(images: Tensor, index: Tensor, name: str, strength: float) -> Tensor:
    values = images.double() / 255
    if name == "gaussian_noise":
        pixels = torch.arange(values[0].numel())
        keys = keyed.keys(keyed.keys(_NOISE, index)[:, None], pixels)
        values = values + strength * keyed.normal(keys).view_as(values)
    elif name == "blur":
        height, width = values.shape[2:]
        sigma = strength * max(1.0, min(height, width) / 32)
        values = _blur_matrix(height, sigma) @ values @ _blur_matrix(width, sigma).T
    elif name == "brightness":
        # With hue and saturation kept, all channels are multiplied by what the largest is.
        value = values.amax(1, keepdim=True)
        bright = (value + strength).clamp(max=1)
        values = torch.where(value > 0, values * bright / value.clamp(min=1e-9), bright)
    else:
        mean = values.mean((2, 3), keepdim=True)
        values = mean + strength * (values - mean)
    return (255 * values).round().clamp(0, 255).to(torch.uint8)


def _blur_matrix(length: int, sigma: float) -> Tensor:
    """The matrix (length, length) that blurs a row of pixels; beyond the edge the last pixel is repeated."""
    radius = int(4 * sigma + 0.5)
    offsets = torch.arange(-radius, radius + 1)
    weights = (-0.5 * (offsets.double() / sigma) ** 2).exp()
    source = (torch.arange(length)[:, None] + offsets).clamp(0, length - 1)
    weights = (weights / weights.sum()).expand(length, -1)
    return torch.zeros(length, length, dtype=torch.double).scatter_add_(1, source, weights)


def _jpeg(images: Tensor, quality: int) -> Tensor:
    """Images as they come back from a JPEG file."""
    results = []
    for pixels in images.numpy():
        picture = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        decoded = np.asarray(Image.open(file, formats=["JPEG"]))
        results.append(decoded[None] if decoded.ndim == 2 else decoded.transpose(2, 0, 1))
    return torch.from_numpy(np.stack(results))
